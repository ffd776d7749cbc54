"""Which start of a run this is, and whether a newer one has taken over. Free of torch; works across machines.

Every start takes the next number in `RUN/starts/`: `0003.json` is created by one process and by no other, on network
file systems too. A start is superseded once there is a higher number: it may then write nothing more into the run.

`0003.resumed.json` says from which checkpoint that start went on. From these follows the history of the run: what an
older start commits although it was superseded (it was stopped between its last look and the commit) is not in it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError, SupersededError
from trainer.exclusive import place, read, refresh

FOLDER = "starts"
BY_VARIABLE = "TRIMTAB_STARTED_BY"
"""Environment variable: a text by which whoever starts ranks knows a start as its own, in the start's record."""
LOOK_SECONDS = 0.5
"""How long `superseded` may be behind."""

_RECORD = re.compile(r"(\d{4,})\.json")
_RESUMED = re.compile(r"(\d{4,})\.resumed\.json")
_IDENTITY = re.compile(r"[0-9a-f]{32}")


class Fence(Protocol):
    """What a writer asks before it makes something visible."""

    @property
    def number(self) -> int:
        """Of this start, from 1."""

    @property
    def run(self) -> str:
        """Identity of the run, 32 hexadecimal digits: equal for all its starts."""

    @property
    def superseded(self) -> bool:
        """Whether a newer start has taken over, as of at most half a second ago. May wait for the disk."""

    @property
    def noticed(self) -> bool:
        """Whether any thread has found that out. Never waits: for the training loop."""

    def check(self) -> None:
        """Look now: right before a commit.

        Raises:
            SupersededError: a newer start has taken over.
            OSError: the run directory cannot be read.
        """

    def admits(self, start: int, step: int) -> bool:
        """Whether a checkpoint that `start` wrote at `step` belongs to the history that this start goes on with."""

    def resumed(self, start: int, step: int) -> None:
        """Note, once, which checkpoint that was: before this start writes one itself. For rank 0 only.

        Raises:
            SupersededError: a newer start has taken over.
            RunDirectoryError: it cannot be written.
        """


class NoFence:
    """Of a run that nobody else can start: tests, drills, benchmarks."""

    number = 1
    run = ""
    superseded = False
    noticed = False

    def check(self) -> None:
        pass

    def admits(self, start: int, step: int) -> bool:  # noqa: ARG002
        return True

    def resumed(self, start: int, step: int) -> None:
        pass


NO_FENCE = NoFence()


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which checkpoints are of one history, by the start that wrote them."""

    limits: Mapping[int, float]
    """Start → the last step of its checkpoints that counts."""
    unrecorded: tuple[int, float] = (0, 0)
    """(start, step): of the starts up to this one nothing is known any more, and what they wrote up to this step
    counts."""

    def admits(self, start: int, step: int) -> bool:
        """Whether the checkpoint that `start` wrote at `step` is of this history."""
        last, limit = self.unrecorded
        return step <= (limit if start <= last else self.limits.get(start, -1))


def lineage(resumed: Mapping[int, tuple[int, int]], head: int) -> Lineage:
    """The history that leads to `head`.

    Args:
        resumed: start → (start, step) of the checkpoint that it went on from; (0, 0): from nothing.
        head: the start whose checkpoints all count.
    """
    limits: dict[int, float] = {}
    start, limit = head, math.inf
    while start in resumed:
        limits[start] = limit
        origin, step = resumed[start]
        start, limit = origin, min(limit, step)
    return Lineage(limits, (start, limit) if start else (0, 0))


@dataclass(frozen=True, slots=True)
class Starts:
    """What `RUN/starts/` says."""

    newest: int
    """The highest number taken; 0: none."""
    run: str | None
    """Identity of the run; None: not known."""
    history: Lineage
    """What the next start chooses from: the history of the newest start that got as far as going on."""


def read_starts(files: RunFiles) -> Starts:
    """The starts of a run so far.

    Raises:
        RunDirectoryError: a record is damaged.
    """
    folder = files.root / FOLDER
    return Starts(newest(files), _identity(folder), _history_before(folder, math.inf))


def newest(files: RunFiles) -> int:
    """The highest number that a start of the run has taken; 0: none."""
    return max(_numbers(files.root / FOLDER, _RECORD), default=0)


def begin(files: RunFiles, after: int = 0) -> RunFence:
    """Take the next number: from now on all earlier starts are superseded. For rank 0 only.

    Args:
        after: take a number above this one (the newest start in the ledger, should `RUN/starts/` have been lost).

    Raises:
        RunDirectoryError: the run directory is not writable, or a record in it is damaged.
    """
    folder = files.root / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        refresh(folder)
        number = 1 + max(_numbers(folder, _RECORD), default=0)
        run = _identity(folder)
        if run is None:
            run, last = _written_by(files)
            number = max(number, after + 1, last + 1)
        about = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3)}
        about["by"] = os.environ.get(BY_VARIABLE, "")
        while not place(folder / f"{number:04d}.json", {"start": number, **about}):
            about["run"] = run = _identity(folder) or run
            number += 1
    except OSError as error:
        raise RunDirectoryError(
            f"no start can be noted in {folder} ({error.strerror}); free space, or make it writable"
        ) from error
    return RunFence(files, number, run)


class RunFence:
    """The place of one start among the starts of its run; the same on all its ranks, and in all their threads.

    Args:
        number: of this start, from `begin`.
        run: identity of the run, from `begin`.
    """

    def __init__(self, files: RunFiles, number: int, run: str):
        self.number = number
        self.run = run
        self._folder = files.root / FOLDER
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._looked = -math.inf
        self._lineage: Lineage | None = None

    @property
    def superseded(self) -> bool:
        """Whether a newer start has taken over, as of at most half a second ago. May wait for the disk."""
        with self._lock:
            if self._reason is None and time.monotonic() - self._looked >= LOOK_SECONDS:
                # what cannot be read now is read later; a commit looks for itself
                with contextlib.suppress(OSError):
                    # a first no may be the memory of a network file system, of either file
                    if self._why() is not None:
                        refresh(self._folder)
                        self._reason = self._why()
                self._looked = time.monotonic()
            return self._reason is not None

    @property
    def noticed(self) -> bool:
        """Whether any thread of this process has found that out. Never waits: for the training loop."""
        return self._reason is not None

    def check(self) -> None:
        """Look now: right before a commit.

        Raises:
            SupersededError: a newer start has taken over, or the directory is another run's by now.
            OSError: the run directory cannot be read.
        """
        with self._lock:
            if self._reason is None:
                refresh(self._folder)
                self._reason = self._why()
                self._looked = time.monotonic()
            if self._reason is not None:
                raise SupersededError(self._reason)

    def resumed(self, start: int, step: int) -> None:
        """Note, once, from which checkpoint this start goes on: before it writes one itself. For rank 0 only.

        Args:
            start: which one wrote the checkpoint; 0: from nothing.
            step: of the checkpoint.

        Raises:
            SupersededError: a newer start has taken over.
            RunDirectoryError: it cannot be written, or was written before.
        """
        self.check()
        path = self._folder / f"{self.number:04d}.resumed.json"
        try:
            placed = place(path, {"start": start, "step": step})
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be written ({error.strerror}); free space on its disk") from error
        if not placed:
            raise RunDirectoryError(f"{path} is there already: a start goes on from one checkpoint only")
        self._lineage = None

    def admits(self, start: int, step: int) -> bool:
        """Whether a checkpoint that `start` wrote at `step` is of the history that this start goes on with: until
        `resumed`, of the newest start before it that went on from somewhere.

        Raises:
            RunDirectoryError: a record of a start is damaged.
        """
        if self._lineage is None:
            self._lineage = _history_before(self._folder, self.number + 1)
        return self._lineage.admits(start, step)

    def _why(self) -> str | None:
        """In words why this start is superseded; None: it is not."""
        own = read(self._folder / f"{self.number:04d}.json")
        if own is None or own.get("run") != self.run:
            return (
                f"{self._folder.parent} is no longer the directory of this run (moved, or made anew): start "
                f"{self.number} writes nothing more and ends"
            )
        # numbers are taken one by one: without the next there is none above it
        newer = read(self._folder / f"{self.number + 1:04d}.json")
        if newer is None:
            return None
        return (
            f"start {self.number + 1} of {self._folder.parent} has taken over (process {newer.get('pid', '?')} on "
            f"{newer.get('host', '?')}): start {self.number} is superseded, writes nothing more and ends"
        )


def _history_before(folder: Path, number: float) -> Lineage:
    """The history of the newest start below `number` that went on from somewhere."""
    resumed: dict[int, tuple[int, int]] = {}
    for start in _numbers(folder, _RESUMED):
        path = folder / f"{start:04d}.resumed.json"
        record = read(path) or {}
        origin, step = record.get("start"), record.get("step")
        if not (isinstance(origin, int) and isinstance(step, int) and 0 <= origin < start and step >= 0):
            raise RunDirectoryError(f"{path} is damaged; restore it, or move it away and lose what start {start} did")
        resumed[start] = origin, step
    earlier = [start for start in resumed if start < number]
    if earlier:
        return lineage(resumed, max(earlier))
    # nothing was noted yet: what is there was written by starts whose records are gone
    numbers = _numbers(folder, _RECORD)
    return Lineage({}, (min(numbers) - 1 if numbers else sys.maxsize, math.inf))


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return [int(matched.group(1)) for name in names if (matched := pattern.fullmatch(name))]


def _identity(folder: Path) -> str | None:
    """Of the run, as its first start noted it; None: there was none."""
    for number in sorted(_numbers(folder, _RECORD)):
        run = (read(folder / f"{number:04d}.json") or {}).get("run")
        if isinstance(run, str) and _IDENTITY.fullmatch(run):
            return run
    return None


def _written_by(files: RunFiles) -> tuple[str, int]:
    """(run, newest start) of the checkpoints in a run directory that has lost its starts; a new run where there are
    none."""
    found: list[tuple[str, str, int]] = []
    for path in files.checkpoints.glob("step-*/manifest.json"):
        manifest = read(path) or {}
        run, start = manifest.get("run"), manifest.get("start")
        if isinstance(run, str) and _IDENTITY.fullmatch(run) and isinstance(start, int) and start > 0:
            found.append((path.parent.name, run, start))
    if not found:
        return secrets.token_hex(16), 0
    run = max(found)[1]
    print(
        f"warning: {files.root / FOLDER} is gone; the checkpoints in {files.checkpoints} are taken for one history",
        file=sys.stderr,
        flush=True,
    )
    return run, max(start for _, whose, start in found if whose == run)
