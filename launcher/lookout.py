"""Looks after the ranks of one start: which of them has died and of what, and whether one of them hangs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.local import children_of, process_fields, process_state, send
from trainer.heartbeat import Beat, prepare_beats, read_beats, stacks_path

DEATH_GRACE_SECONDS = 10.0
"""How long the others may live on after a rank died: a collective that waits for it can wait for ever."""

STACKS_SECONDS = 5.0
"""How long the ranks get to write down their stacks."""

STOOD_STILL_SECONDS = 5.0
"""Without a look: this process was stopped, or the whole machine, and the ranks get their time anew."""

_PREFIX = "trimtab-beats-"
_SWEEP_AFTER_SECONDS = 60.0
_STATES = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waiting for a device", "Z": "dead"}


@dataclass(frozen=True, slots=True)
class Death:
    """A rank that has ended."""

    rank: int
    status: int | None
    """Exit code, or −N where signal N killed it; None: its parent collected it before it could be seen."""
    phase: str
    """Of its last sign of life."""
    time: float
    """Unix seconds."""
    monotonic: float

    @property
    def bad(self) -> bool:
        return self.phase != "ending" if self.status is None else self.status != 0

    def __str__(self) -> str:
        if self.status is None:
            return f"rank {self.rank} died"
        if self.status >= 0:
            return f"rank {self.rank} ended with exit code {self.status}"
        return f"rank {self.rank} was killed by {signal_in_words(-self.status)}"


def signal_in_words(number: int) -> str:
    """signal 9 (SIGKILL; out of memory?)"""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"signal {number} ({name}{'; out of memory?' if number == signal.SIGKILL else ''})"


@contextlib.contextmanager
def beats_folder(ranks: int) -> Iterator[Path]:
    """A folder in memory with a file for the sign of life of each rank; removed afterwards.

    What launchers that were killed have left behind is removed too: nobody holds the lock on it.
    """
    places = [Path(place) for place in ("/dev/shm", tempfile.gettempdir()) if os.access(place, os.W_OK)]  # noqa: S108
    for place in places:
        _sweep(place)
    for place in places:
        folder = Path(tempfile.mkdtemp(dir=place, prefix=_PREFIX))
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                prepare_beats(folder, ranks)
            except OSError:
                if place == places[-1]:
                    raise
                continue
            yield folder
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _sweep(place: Path) -> None:
    for folder in place.glob(f"{_PREFIX}*"):
        # another user's, or just removed by another launcher
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                about = os.fstat(descriptor)
                # a young one may be about to be locked
                if about.st_uid == os.getuid() and time.time() - about.st_mtime > _SWEEP_AFTER_SECONDS:
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


class Lookout:
    """The `watch` of `local.supervise` for the ranks of one start.

    Args:
        beats: from `beats_folder`.
        hang_seconds: without a sign of life; None: ranks may be silent for ever.
        hangs: folder of the run in which the stacks of a hang are kept, `TIME/rank-N.txt`.
    """

    def __init__(self, beats: Path, hang_seconds: float | None, hangs: Path):
        self._beats = beats
        self._hang_seconds = hang_seconds
        self._hangs = hangs
        self._since = time.monotonic()
        """Nobody is blamed for being silent before: the launch, or when this process went on after it was stopped."""
        self._looked = self._since
        self._pids: dict[int, int] = {}
        self._deaths: list[Death] = []
        """Until an alarm: after it, all are killed."""
        self._alarmed = False

    @property
    def first_death(self) -> Death | None:
        """The rank that ended first, if not well."""
        bad = [death for death in self._deaths if death.bad]
        return min(bad, key=lambda death: death.monotonic, default=None)

    @property
    def exit_codes(self) -> frozenset[int | None]:
        """Of the ranks that have ended (`Death.status`)."""
        return frozenset(death.status for death in self._deaths)

    def pid_of(self, rank: int) -> int | None:
        """Process id of a rank, dead or alive; None: it was never seen."""
        beats = {beat.rank: beat.pid for beat in read_beats(self._beats)}
        return beats.get(rank) or next((pid for pid, which in self._pids.items() if which == rank), None)

    def __call__(self, agent: int) -> str | None:
        """Look. A sentence when all is to be ended: a rank died and others live on, or one hangs."""
        now = time.monotonic()
        if now - self._looked > STOOD_STILL_SECONDS:
            self._since = now
        self._looked = now
        self._meet(agent)
        death = self.first_death
        alarm = str(death) if death and now - death.monotonic > DEATH_GRACE_SECONDS else self._hang(agent, now)
        self._alarmed = alarm is not None
        return alarm

    def _meet(self, agent: int) -> None:
        """Wait, in a thread each, for the death of ranks that were not seen before: the agent soon collects the dead,
        and only until then the kernel says what they died of."""
        for pid in children_of(agent):
            if pid in self._pids or (rank := _rank_of(pid)) is None:
                continue
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:  # collected already, or a kernel without such descriptors
                continue
            self._pids[pid] = rank
            threading.Thread(target=self._await_death, args=(rank, pid, descriptor), daemon=True).start()
        # whom nobody waits for, because it was dead before it was met
        noted = {death.rank for death in self._deaths} | set(self._pids.values())
        for beat in read_beats(self._beats):
            if beat.pid is not None and beat.rank not in noted and process_state(beat.pid) is None:
                self._note(beat.rank, None)

    def _await_death(self, rank: int, pid: int, descriptor: int) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        fields = process_fields(pid)
        os.close(descriptor)
        self._note(rank, os.waitstatus_to_exitcode(int(fields[49])) if fields and fields[0] == "Z" else None)
        # wake the main thread
        os.kill(os.getpid(), signal.SIGCHLD)

    def _note(self, rank: int, status: int | None) -> None:
        if not self._alarmed:
            phase = next((beat.phase for beat in read_beats(self._beats) if beat.rank == rank), "")
            self._deaths.append(Death(rank, status, phase, time.time(), time.monotonic()))

    def _hang(self, agent: int, now: float) -> str | None:
        if self._hang_seconds is None:
            return None
        beats = read_beats(self._beats)
        dead = {death.rank for death in self._deaths}
        living = [
            beat
            for beat in beats
            if beat.rank not in dead and (beat.pid is None or process_state(beat.pid) not in (None, "Z"))
        ]
        if not living:
            # the agent ends with its last rank; should it not, it is what hangs
            ends = [death.monotonic for death in self._deaths]
            silent = now - max(self._since, *(beat.seconds for beat in beats), *ends)
            return f"all ranks have ended, but not what started them (process {agent})" if self._too(silent) else None
        silent = now - max(self._since, min(beat.seconds for beat in living))
        if not self._too(silent):
            return None
        behind = _behind(living)
        text = f"no sign of life for {silent:.0f} s from {_describe(behind)}"
        return f"{text}; {self._keep_stacks(living, now)}"

    def _too(self, silent: float) -> bool:
        return self._hang_seconds is not None and silent > self._hang_seconds

    def _keep_stacks(self, living: list[Beat], now: float) -> str:
        """Have the ranks write down their stacks, and keep them with the run. Says where."""
        headers = {
            beat.rank: f"{_describe(beat)}, process {beat.pid}, {now - beat.seconds:.1f} s ago" for beat in living
        }
        asked = [beat for beat in living if beat.pid is not None]
        for beat in asked:
            assert beat.pid is not None
            send(beat.pid, signal.SIGUSR2)
            if process_state(beat.pid) == "T":
                # it is killed in a moment; before that it says where it stood
                send(beat.pid, signal.SIGCONT)
        self._await_stacks([beat.rank for beat in asked])
        folder = self._hangs / time.strftime("%Y-%m-%dT%H-%M-%S")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for beat in living:
                stacks = stacks_path(self._beats, beat.rank).read_text(errors="replace")
                text = stacks or "it wrote no stacks: it had not started yet, or does not answer to signals\n"
                (folder / f"rank-{beat.rank:05d}.txt").write_text(f"{headers[beat.rank]}\n\n{text}")
        except OSError as error:
            return f"their stacks cannot be kept in {folder}: {error.strerror}"
        return f"stacks of all ranks: {folder}"

    def _await_stacks(self, ranks: list[int]) -> None:
        """Until all are written, as far as can be told: none of the files has grown for a moment."""
        deadline = time.monotonic() + STACKS_SECONDS
        paths = [stacks_path(self._beats, rank) for rank in ranks]
        before: list[int] = []
        while time.monotonic() < deadline:
            sizes = [path.stat().st_size for path in paths]
            if sizes == before and all(sizes):
                return
            before = sizes
            time.sleep(0.1)


def _behind(living: list[Beat]) -> Beat:
    """The rank for which the others wait: one that cannot run, or else the one that got least far."""

    def key(beat: Beat) -> tuple[bool, float]:
        state = None if beat.pid is None else process_state(beat.pid)
        return state not in ("T", "t"), beat.seconds

    return min(living, key=key)


def _describe(beat: Beat) -> str:
    if beat.pid is None:
        return f"rank {beat.rank} (not started yet)"
    where = beat.phase if beat.step is None else f"{beat.phase}, step {beat.step}"
    state = _STATES.get(process_state(beat.pid) or "Z")
    return f"rank {beat.rank} ({where}{'; ' + state if state else ''})"


def _rank_of(pid: int) -> int | None:
    """The rank that a child of the agent is; None: it is none, or not yet."""
    try:
        pairs = (each.partition(b"=") for each in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        variables = {name: value for name, _, value in pairs}
    except OSError:
        return None
    # RANK alone can be the agent's too, where a scheduler sets it
    return int(variables[b"RANK"]) if {b"RANK", b"TORCHELASTIC_RUN_ID"} <= variables.keys() else None
