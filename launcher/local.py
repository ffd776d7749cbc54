"""Runs a command on this machine, waits for it, and leaves nothing behind.

`accelerate launch` (a torch-elastic agent) starts each rank in a session of its own, so a terminal's Ctrl-C reaches
none of them; and when the agent itself is signalled it kills what has not ended within `PET_SHUTDOWN_TIMEOUT` and
reports a failure. So the agent is left alone, in its own session, and a signal to this process is passed once to the
ranks, which vote to stop at the end of their step, save, and end in order. A second signal is urgent: the ranks get a
few seconds more.

Nothing outlives this process: when it dies, even by SIGKILL, the kernel ends the command, and the ranks tell the kernel
to end them with their parent (`trainer.heartbeat.die_with_parent`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from trainer.errors import LaunchError
from trainer.heartbeat import LAUNCHER_VARIABLE

URGENT_GRACE_SECONDS = 10.0
"""After a second request to stop, the time until what is left is killed."""

LOOK_SECONDS = 0.5
"""Time between two looks at a command that is watched."""

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Ended:
    """How a supervised command ended."""

    exit_code: int
    """As a shell gives it: 128 + N where signal N killed it."""
    stop_requested: signal.Signals | None
    """The first signal that asked this process to stop."""
    killed: bool
    """Whether something had to be killed: it outlived its grace or its parent."""
    alarm: str | None = None
    """Why the watch had all of it killed; None: it did not."""


class Requests:
    """Signals that ask this process to stop, held back from the beginning to the end of the block, and waited for.

    For the main thread. Signals that were ignored before stay ignored: nohup, and shells that start jobs in the
    background, ignore some of them.
    """

    def __init__(self) -> None:
        self.asking = frozenset(number for number in _REQUESTS if signal.getsignal(number) != signal.SIG_IGN)
        self._held = self.asking | {signal.SIGCHLD}
        self.before: set[signal.Signals] = set()
        """The signals that were blocked before: a command is started with these."""
        self.received: signal.Signals | None = None
        """The first request that was waited for."""

    def __enter__(self) -> Requests:
        self.before = {signal.Signals(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, self._held)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # a request that came after the end is as good as none: it must not kill this process when it is let through
        while signal.sigtimedwait(self._held, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, self.before)

    def next_event(self, seconds: float) -> signal.Signals | None:
        """The next signal within so many seconds: a request to stop, or SIGCHLD."""
        return self._noted(signal.sigtimedwait(self._held, max(0.0, seconds)))

    def wait(self, seconds: float) -> signal.Signals | None:
        """Wait so long; a request to stop ends it, also one that came before."""
        return self._noted(signal.sigtimedwait(self.asking, max(0.0, seconds)))

    def _noted(self, info: signal.struct_siginfo | None) -> signal.Signals | None:
        number = None if info is None else signal.Signals(info.si_signo)
        if self.received is None and number in self.asking:
            self.received = number
        return number


def supervise(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    targets: Callable[[int], list[int]] | None = None,
    passed_on: signal.Signals | None = None,
    inherit: Sequence[int] = (),
    grace_seconds: float = URGENT_GRACE_SECONDS,
    stopping: str = "stopping",
    say: Callable[[str], None] = lambda _: None,
    watch: Callable[[int], str | None] | None = None,
    requests: Requests | None = None,
) -> Ended:
    """Run `argv` with `environment` in a session of its own until it has ended and no descendant of it is left.

    Args:
        targets: from the command's process id to the processes that a request to stop is passed to; itself by default.
        passed_on: as which signal they get it; by default SIGUSR1 as itself, all others as SIGTERM.
        inherit: descriptors that the command keeps open (the lock of the run).
        stopping: what the first request leads to, in words.
        say: told in a sentence what a signal led to.
        watch: called with the command's process id twice a second, and whenever a child of this process ends; a
            sentence from it has all that is left killed.
        requests: held back by the caller for longer than this command lasts.

    Must be called from the main thread. If this process dies, even by SIGKILL, the kernel sends the command SIGTERM.

    Raises:
        LaunchError: the command cannot be started.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    launcher = os.getpid()
    with contextlib.ExitStack() as stack:
        requests = requests or stack.enter_context(Requests())
        before = requests.before
        # Orphans of the command become children of this process, so that they can be found and ended.
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        stack.callback(libc.prctl, _PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        spared = frozenset(children_of(launcher))

        def in_the_child() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != launcher:  # it died before the line above
                os._exit(1)

        try:
            process = subprocess.Popen(  # noqa: S603 (a list, no shell)
                list(argv),
                env={**environment, LAUNCHER_VARIABLE: str(launcher)},
                start_new_session=True,
                pass_fds=tuple(inherit),
                preexec_fn=in_the_child,
            )
        except OSError as error:
            raise LaunchError(f"{argv[0]} cannot be started: {error.strerror}") from error
        family = _Family(process, spared)
        waiting = _Waiting(family, requests, targets or (lambda pid: [pid]), passed_on, grace_seconds, stopping, say)
        try:
            waiting.until_it_ends(watch)
        finally:
            left = family.kill()
        code = process.returncode
        killed = bool(left) or code == -signal.SIGKILL
        return Ended(code if code >= 0 else 128 - code, waiting.requested, killed, waiting.alarm)


@dataclass(slots=True)
class _Waiting:
    """Waiting for a command, and what happened meanwhile."""

    family: _Family
    requests: Requests
    targets: Callable[[int], list[int]]
    passed_on: signal.Signals | None
    grace_seconds: float
    stopping: str
    say: Callable[[str], None]
    requested: signal.Signals | None = None
    deadline: float | None = None
    alarm: str | None = None

    def until_it_ends(self, watch: Callable[[int], str | None] | None) -> None:
        command = self.family.command
        while command.poll() is None:
            remaining = 3600.0 if self.deadline is None else self.deadline - time.monotonic()
            if remaining <= 0:
                self.say("it did not end in time: killing it")
                self._kill()
                break
            received = self.requests.next_event(remaining if watch is None else min(remaining, LOOK_SECONDS))
            if received in self.requests.asking:
                self._pass_on(received)
                continue
            self.family.reap()
            if watch is not None and command.poll() is None and (alarm := watch(command.pid)):
                self.alarm = alarm
                self.say(f"{alarm}: ending all ranks")
                self._kill()
                break

    def _kill(self) -> None:
        self.family.kill()
        self.family.command.wait()

    def _pass_on(self, received: signal.Signals) -> None:
        command = self.family.command
        if self.requested is None:
            self.requested = received
            self.say(f"{words_of(received)}: {self.stopping}; once more to stop at once")
            # while there are no ranks yet, the command itself is all there is to end
            for pid in self.targets(command.pid) or [command.pid]:
                # Python turns SIGINT into a traceback wherever no handler is installed yet; SIGTERM ends it quietly
                send(pid, self.passed_on or (signal.SIGUSR1 if received == signal.SIGUSR1 else signal.SIGTERM))
        elif self.deadline is None and received in (signal.SIGINT, signal.SIGTERM):
            self.deadline = time.monotonic() + self.grace_seconds
            self.say(
                f"{words_of(received)} again: what has not ended in {self.grace_seconds:g} s is killed; "
                "the last checkpoint stays"
            )
            send(command.pid, signal.SIGTERM)


def words_of(received: signal.Signals) -> str:
    """A request to stop as the user knows it."""
    return "Ctrl-C" if received == signal.SIGINT else received.name


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def children_of(pid: int) -> list[int]:
    """The direct children of a process: for an elastic agent, its ranks."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, task.read_text().split())
    return children


def _descendants(pid: int) -> Iterator[int]:
    for child in children_of(pid):
        yield child
        yield from _descendants(child)


class _Family:
    """A command and everything that came from it, orphans included; the other children of this process are spared."""

    def __init__(self, command: subprocess.Popen[bytes], spared: frozenset[int]):
        self.command = command
        self._spared = spared

    def _members(self) -> list[int]:
        own = [child for child in children_of(os.getpid()) if child not in self._spared]
        return own + [pid for child in own for pid in _descendants(child)]

    def kill(self) -> list[int]:
        """Kill all who are alive, and say who was."""
        killed: list[int] = []
        while alive := [pid for pid in self._members() if not _is_zombie(pid)]:
            for pid in alive:
                send(pid, signal.SIGKILL)
            killed += [pid for pid in alive if pid not in killed]
            signal.sigtimedwait({signal.SIGCHLD}, 0.1)
            self.reap()
        self.reap()
        return killed

    def reap(self) -> None:
        """Collect adopted orphans that have ended; the command itself is left to its Popen."""
        for child in children_of(os.getpid()):
            if child not in self._spared and child != self.command.pid and _is_zombie(child):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child, os.WNOHANG)


def _is_zombie(pid: int) -> bool:
    return process_state(pid) in (None, "Z")


def process_state(pid: int) -> str | None:
    """R, S, D, T (stopped), t (traced), Z (ended, not collected), …, as in `man proc`; None: there is none any more."""
    fields = process_fields(pid)
    return fields[0] if fields else None


def process_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third one, the state, on; empty: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
