"""A fast tier: each rank keeps its newest shards in the memory of its node, so that a crashed process goes on from
there without the shared disk.

    /dev/shm/trimtab-UID/RUN-PLACE/rank-NNNNN/step-NNNNNNNN/     the rank's two files and a manifest of them

Nothing of it survives the node. A copy counts only if every rank has its own of the same moment, whole.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import xxhash

from trainer.checkpoint.folder import Say
from trainer.checkpoint.manifest import (
    Manifest,
    committed_steps,
    name_of,
    read_manifest,
    shard_names,
    write_manifest,
)
from trainer.checkpoint.shard import Moment, State, read_shard, write_shard
from trainer.checkpoint.together import Together, nothing
from trainer.checkpoint.writer import Failed, Writer
from trainer.config.memory import RESERVE, shortage
from trainer.errors import CheckpointError, DamagedError, TrimtabError
from trainer.records import Saved
from trainer.starts import NO_FENCE, Fence

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is made for this user alone
_KEEP = 2
"""Copies: while one rank still writes the newest, another has finished it, and the one before is common to both."""


class MemoryTier:
    """The copies of one rank. All ranks call the same methods at the same steps.

    Args:
        stage: ZeRO stage; copies are not converted.
        folder: below which the user's own folder lies.
        place: directory of the run: a copy of it elsewhere, which has the same identity, has memory of its own.
        ranks_on_node: that share this node's memory; None: as the launcher says.
        say: told what a person must hear (level, text), from any thread.
    """

    def __init__(
        self,
        folder: Path = SHARED_MEMORY,
        *,
        rank: int,
        world_size: int,
        stage: int,
        place: Path | None = None,
        fence: Fence = NO_FENCE,
        ranks_on_node: int | None = None,
        moment: Moment = nothing,
        say: Say = nothing,
    ):
        self._rank, self._world_size, self._stage = rank, world_size, stage
        self._fence, self._moment, self._say = fence, moment, say
        self._base = folder / f"trimtab-{os.getuid()}"
        # a run that nobody can start again has no name, and needs none
        run = fence.run or f"unnamed-{os.getpid()}"
        if re.fullmatch(r"[A-Za-z0-9_-]+", run) is None:
            raise CheckpointError(f"{run!r} is no identity of a run")
        if place is not None:
            run += f"-{xxhash.xxh3_64_hexdigest(os.fsencode(place.resolve()))}"
        self._run = self._base / run
        self.folder = self._run / f"rank-{rank:05d}"
        self._on_node = ranks_on_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._ranks = Together(rank, world_size)
        self._writer = Writer("memory tier")
        self._refused = False

    @property
    def in_flight(self) -> bool:
        """From :meth:`begin` until :meth:`drain` has given the result."""
        return self._writer.in_flight

    @property
    def progress(self) -> int:
        """Bytes that this rank has written so far."""
        return self._writer.progress

    def begin(
        self, state: State | Callable[[], State], manifest: Manifest, *, release: Callable[[], None] = nothing
    ) -> None:
        """Begin to copy this rank's state, in a thread; arguments as in :meth:`CheckpointStore.begin`."""
        manifest = manifest.model_copy(update={"run": self._fence.run, "start": self._fence.number})
        self._writer.begin(manifest.step, lambda: self._work(state, manifest, release))

    def drain(self, beat: Callable[[], None] = nothing) -> Saved | Failed | None:
        """Wait for the write in flight; the result is this rank's alone. None: it was taken already."""
        return self._writer.drain(beat, lambda: self.progress)

    def newest(self, at_most: int | None = None) -> int | None:
        """The newest step of which every rank has a copy of the same moment of this run's history. A collective.

        Raises:
            CheckpointError: on all ranks; somebody else's folder is in the place of this user's.
        """
        found: dict[int, str] = {}
        told = self._ranks.all(lambda: found.update(self._copies()), lambda: found)
        first = told[0]
        common = [step for step in first if all(copies.get(step) == first[step] for copies in told)]
        return max((step for step in common if at_most is None or step <= at_most), default=None)

    def load(self, step: int, *, beat: Callable[[], None] = nothing) -> tuple[Manifest, State] | None:
        """Verify and read this rank's copy. A collective.

        Returns:
            None: the copy of some rank is damaged; that is said, and it is dropped on all ranks.

        Raises:
            CheckpointError: on all ranks; a copy cannot be read.
        """
        directory = self.folder / name_of(step)
        result: list[tuple[Manifest, State]] = []

        def read() -> None:
            manifest = read_manifest(directory)
            result.append((manifest, read_shard(directory, manifest.files, self._rank, beat=beat)))

        try:
            self._ranks.all(read)
        except DamagedError as error:
            self._say("error", f"the copy of step {step} in memory is not used: {error}")
            self._remove(directory)
            return None
        return result[0]

    def abandon_after(self, step: int) -> None:
        """Copies of later steps are of a history that was rolled back."""
        self.drain()
        for later in committed_steps(self.folder):
            if later > step:
                self._remove(self.folder / name_of(later))

    def clear(self) -> None:
        """Give the memory back: the run is complete, or its copies are worth nothing."""
        self.drain()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._rank == 0 and self._run.is_dir():
            # of an earlier start with more ranks
            for path in self._run.iterdir():
                number = path.name.removeprefix("rank-")
                if number.isdigit() and int(number) >= self._world_size:
                    shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            self._run.rmdir()

    def close(self) -> None:
        """A write that is in flight is given up; the copies stay for the next start."""
        self._writer.close()

    def _work(
        self, state: State | Callable[[], State], manifest: Manifest, release: Callable[[], None]
    ) -> Saved | Failed:
        step = manifest.step
        directory = self.folder / name_of(step)
        partial = directory.with_name(f"{directory.name}.partial-{self._fence.number:04d}")
        with ExitStack() as releasing:
            releasing.callback(release)
            try:
                # what a superseded start wrote could displace the newer one's copies, on the same node
                self._fence.check()
                tensors, numbers = state() if callable(state) else state
                if lacking := self._lacking(sum(tensor.nbytes for tensor in tensors.values())):
                    return self._refuse(step, lacking)
                _own_folder(self._base)
                self._remove(partial)
                partial.mkdir(parents=True)
                self._moment("begin", partial)
                entries = write_shard(
                    partial, self._rank, (tensors, numbers), moment=self._moment, count=self._writer.count, sync=False
                )
                releasing.close()
                complete = manifest.model_copy(update={"files": tuple(entries)})
                write_manifest(partial, complete)
                self._moment("commit", partial)
                self._remove(directory)
                partial.rename(directory)
            except (OSError, TrimtabError) as error:
                self._remove(partial)
                return self._refuse(step, str(error))
        self._prune(step)
        return Saved(step, name_of(step), complete.num_bytes, 0.0)

    def _lacking(self, num_bytes: int) -> str | None:
        """Why there is no room, in one clause: for the copies that are kept and the one that is being written."""
        held = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        needed = max(num_bytes, (_KEEP + 1) * num_bytes - held)
        free = int((1 - RESERVE) * shutil.disk_usage(self._base.parent).free)
        if needed * self._on_node > free:
            return f"{needed * self._on_node:,} bytes are needed in {self._base.parent}, and {free:,} are free for it"
        return shortage(needed, self._on_node)

    def _refuse(self, step: int, reason: str) -> Failed:
        if not self._refused:
            self._refused = True
            self._say("warning", f"rank {self._rank} keeps no copy of step {step} in memory: {reason}")
        return Failed(step, reason)

    def _copies(self) -> dict[int, str]:
        """What each copy is of, by step, where it is of this run, in this shape, and seems whole."""
        found: dict[int, str] = {}
        steps = committed_steps(self.folder)
        if steps:
            _own_folder(self._base)
        for step in steps:
            try:
                manifest = read_manifest(self.folder / name_of(step))
            except CheckpointError:
                continue
            of_this = (manifest.run, manifest.step) == (self._fence.run, step)
            alike = (manifest.world_size, manifest.stage) == (self._world_size, self._stage)
            listed = {entry.name for entry in manifest.files} == set(shard_names(self._rank))
            if of_this and alike and listed and self._fence.admits(manifest.start, step):
                found[step] = manifest.model_copy(update={"files": (), "checksum": ""}).model_dump_json()
        return found

    def _prune(self, newest: int) -> None:
        """The newest and those right before it stay; later ones are of a history that was left."""
        steps = [step for step in committed_steps(self.folder) if step <= newest]
        keep = {name_of(step) for step in steps[-_KEEP:]}
        for path in self.folder.iterdir():
            if path.name not in keep:
                self._remove(path)

    def _remove(self, directory: Path) -> None:
        # without its manifest it is no copy any more, also when this is cut short
        with suppress(OSError):
            (directory / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


def _own_folder(path: Path) -> None:
    """Make a folder that only this user can use.

    Raises:
        CheckpointError: somebody else made it: what lies in it is not to be trusted.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise CheckpointError(f"{path} is not a folder of this user alone; remove it")
