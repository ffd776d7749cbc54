"""A live view of a run from its ledger. It only reads: the run knows nothing of it."""

from __future__ import annotations

import threading
from pathlib import Path

from rich.console import Console
from rich.live import Live

from launcher.run_directory import read_outcome
from launcher.status import is_locked
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.telemetry.console import RunView
from trainer.telemetry.ledger import follow, read_ledger


def watch_run(root: Path, console: Console, *, once: bool = False) -> None:
    """Show the run until it ends or Ctrl-C. With `once`, without a terminal, and for an ended run: where it stands.

    Raises:
        RunDirectoryError: `root` is no run, or with `once` one that has not started.
    """
    files = RunFiles(root)
    if not files.config.is_file():
        raise RunDirectoryError(f"{root} is not a run directory: it holds no config.yaml")
    view = RunView()
    ended = read_outcome(root) is not None and not is_locked(root)
    if once or ended or not console.is_terminal:
        for record in read_ledger(files.ledger):
            view.update(record)
        console.print(view)
        return
    leave = threading.Event()
    try:
        with Live(view, console=console, refresh_per_second=4):
            for record in follow(files.ledger, leave):
                view.update(record)
                # the ledger of a resumed run holds the ends of its earlier starts too
                if record["kind"] == "outcome":
                    leave.set()
                elif record["kind"] == "start":
                    leave.clear()
    except KeyboardInterrupt:
        console.print("left; the run goes on by itself")
