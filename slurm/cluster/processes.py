"""Finds and ends the processes of a cluster. They carry its folder in their environment: no list can be out of date."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plan import ClusterError

MARK = "TRIMTAB_LAB_MEMBER"
"""NAME@FOLDER, inherited by the daemons and by what they start for themselves, not by jobs."""


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    command: str


def mark(member: str, folder: Path) -> dict[str, str]:
    return {MARK: f"{member}@{folder}"}


def processes() -> dict[int, Process]:
    """All processes of the machine that are not zombies."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                head, _, tail = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")
                state, parent = tail.split()[:2]
                if state not in "ZX":
                    pid = int(entry.name)
                    found[pid] = Process(pid, int(parent), head.partition("(")[2])
    return found


def members(folder: Path) -> dict[str, list[Process]]:
    """Member → its processes, the one from which the others descend at the front. Jobs are not among them."""
    ending = f"@{folder}".encode()
    prefix = f"{MARK}=".encode()
    everything = processes()
    found: dict[str, list[Process]] = {}
    for pid, process in everything.items():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if line.startswith(prefix) and line.endswith(ending):
                    name = line[len(prefix) : -len(ending)].decode()
                    found.setdefault(name, []).append(process)
    for group in found.values():
        pids = {process.pid for process in group}
        group.sort(key=lambda process: process.parent in pids)
    return found


def end(folder: Path, member: str | None = None, *, seconds: float = 15) -> int:
    """Kills a member, or all, with everything that descends from it. Returns how many processes that were.

    The first process of a member goes last: orphans of its jobs are handed to it, so that it leads to all of them.
    """
    spared = {os.getpid(), os.getppid()}
    ended: set[int] = set()
    deadline = time.monotonic() + seconds
    while True:
        groups = members(folder)
        marked = {p.pid for name, group in groups.items() if member in (None, name) for p in group} - spared
        if not marked:
            return len(ended)
        everything = processes()
        family = set(marked)
        while more := {p.pid for p in everything.values() if p.parent in family} - family - spared:
            family |= more
        roots = {pid for pid in marked if pid in everything and everything[pid].parent not in family}
        for pid in family - roots or roots:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended |= family
        if time.monotonic() > deadline:
            raise ClusterError(
                f"processes {sorted(marked)} of the cluster in {folder} do not die; look at them by hand"
            )
        time.sleep(0.01)


def wait_for(condition: Callable[[], bool], seconds: float, *, pause: float = 0.05) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
