"""A job at work on a run: what its parts share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from launcher import local
from launcher.slurm import scheduler
from launcher.slurm.allocation import Allocation
from launcher.slurm.cancel import was_cancelled
from launcher.slurm.fitness import Fitness
from launcher.slurm.history import Job, read_jobs
from launcher.slurm.site import SiteConfig
from launcher.slurm.submission import Submission
from launcher.supervision import position
from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig
from trainer.errors import TrimtabError

CANCELLED = ("COMPLETING", "CANCELLED")
"""A job that scancel is ending."""


def say(text: str) -> None:
    """Into the log of the job."""
    print(f"trimtab: {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Work:
    """A job at work on a run."""

    files: RunFiles
    config: RunConfig
    submission: Submission
    allocation: Allocation
    command: Sequence[str]
    """srun and what it starts on every node."""
    requests: local.Requests
    began: float
    """Unix seconds from which the time of this start counts."""
    fitness: Fitness
    parts: dict[str, float] = field(default_factory=dict)
    """What came before the ranks → its seconds."""
    successor: str | None = None
    """The job that follows, where jobs are chained."""

    @property
    def site(self) -> SiteConfig:
        return self.submission.site

    def limit(self) -> float | None:
        """When the time of the job is up, in Unix seconds; None: there is no limit, or it is not known."""
        # the scheduler warns by itself too
        with contextlib.suppress(TrimtabError):
            return scheduler.end_time(self.allocation.job)
        return None

    def was_cancelled(self) -> bool:
        """Whether the user wants this run to end: by `trimtab cancel`, or by scancel."""
        if was_cancelled(self.files, self.submission):
            return True
        place = self.allocation
        state = None
        with contextlib.suppress(TrimtabError):
            state = scheduler.job(place.job) if self.requests.received is not None else None
        if state is None or state.restarts != place.restart:  # requeued, it counts one more
            return False
        # preempted, it runs until its grace is over
        return state.state in CANCELLED and "limit" not in state.reason.lower()

    def jobs(self) -> list[Job]:
        """Those of this submission."""
        return [job for job in read_jobs(self.files) if job.submitted >= self.submission.submitted]

    def record(self) -> Job:
        """Of a start that begins now."""
        place = self.allocation
        return Job(
            job=place.job,
            restart=place.restart,
            began=self.began,
            nodes=place.nodes,
            position=position(self.files),
            submitted=self.submission.submitted,
        )
