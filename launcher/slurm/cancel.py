"""`trimtab cancel`: a run ends in order, saved, and no job of it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from launcher.run_directory import write_atomically
from launcher.slurm import scheduler
from launcher.slurm.history import read_jobs
from launcher.slurm.submission import Submission, read_submission
from trainer.config.files import RunFiles
from trainer.errors import LaunchError

FILE_NAME = "cancel.json"


def cancel(root: Path, *, at_once: bool, say: Callable[[str], None]) -> None:
    """End the jobs of the run in `root`: what runs saves first, unless `at_once`; what waits is removed.

    Raises:
        LaunchError: the run was never submitted, or no job of it is left.
        SchedulerError: the scheduler does not do it.
    """
    submission = read_submission(root)
    if submission is None:
        raise LaunchError(f"{root} was never submitted; a run on this machine ends with Ctrl-C or kill -TERM")
    files = RunFiles(root)
    ids = {submission.job, *(job.job for job in read_jobs(files) if job.submitted >= submission.submitted)} - {""}
    states = scheduler.jobs(ids)
    alive = {job: state for job, state in states.items() if scheduler.is_alive(state.state)}
    if not alive:
        raise LaunchError(f"no job of {root} is waiting or running; `trimtab status` shows how it ended")
    # before the signal: the job looks for it when its ranks have ended
    write_atomically(root / FILE_NAME, json.dumps({"time": time.time()}) + "\n")
    for job, state in sorted(alive.items()):
        if state.state == "RUNNING" and not at_once:
            scheduler.signal(job, "USR1", batch=True)
            say(f"job {job}: asked to finish its step, save and end")
        else:
            scheduler.cancel([job])
            say(f"job {job}: cancelled")


def was_cancelled(files: RunFiles, submission: Submission) -> bool:
    """Whether the user has ended this submission."""
    try:
        when = float(json.loads((files.root / FILE_NAME).read_bytes())["time"])
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return when >= submission.submitted
