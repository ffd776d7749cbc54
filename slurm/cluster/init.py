"""The first process of a member: prepares its machine, starts its daemon, and stays to collect orphans.

It says that it is there and waits for its order, one line of JSON; if the process that started it dies before, so does
it. SIGUSR1 starts the daemon again where that has ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def furnish(hostname: str, folder: str, network: str) -> None:
    """Own name, own table of hosts, own /dev/shm, own network: visible in these namespaces only."""
    Path("/proc/sys/kernel/hostname").write_text(hostname)
    for name in ("hosts", "nsswitch.conf"):
        if Path("/etc", name).exists():
            subprocess.run(["mount", "--bind", f"{folder}/{name}", f"/etc/{name}"], check=True)  # noqa: S603, S607
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"], check=True)  # noqa: S607, S108
    subprocess.run(["ip", "-batch", "-"], input=network, text=True, check=True)  # noqa: S607


def keep(argv: list[str]) -> None:
    """Starts the daemon, now and whenever asked to, and collects every process that is handed to this one."""
    awaited = {signal.SIGCHLD, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    daemon, wanted = 0, True
    while True:
        if wanted and not daemon:
            daemon = os.posix_spawn(argv[0], argv, os.environ, setsid=True, setsigmask=())
        wanted = signal.sigwait(awaited) == signal.SIGUSR1
        while pid := collected():
            if pid == daemon:
                daemon = 0


def collected() -> int:
    """The process id of a child that has ended; 0 where there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def main() -> None:
    print("ready", flush=True)
    line = sys.stdin.readline()
    if not line:
        sys.exit("what started this has died")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for target, source in enumerate((nowhere, 2)):
        os.dup2(source, target)
    order = json.loads(line)
    if order["apart"]:
        furnish(order["name"], order["folder"], order["network"])
    else:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keep(order["daemon"])


if __name__ == "__main__":
    main()
