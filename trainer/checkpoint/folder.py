"""What rank 0 does to the directories of a run's `checkpoints` folder; no other rank changes any. Free of torch.

A directory `step-NNNNNNNN` that has a manifest is whole. All others are leftovers, and readers ignore them:

- `.partial-NNNN`: being written by that start
- `.replaced-NNNN`: in the way of that start's checkpoint of the same step; put back where that was not committed
- `.abandoned`: of a history that was rolled back; goes after the next commit
- `.removed`: being deleted
- `.damaged`, `.foreign`: unreadable, or of another run; kept for a person to look at
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from trainer.checkpoint.manifest import (
    BEST,
    HEALTHY,
    MANIFEST,
    Manifest,
    best_score,
    committed_steps,
    is_healthy,
    name_of,
    read_manifest,
)
from trainer.checkpoint.retain import Kept, doomed
from trainer.errors import CheckpointError, DamagedError, SupersededError
from trainer.exclusive import refresh
from trainer.starts import Fence

Level = Literal["info", "warning", "error"]
Say = Callable[[Level, str], None]

LEFTOVER = re.compile(r"(step-\d{8,})\.(partial|replaced|abandoned|removed|damaged|foreign)(?:-(\d+))?")
"""Name of the checkpoint, what became of it, and the start or a running number."""


class Folder:
    """The `checkpoints` folder of a run.

    Args:
        keep, keep_every: see :func:`trainer.checkpoint.retain.doomed`.
        fence: asked before anything that a newer start could miss.
    """

    def __init__(self, path: Path, fence: Fence, *, keep: int, keep_every: int | None, say: Say):
        self.path = path
        self._fence = fence
        self._keep, self._keep_every = keep, keep_every
        self._say = say
        self._healthy: set[int] = set()
        """Steps that were called healthy, committed or not yet."""
        self._best: dict[int, str] = {}
        """What is written into the checkpoints that were called best, committed or not yet."""
        self._refused: set[str] = set()
        """Damaged or rolled back, and perhaps not renamed."""
        self._told: set[str] = set()

    def partial(self, step: int) -> Path:
        """Where this start writes the checkpoint of `step`."""
        return self.path / f"{name_of(step)}.partial-{self._fence.number:04d}"

    def prepare(self, step: int) -> None:
        """An empty directory to write to.

        Raises:
            SupersededError, OSError
        """
        self._fence.check()
        partial = self.partial(step)
        self.remove(partial)
        partial.mkdir(parents=True)

    def commit(self, manifest: Manifest, ready: Callable[[Path], None]) -> Path:
        """Make the written checkpoint visible, in one rename.

        Args:
            ready: called with the partial directory right before the last look whether a newer start has taken over.

        Raises:
            SupersededError: one has; nothing of it was touched.
            OSError: the older checkpoints are what they were.
        """
        partial, target = self.partial(manifest.step), self.path / name_of(manifest.step)
        ready(partial)
        self._fence.check()
        aside = self._set_aside(target) if os.path.lexists(target) else None
        try:
            partial.rename(target)
        except OSError:
            if aside is not None:
                _put_back(aside, target)
            raise
        _sync(self.path)
        self._refused.discard(target.name)
        if manifest.step in self._healthy:
            self._mark(manifest.step)
        if manifest.step in self._best:
            self._mark_best(manifest.step, self._best[manifest.step])
        if aside is not None:
            self.remove(aside)
        return target

    def tidy(self) -> None:
        """Delete what is no longer wanted; only after a commit. What cannot be deleted is said and tried next time."""
        try:
            # a start that began before this look has not seen the new checkpoint, and may be reading an older one
            self._fence.check()
            for path, kind, _ in self.leftovers():
                if kind in ("abandoned", "removed"):
                    self.remove(path)
            history = []
            for step in committed_steps(self.path):
                directory = self.path / name_of(step)
                try:
                    manifest = read_manifest(directory)
                except CheckpointError:
                    continue
                if manifest.run != self._fence.run or manifest.start > self._fence.number:
                    continue
                if manifest.start == self._fence.number or self._fence.admits(manifest.start, step):
                    history.append(Kept(step, is_healthy(directory), best_score(directory) is not None))
                else:
                    self._say("info", f"{directory.name} was written by an older start that was cut off; it is deleted")
                    self.remove(directory)
            for step in doomed(history, self._keep, self._keep_every):
                self.remove(self.path / name_of(step))
        except SupersededError:
            pass
        except OSError as error:
            self._say("warning", f"an old checkpoint could not be deleted and takes up space: {error}")

    def newest(self, at_most: int | None = None) -> Path | None:
        """The newest checkpoint of this run's history. Damaged ones on the way are said and put aside."""
        if self.path.is_dir():
            refresh(self.path)
            self._restore()
        for step in reversed(committed_steps(self.path)):
            directory = self.path / name_of(step)
            if (at_most is not None and step > at_most) or directory.name in self._refused:
                continue
            try:
                manifest = read_manifest(directory)
            except DamagedError as error:
                self.quarantine(directory, str(error))
                continue
            if manifest.run != self._fence.run:
                self._say_once(directory, "warning", "belongs to another run and is not used")
            elif not self._fence.admits(manifest.start, step):
                self._say_once(directory, "info", "was written by an older start that was cut off and is not used")
            else:
                return directory
        return None

    def quarantine(self, directory: Path, reason: str) -> None:
        """Say that a checkpoint is damaged and take its name away: it is not used again, nor deleted.

        Raises:
            SupersededError: a newer start has taken over.
        """
        self._fence.check()
        self._refused.add(directory.name)
        try:
            moved = self._move_aside(directory, "damaged")
        except OSError as error:
            self._say("error", f"{reason} (it stays under its name: {error.strerror}); going back to an older one")
        else:
            self._say("error", f"{reason} (renamed to {moved.name}); going back to an older one")

    def abandon_after(self, step: int) -> None:
        """Take their names away from the checkpoints of later steps: they belong to a history that was rolled back.

        A newer start that has taken over is left to the next save, where all ranks hear of it together.
        """
        self._healthy = {healthy for healthy in self._healthy if healthy <= step}
        self._best = {best: text for best, text in self._best.items() if best <= step}
        for committed in reversed(committed_steps(self.path)):
            directory = self.path / name_of(committed)
            if committed <= step or directory.name in self._refused:
                continue
            try:
                self._fence.check()
                if read_manifest(directory).run == self._fence.run:
                    self._move_aside(directory, "abandoned")
            except SupersededError:
                return
            except CheckpointError:
                continue
            except OSError as error:
                self._refused.add(directory.name)
                self._say(
                    "warning",
                    f"{directory} was rolled back and could not be renamed ({error.strerror}); this start ignores it",
                )

    def mark_healthy(self, step: int) -> None:
        """The steps after the checkpoint of `step` were clean; it may still be on its way to the disk."""
        self._healthy.add(step)
        # the thread that commits looks at the set after its rename: one of the two sees the other
        if (self.path / name_of(step) / MANIFEST).is_file():
            self._mark(step)

    def mark_best(self, step: int, score: str, value: float) -> None:
        """The checkpoint of `step` is better than all before; it may still be on its way to the disk."""
        text = self._best[step] = json.dumps({"score": score, "value": value})
        if (self.path / name_of(step) / MANIFEST).is_file():
            self._mark_best(step, text)

    def forget_best(self) -> None:
        """What was called best was so by another score."""
        self._best.clear()
        for step in committed_steps(self.path):
            with suppress(OSError):
                (self.path / name_of(step) / BEST).unlink(missing_ok=True)

    def clean(self) -> None:
        """At the beginning of a start: remove what older ones have left unfinished."""
        try:
            self._restore()
            for path, kind, number in self.leftovers():
                if kind == "removed" or (kind in ("partial", "replaced") and number < self._fence.number):
                    self.remove(path)
        except OSError as error:
            self._say("warning", f"what an older start has left could not be deleted: {error}")

    def leftovers(self) -> Iterator[tuple[Path, str, int]]:
        """(directory, what became of it, number or 0), in the order of their names."""
        if self.path.is_dir():
            for path in sorted(self.path.iterdir()):
                if matched := LEFTOVER.fullmatch(path.name):
                    yield path, matched.group(2), int(matched.group(3) or 0)

    def remove(self, directory: Path) -> None:
        """Delete a directory; killed in the middle of it, no half of a checkpoint is left under a valid name.

        Raises:
            OSError
        """
        if not os.path.lexists(directory):
            return
        if LEFTOVER.fullmatch(directory.name) is None:
            directory = self._move_aside(directory, "removed")
        if directory.is_symlink() or not directory.is_dir():
            directory.unlink()
        else:
            shutil.rmtree(directory)

    def _set_aside(self, target: Path) -> Path | None:
        """Make room for a checkpoint of this start."""
        self._refuse_newer(target)
        try:
            manifest = read_manifest(target)
        except CheckpointError as error:
            self._say("error", f"{error} (renamed to {self._move_aside(target, 'damaged').name})")
            return None
        if manifest.run != self._fence.run:
            moved = self._move_aside(target, "foreign")
            self._say("warning", f"{target.name} belongs to another run (renamed to {moved.name})")
            return None
        aside = target.with_name(f"{target.name}.replaced-{self._fence.number:04d}")
        self.remove(aside)
        target.rename(aside)
        try:
            # a newer start may have committed between the look and the rename
            self._refuse_newer(aside)
        except SupersededError:
            _put_back(aside, target)
            raise
        return aside

    def _refuse_newer(self, directory: Path) -> None:
        try:
            manifest = read_manifest(directory)
        except CheckpointError:
            return
        if manifest.run == self._fence.run and manifest.start > self._fence.number:
            raise SupersededError(
                f"{name_of(manifest.step)} was already committed by start {manifest.start}, and this is start "
                f"{self._fence.number} of the same run: it may write nothing more"
            )

    def _restore(self) -> None:
        """Put back what a start grabbed that was killed before its own checkpoint was in place."""
        for path, kind, _ in self.leftovers():
            target = self.path / path.name.partition(".")[0]
            if kind == "replaced" and not os.path.lexists(target):
                _put_back(path, target)

    def _move_aside(self, directory: Path, kind: str) -> Path:
        """Rename to `NAME.KIND`, or `NAME.KIND-2`, … where that is taken."""
        number = 1
        moved = directory.with_name(f"{directory.name}.{kind}")
        while os.path.lexists(moved):
            number += 1
            moved = directory.with_name(f"{directory.name}.{kind}-{number}")
        directory.rename(moved)
        return moved

    def _mark(self, step: int) -> None:
        directory = self.path / name_of(step)
        try:
            (directory / HEALTHY).touch()
            _sync(directory)
        except OSError as error:
            self._say("warning", f"{directory.name} could not be marked as healthy: {error}")

    def _mark_best(self, step: int, text: str) -> None:
        directory = self.path / name_of(step)
        try:
            (directory / BEST).write_text(text)
            _sync(directory)
        except OSError as error:
            self._say("warning", f"{directory.name} could not be marked as the best: {error}")

    def _say_once(self, directory: Path, level: Level, text: str) -> None:
        if directory.name not in self._told:
            self._told.add(directory.name)
            self._say(level, f"{directory} {text}")


def _put_back(aside: Path, target: Path) -> None:
    with suppress(OSError):
        aside.rename(target)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
