"""Which jobs the runs of a pipeline's stage have."""

from __future__ import annotations

from pathlib import Path

from launcher.pipelines.record import StageRecord
from launcher.slurm.submission import read_submission
from launcher.start import completed_before


def job_of_runs(stage: StageRecord) -> dict[Path, str]:
    """Run → id of its job, in an array `123_4`; of chained jobs the newest link. Empty: the stage has none."""
    found: dict[Path, str] = {}
    for index, run in enumerate(map(Path, stage.runs) if stage.job else ()):
        submission = read_submission(run)
        first = stage.job if len(stage.runs) == 1 else f"{stage.job}_{index}"
        found[run] = first if submission is None or not submission.job else submission.job
    return found


def current_jobs(stage: StageRecord) -> tuple[str, ...]:
    """Ids of the jobs whose good end is that of the stage: the array as a whole where it is one."""
    jobs = job_of_runs(stage)
    if list(jobs.values()) == [f"{stage.job}_{index}" for index in range(len(jobs))]:
        return (stage.job,) if jobs else ()
    return tuple(job for run, job in jobs.items() if completed_before(run) is None)
