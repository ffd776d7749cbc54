"""Faults that end a process, stop it, fill its disk or damage its checkpoints, put into a live run. Free of torch.

Each is noted in `RUN/faults.jsonl` before it strikes, since a killed process tells nothing afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigError
from trainer.faults.sentence import OF_CHECKPOINT, WHILE_SAVING, Kind, Strike

if TYPE_CHECKING:
    from trainer.config.files import RunFiles

STRUCK = "faults.jsonl"
"""In the directory of a run: one line for each fault that struck: `time` (Unix seconds), `rank`, `step`, `fault`."""

FULL_AT_BYTES = 4096
"""A disk that is full on purpose takes so much of each file, so that writes are cut off in the middle."""

_COMMITTED = re.compile(r"step-\d{8,}")
_UNDER_AGENT = "TORCHELASTIC_RUN_ID"
"""Environment variable of a rank whose parent is a torch-elastic agent."""

_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_CAPABILITY_VERSION_3 = 0x20080522


_SIGNALS = {
    Kind.KILL: signal.SIGKILL,
    Kind.STOP: signal.SIGSTOP,
    Kind.TERMINATE: signal.SIGTERM,
    Kind.WARN: signal.SIGUSR1,
}


@dataclass(slots=True)
class _Pending:
    """A strike, and how far it is."""

    strike: Strike
    visits: int = 0
    """Attempts at its step so far."""
    reached: bool = False
    """Its time has come."""
    moments: int = 0
    """Of saves since then."""
    struck: bool = False
    over: bool = False


class ProcessFaults:
    """Carries out the faults of one rank that strike its process, its disk or its checkpoints.

    :meth:`begin` is called in the main thread; :meth:`moment` and :meth:`reading` in threads of their own.

    Args:
        strikes: of this rank.
        start: of the run, from 1; faults of other starts do nothing.
    """

    def __init__(self, strikes: Sequence[Strike], rank: int, start: int, files: RunFiles | None):
        """
        Raises:
            ConfigError: a fault cannot happen here.
        """
        if strikes and files is None:
            raise ConfigError([("faults", f"{strikes[0]} strikes the processes of a run, and this is none")])
        self._files = files
        self._rank = rank
        self._step = 0
        self._usual_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._pending = [_Pending(strike) for strike in strikes if strike.every_time or strike.start == start]
        if any(strike.kind is Kind.CHECKPOINTS_ARE_READ_ONLY for strike in strikes):
            # a start that was killed meanwhile has left it so
            set_writable(self._run.checkpoints, True)
        if any(pending.strike.kind is Kind.CHECKPOINTS_ARE_READ_ONLY for pending in self._pending):
            heed_permissions(self._run.root)

    @property
    def _run(self) -> RunFiles:
        assert self._files is not None
        return self._files

    def begin(self, step: int) -> None:
        """An attempt at `step` begins."""
        self._step = step
        for pending in self._pending:
            strike = pending.strike
            if strike.kind is Kind.SLOW and strike.covers(step):
                compute_for(strike.factor)
            pending.visits += step == strike.first
            # a start that goes on from beyond the step meets the fault at once
            pending.reached |= step >= strike.first if strike.visit == 1 else pending.visits >= strike.visit
            if not pending.reached:
                continue
            if not pending.struck:
                self._strike(pending)
            elif not pending.over and strike.last is not None and step > strike.last:
                pending.over = True
                self._end(strike)

    def moment(self) -> None:
        """The writing of a checkpoint is at its next moment."""
        for pending in self._pending:
            if pending.reached and not pending.struck and pending.strike.kind in WHILE_SAVING:
                pending.moments += 1
                if pending.moments >= pending.strike.factor:
                    self._note(pending)
                    if pending.strike.kind is Kind.WARN_WHILE_SAVING:
                        os.kill(os.getpid(), signal.SIGUSR1)
                        continue
                    if pending.strike.kind is Kind.KILL_EVERYTHING_WHILE_SAVING:
                        kill_everything()
                    os.kill(os.getpid(), signal.SIGKILL)

    def reading(self) -> None:
        """A batch is about to be read.

        Raises:
            RuntimeError: to end the thread that reads.
        """
        for pending in self._pending:
            if pending.strike.kind is Kind.DATA_WORKER_DIES and pending.reached and not pending.struck:
                self._note(pending)
                raise RuntimeError(f"ended on purpose by {pending.strike}")

    def _strike(self, pending: _Pending) -> None:
        kind = pending.strike.kind
        if kind in _SIGNALS:
            self._note(pending)
            os.kill(os.getpid(), _SIGNALS[kind])
        elif kind is Kind.KILL_EVERYTHING:
            self._note(pending)
            kill_everything()
        elif kind in OF_CHECKPOINT:
            if (file := file_of_newest(self._run.checkpoints, self._rank)) is not None:
                self._note(pending, file=str(file.relative_to(self._run.root)))
                damage(file, kind)
                kill_everything()
        elif kind is Kind.SLOW:
            self._note(pending)
        elif kind is Kind.DISK_IS_FULL:
            self._note(pending)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, self._usual_limit[1]))
        elif kind is Kind.CHECKPOINTS_ARE_READ_ONLY:
            self._note(pending)
            self._run.checkpoints.mkdir(exist_ok=True)
            set_writable(self._run.checkpoints, False)

    def _end(self, strike: Strike) -> None:
        if strike.kind is Kind.DISK_IS_FULL:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._usual_limit)
        elif strike.kind is Kind.CHECKPOINTS_ARE_READ_ONLY:
            set_writable(self._run.checkpoints, True)

    def _note(self, pending: _Pending, **more: str) -> None:
        pending.struck = True
        entry = {"time": time.time(), "rank": self._rank, "step": self._step, "fault": str(pending.strike), **more}
        with (self._run.root / STRUCK).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"rank {self._rank}, step {self._step}, on purpose: {pending.strike}", file=sys.stderr, flush=True)


def compute_for(seconds: float) -> None:
    """Keep a core busy: a rank that slept would seem to wait for the others."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def kill_everything() -> None:
    """Kill this process, and where a torch-elastic agent started it the agent and all its other ranks."""
    own = os.getpid()
    if _UNDER_AGENT in os.environ and (agent := os.getppid()) > 1:
        siblings = [
            int(child) for task in Path(f"/proc/{agent}/task").glob("*/children") for child in task.read_text().split()
        ]
        for pid in [agent, *siblings]:
            if pid != own:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    os.kill(own, signal.SIGKILL)


def file_of_newest(checkpoints: Path, rank: int) -> Path | None:
    """The file of tensors that belongs to a rank in the newest committed checkpoint, or the first one there; None
    where nothing is committed."""
    committed = sorted(path for path in checkpoints.glob("step-*") if _COMMITTED.fullmatch(path.name))
    for directory in reversed(committed):
        files = sorted(directory.glob("*.safetensors"))
        own = directory / f"rank-{rank:05d}.safetensors"
        if files:
            return own if own in files else files[0]
    return None


def damage(file: Path, kind: Kind) -> None:
    """Flip a bit in the middle of a file, cut its second half off, or delete it."""
    size = file.stat().st_size
    if kind is Kind.DELETE_CHECKPOINT_FILE:
        file.unlink()
    elif kind is Kind.TRUNCATE_CHECKPOINT:
        os.truncate(file, size // 2)
    else:
        with file.open("r+b") as opened:
            opened.seek(size // 2)
            byte = opened.read(1)[0]
            opened.seek(size // 2)
            opened.write(bytes([byte ^ 1]))


def set_writable(folder: Path, writable: bool) -> None:
    """Allow or forbid its owner to make and remove things in a folder, where there is one."""
    if folder.is_dir():
        mode = stat.S_IMODE(folder.stat().st_mode)
        folder.chmod(mode | stat.S_IWUSR if writable else mode & ~0o222)


def heed_permissions(folder: Path) -> None:
    """Let permission bits bind this thread, and those that it starts from now on, as they bind users other than root.

    Args:
        folder: where it is tried out.

    Raises:
        ConfigError: they do not bind it here.
    """
    _drop_capabilities(_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH)
    problem = "checkpoints_are_read_only cannot be carried out"
    try:
        with tempfile.TemporaryDirectory(dir=folder) as probe:
            set_writable(Path(probe), False)
            try:
                (Path(probe) / "file").touch()
            except PermissionError:
                return
            finally:
                set_writable(Path(probe), True)
    except OSError as error:
        text = f"{problem} in {folder} without the rights of root ({error.strerror}); let its owner run it"
        raise ConfigError([("faults", text)]) from error
    raise ConfigError([("faults", f"{problem}: this process may write into a read-only folder in {folder}")])


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _drop_capabilities(*numbers: int) -> None:
    """Take capabilities (all below 32) out of the effective set of this thread; see capabilities(7)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _CapabilityHeader(_CAPABILITY_VERSION_3, 0), (_Capabilities * 2)()
    if libc.capget(ctypes.byref(header), sets) == 0:
        for number in numbers:
            sets[0].effective &= ~(1 << number)
        libc.capset(ctypes.byref(header), sets)
