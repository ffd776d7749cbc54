"""Whether a run goes on after a start in a job, and how. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.slurm.history import Job
from launcher.slurm.site import SiteConfig


@dataclass(frozen=True, slots=True)
class GoOn:
    """The run is to go on."""

    by: Literal["here", "requeue", "chain"]
    """here: in the same allocation."""
    why: str


@dataclass(frozen=True, slots=True)
class End:
    """It is not."""

    why: str = ""
    """Empty: the outcome says it."""


def decide(
    jobs: Sequence[Job],
    now: float,
    site: SiteConfig,
    *,
    nodes_are_well: bool,
    restarts: bool,
    cancelled: bool,
) -> GoOn | End:
    """What follows from the starts of this submission.

    Args:
        jobs: a record each, in order; the last one has just ended (`ended`, `reached` and `reason` are set).
        nodes_are_well: all nodes of the allocation answer, and nobody asked for its end.
        restarts: whether a run that crashed is to be started again at all.
        cancelled: the user asked it to end.
    """
    last = jobs[-1]
    if last.reason in ("completed", "halted", "refused", "superseded"):
        return End()
    if cancelled:
        return End("cancelled by the user; submitting it again goes on")
    if (spent := exhausted(jobs, now, site)) is not None:
        return End(spent)
    if last.reason == "crashed" and not restarts:
        return End("supervision.restarts is 0")
    if last.reason == "crashed" and nodes_are_well:
        return GoOn("here", last.why)
    return GoOn(site.continue_by, last.why)


def exhausted(jobs: Sequence[Job], now: float, site: SiteConfig) -> str | None:
    """Which bound the jobs of this submission have reached, in words; None: none.

    The last job may be about to begin: then it has no `reached`, and its position counts.
    """
    ended = [job for job in jobs if job.ended is not None]
    fruitless = count_fruitless(ended)
    if fruitless >= site.max_fruitless:
        return f"gave up: {fruitless} starts in a row brought no new checkpoint (max_fruitless: {site.max_fruitless})"
    used = len({(job.job, job.restart) for job in ended})
    if used >= site.max_jobs and ended[-1].then != "here":
        return f"gave up: {used} jobs were used (max_jobs: {site.max_jobs})"
    hours = sum((job.ended or now) - job.began for job in jobs) / 3600
    if site.max_hours is not None and hours >= site.max_hours:
        return f"gave up: its jobs ran {hours:.1f} hours together (max_hours: {site.max_hours:g})"
    return None


def count_fruitless(ended: Sequence[Job]) -> int:
    """How many of the last jobs in a row did not get the run on: the next can go on from no later step than any before
    could."""
    best, fruitless = (ended[0].position if ended else 0), 0
    for job in ended:
        reached = job.position if job.reached is None else job.reached
        fruitless = 0 if reached > best else fruitless + 1
        best = max(best, reached)
    return fruitless
