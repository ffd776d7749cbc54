"""Signs of life of the ranks of one node, in shared memory: the launcher sees a rank that stands still. Free of torch.

Under `trimtab run` each rank has a file of 48 bytes that the launcher made for it, mapped into memory: a beat is a
write of a quarter of a microsecond; nothing waits for anybody. Under other launchers a rank watches itself. In both,
SIGUSR2 makes a rank write down the stacks of all its threads, in C, so that one that holds Python's lock does so too.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FOLDER_VARIABLE = "TRIMTAB_HEARTBEATS"
"""Environment variable: the folder in which each rank of this node keeps its sign of life."""

LAUNCHER_VARIABLE = "TRIMTAB_LAUNCHER"
"""Environment variable: process id of the `trimtab` that started this process or its parent."""

RELAUNCHED_VARIABLE = "TRIMTAB_RELAUNCHED"
"""Environment variable of a start that `trimtab run` made after one that failed, JSON: `reason` (a sentence), and in
Unix seconds `killed` (when the first rank died; null where none did), `ended` (when the failed start was over) and
`launched` (when this one was started)."""

_BEAT = struct.Struct("=qq24sd")
"""Process id (0: no beat yet), step (−1: not known), phase, CLOCK_MONOTONIC of the beat, which is one for all processes
of a node. All lie aligned, so that none is ever read half."""

_PR_SET_PDEATHSIG = 1
_BACKSTOP_SECONDS = 10.0


class Heartbeat(Protocol):
    """What a rank calls whenever it has got on; costs about a microsecond."""

    def beat(self, phase: str, step: int | None = None) -> None:
        """The main thread is alive and begins `phase` (starting · loading · computing · evaluating · saving · ending);
        `step`: where the run stands, the last one given where None."""


class NoHeartbeat:
    """Nobody listens."""

    def beat(self, phase: str, step: int | None = None) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Beat:
    """The newest sign of life of a rank."""

    rank: int
    pid: int | None
    """None: it has not given any yet, and nothing below is known."""
    phase: str
    step: int | None
    seconds: float
    """CLOCK_MONOTONIC of it, as `time.monotonic` gives it in every process of the node."""


def beat_path(folder: Path, rank: int) -> Path:
    """Where the sign of life of a rank lies."""
    return folder / f"rank-{rank:05d}.beat"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank under `trimtab run` writes its stacks on SIGUSR2."""
    return folder / f"rank-{rank:05d}.stacks"


def prepare_beats(folder: Path, ranks: int) -> None:
    """Make the files of ranks 0 … `ranks` − 1, so that no rank fails for lack of room.

    Raises:
        OSError: there is none.
    """
    for rank in range(ranks):
        beat_path(folder, rank).write_bytes(bytes(_BEAT.size))
        stacks_path(folder, rank).touch()


def read_beats(folder: Path) -> list[Beat]:
    """The newest sign of life of every rank for which `prepare_beats` made a file, by rank."""
    return list(_read_beats(folder))


def _read_beats(folder: Path) -> Iterator[Beat]:
    for path in sorted(folder.glob("rank-*.beat")):
        pid, step, phase, seconds = _BEAT.unpack(path.read_bytes()[: _BEAT.size])
        rank = int(path.stem.removeprefix("rank-"))
        known = None if step < 0 else step
        yield Beat(rank, pid or None, phase.rstrip(b"\0").decode(errors="replace"), known, seconds)


def open_heartbeat(rank: int | str) -> Heartbeat:
    """The heartbeat of this process, to the launcher that it says it has; gives the first beat, `starting`.

    From here on SIGUSR2 writes the stacks of all threads: for the launcher, or else to stderr.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        try:
            return SharedHeartbeat(Path(folder), int(rank))
        except OSError as error:
            text = f"rank {rank}: the launcher will take it for hanging: {folder}: {error.strerror}"
            print(text, file=sys.stderr, flush=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    return NoHeartbeat()


class SharedHeartbeat:
    """Beats into a file that the launcher made and reads."""

    def __init__(self, folder: Path, rank: int):
        """
        Raises:
            OSError: the launcher made no file for this rank, or is gone.
        """
        # before the first beat: the launcher sends SIGUSR2 to those who have given one
        stacks = os.open(stacks_path(folder, rank), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        with beat_path(folder, rank).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BEAT.size)
        self._pid = os.getpid()
        self._step = -1
        self.beat("starting")

    def beat(self, phase: str, step: int | None = None) -> None:
        if step is not None:
            self._step = step
        _BEAT.pack_into(self._memory, 0, self._pid, self._step, phase.encode(), time.monotonic())


def watch_yourself(heartbeat: Heartbeat, hang_seconds: float | None, hangs: Path, rank: int | str) -> Heartbeat:
    """The heartbeat to go on with: where no launcher listens to `heartbeat`, one that ends this process when it hangs.

    Args:
        hang_seconds: without a beat; None: never.
        hangs: folder in which the stacks of all threads are then written, `TIME/rank-N.txt`.
    """
    if hang_seconds is None or isinstance(heartbeat, SharedHeartbeat):
        return heartbeat
    return Watchdog(hang_seconds, hangs, rank)


class Watchdog:
    """Ends this process with exit code 1 and the stacks of all its threads when `beat` was not called for too long.

    A thread looks. Should it not come to it, because something holds Python's lock, a timer in C that the thread puts
    off again and again ends the process ten seconds later; the stacks are then on stderr.
    """

    def __init__(self, hang_seconds: float, hangs: Path, rank: int | str):
        self._hang_seconds = hang_seconds
        self._hangs = hangs
        self._rank = rank
        self._last = ("starting", -1, time.monotonic())
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, phase: str, step: int | None = None) -> None:
        self._last = (phase, self._last[1] if step is None else step, time.monotonic())

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        interval = min(1.0, self._hang_seconds / 4)
        while True:
            faulthandler.dump_traceback_later(self._hang_seconds + _BACKSTOP_SECONDS, exit=True)
            if self._stopped.wait(interval):
                faulthandler.cancel_dump_traceback_later()
                return
            phase, step, beaten = self._last
            silent = time.monotonic() - beaten
            if silent > self._hang_seconds:
                self._end(phase, step, silent)

    def _end(self, phase: str, step: int, silent: float) -> None:
        where = f"{phase}, step {step}" if step >= 0 else phase
        text = f"rank {self._rank} showed no sign of life for {silent:.0f} s ({where}): ended as hanging"
        path = self._hangs / time.strftime("%Y-%m-%dT%H-%M-%S") / f"rank-{int(self._rank):05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                print(text, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            print(f"{text}; stacks: {path}", file=sys.stderr, flush=True)
        except OSError as error:
            print(f"{text}; {path}: {error.strerror}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


def die_with_parent() -> None:
    """Under `trimtab`: have the kernel kill this process when its parent dies, even by SIGKILL and even if this process
    is stopped by then; where the parent is dead already, end here.

    Call it early, from the main thread. Without `trimtab` (its environment variable) it does nothing.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # An orphan was given another parent. This one is the launcher, or the agent that the launcher started; any other
    # took its place before the line above.
    parent = os.getppid()
    if int(launcher) not in (parent, _parent_of(parent)):
        os._exit(1)


def _parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
