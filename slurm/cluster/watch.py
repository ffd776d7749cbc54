"""Waits for the end of a process, then takes the cluster down: watch.py PID DIR."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

pid, folder = int(sys.argv[1]), sys.argv[2]
try:
    ended = select.poll()
    ended.register(os.pidfd_open(pid), select.POLLIN)
    ended.poll()
except ProcessLookupError:
    pass  # it has ended already
down = str(Path(__file__).with_name("down"))
os.execv(down, [down, "--state", folder])  # noqa: S606 (a list, no shell)
