"""How one start of a run in a job ended, from what it left behind."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from launcher.local import Ended
from launcher.run_directory import read_outcome, write_atomically
from launcher.supervision import position
from trainer import starts
from trainer.checkpoint.manifest import name_of
from trainer.config.files import RunFiles
from trainer.errors import ExitCode, RunDirectoryError
from trainer.exclusive import read


@dataclass(frozen=True, slots=True)
class Ending:
    """Of one start."""

    reason: str
    """As in its outcome, or `signal` where it was asked to stop before it had one."""
    message: str
    exit_code: int


def ending_of(files: RunFiles, ended: Ended, by: str, newest_before: int) -> Ending:
    """Of the start that has just ended.

    Args:
        by: `TRIMTAB_STARTED_BY` of its ranks.
        newest_before: number of the newest start of the run before it.
    """
    newest = starts.newest(files)
    if newest > newest_before:
        about = read(files.root / starts.FOLDER / f"{newest:04d}.json") or {}
        if about.get("by") != by:
            text = f"start {newest} of the run has taken over (process {about.get('pid')} on {about.get('host')})"
            return Ending("superseded", text, ExitCode.SUPERSEDED)
    outcome = read_outcome(files.root)
    if outcome is not None:
        return Ending(str(outcome["reason"]), str(outcome.get("message", "")), int(outcome["exit_code"]))
    if ended.stop_requested is not None:
        text = "the job was ended before the run could save" if newest > newest_before else "stopped before it began"
        return Ending("signal", text, ExitCode.STOPPED)
    return Ending("crashed", f"the ranks died without saying why (exit code {ended.exit_code})", ExitCode.CRASHED)


def note_outcome(files: RunFiles, reason: str, exit_code: int, message: str) -> None:
    """Write down how the run ended where the ranks could not, or where what they wrote is not all of it."""
    step = position(files)
    before: dict[str, Any] = read_outcome(files.root) or {
        "step": step,
        "checkpoint": f"checkpoints/{name_of(step)}" if step else None,
        "held_out_loss": None,
    }
    about = {"reason": reason, "exit_code": int(exit_code), "message": message, "start": starts.newest(files)}
    with contextlib.suppress(RunDirectoryError):
        write_atomically(files.outcome, json.dumps(before | about, indent=1, ensure_ascii=False))
