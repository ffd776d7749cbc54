"""Runs a command on this machine, waits for it, and leaves nothing behind.

`accelerate launch` (a torch-elastic agent) starts each rank in a session of its own, so a terminal's Ctrl-C reaches
none of them; and when the agent itself is signalled it kills what has not ended within `PET_SHUTDOWN_TIMEOUT` and
reports a failure. So the agent is left alone, in its own session, and a signal to this process is passed once to the
ranks, which vote to stop at the end of their step, save, and end in order. A second signal is urgent: the ranks get a
few seconds more.
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

from trainer.errors import LaunchError

URGENT_GRACE_SECONDS = 10.0
"""After a second request to stop, the time until what is left is killed."""

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


def supervise(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    targets: Callable[[int], list[int]] | None = None,
    inherit: Sequence[int] = (),
    grace_seconds: float = URGENT_GRACE_SECONDS,
    stopping: str = "stopping",
    say: Callable[[str], None] = lambda _: None,
) -> Ended:
    """Run `argv` with `environment` in a session of its own until it has ended and no descendant of it is left.

    Args:
        targets: from the command's process id to the processes that a request to stop is passed to; itself by default.
        inherit: descriptors that the command keeps open (the lock of the run).
        stopping: what the first request leads to, in words.
        say: told in a sentence what a signal led to.

    Must be called from the main thread. If this process dies, even by SIGKILL, the kernel sends the command SIGTERM.

    Raises:
        LaunchError: the command cannot be started.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    launcher = os.getpid()
    # Orphans of the command become children of this process, so that they can be found and ended.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # nohup, and shells that start jobs in the background, ignore some of these: that stays so
    requests = {number for number in _REQUESTS if signal.getsignal(number) != signal.SIG_IGN}
    watched = requests | {signal.SIGCHLD}
    spared = frozenset(children_of(launcher))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def in_the_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(1)

    try:
        try:
            process = subprocess.Popen(  # noqa: S603 (a list, no shell)
                list(argv),
                env=dict(environment),
                start_new_session=True,
                pass_fds=tuple(inherit),
                preexec_fn=in_the_child,
            )
        except OSError as error:
            raise LaunchError(f"{argv[0]} cannot be started: {error.strerror}") from error
        family = _Family(process, spared)
        requested = _wait(family, watched, targets or (lambda pid: [pid]), grace_seconds, stopping, say)
        left = family.kill()
        code = process.returncode
        killed = bool(left) or code == -signal.SIGKILL
        return Ended(code if code >= 0 else 128 - code, requested, killed)
    finally:
        # a request that came after the end is as good as none: it must not kill this process when it is let through
        while signal.sigtimedwait(watched, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _wait(
    family: _Family,
    watched: set[signal.Signals],
    targets: Callable[[int], list[int]],
    grace_seconds: float,
    stopping: str,
    say: Callable[[str], None],
) -> signal.Signals | None:
    command = family.command
    requested: signal.Signals | None = None
    deadline: float | None = None
    while command.poll() is None:
        remaining = 3600.0 if deadline is None else deadline - time.monotonic()
        if remaining <= 0:
            say("it did not end in time: killing it")
            family.kill()
            command.wait()
            break
        info = signal.sigtimedwait(watched, remaining)
        if info is None or info.si_signo == signal.SIGCHLD:
            family.reap()
            continue
        received = signal.Signals(info.si_signo)
        if requested is None:
            requested = received
            say(f"{_words(received)}: {stopping}; once more to stop at once")
            # while there are no ranks yet, the command itself is all there is to end
            for pid in targets(command.pid) or [command.pid]:
                # Python turns SIGINT into a traceback wherever no handler is installed yet; SIGTERM ends it quietly
                _send(pid, signal.SIGUSR1 if received == signal.SIGUSR1 else signal.SIGTERM)
        elif deadline is None and received in (signal.SIGINT, signal.SIGTERM):
            deadline = time.monotonic() + grace_seconds
            say(
                f"{_words(received)} again: what has not ended in {grace_seconds:g} s is killed; "
                "the last checkpoint stays"
            )
            _send(command.pid, signal.SIGTERM)
    return requested


def _words(received: signal.Signals) -> str:
    return "Ctrl-C" if received == signal.SIGINT else received.name


def _send(pid: int, number: signal.Signals) -> None:
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
                _send(pid, signal.SIGKILL)
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
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
