"""What comes after a job of a run: the next link of a chain, and the stages that wait for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.slurm import pipeline as pipelines
from launcher.slurm import scheduler
from launcher.slurm.script import sbatch_arguments
from launcher.slurm.submission import Submission, write_submission
from trainer.errors import TrimtabError

Say = Callable[[str], None]


def chain(submission: Submission, job: str, say: Say) -> str:
    """Submit the job that goes on when `job` has ended, however that was; its id.

    At the beginning of `job`, not at its end: a node that is lost submits nothing any more.
    """
    arguments = [*sbatch_arguments([submission]), f"--dependency=afterany:{job}"]
    _, of_array, index = submission.job.partition("_")
    if of_array:
        arguments.append(f"--array={index}")
    successor = scheduler.submit(Path(submission.script), arguments) + of_array + index
    write_submission(submission.model_copy(update={"job": successor}))
    say(f"job {successor} goes on when job {job} has ended")
    return successor


def hand_over(job: str, successor: str, say: Say) -> None:
    """What waits for `job` to end well waits for `successor` instead."""
    for waiting, state in scheduler.waiting_for(job).items():
        if waiting != successor:
            scheduler.redirect(state, job, successor)
            say(f"job {waiting} now waits for job {successor}")


def end_chain(submission: Submission, job: str, successor: str) -> None:
    """The run does not go on after `job`: the next link is not needed."""
    scheduler.cancel([successor])
    write_submission(submission.model_copy(update={"job": job}))


def cancel_after(root: Path, why: str, say: Say) -> None:
    """Stages of a pipeline that wait for this run are cancelled, and told why."""
    try:
        for stage in pipelines.cancel_after(root, why, scheduler.cancel):
            say(f"{stage} is cancelled: it comes after this run")
    except TrimtabError as error:
        say(str(error))
