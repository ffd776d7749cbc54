"""When a run goes on after a start in a job, and when it has to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.slurm.history import Job
from launcher.slurm.requeue import End, GoOn, count_fruitless, decide, exhausted
from launcher.slurm.site import SiteConfig

FIRST = Job("7", 0, 1000.0, ("a", "b"), position=0, submitted=1.0)


def jobs(*reached: int, reason: str = "crashed", then: str = "requeue") -> list[Job]:
    """Starts of an hour each, which ended with these steps to go on from."""
    made, position = [], 0
    for number, step in enumerate(reached):
        began = 1000.0 + 3600 * number
        job = replace(FIRST, restart=number, began=began, position=position, ended=began + 3600, reached=step)
        made.append(replace(job, reason=reason, then=then))
        position = step
    return made


def decided(starts: Sequence[Job], site: SiteConfig | None = None, **facts: bool) -> GoOn | End:
    given = {"nodes_are_well": True, "restarts": True, "cancelled": False} | facts
    return decide(starts, 1e6, site or SiteConfig(), **given)


@pytest.mark.parametrize("reason", ["completed", "halted", "refused", "superseded"])
def test_what_another_start_would_not_change_ends(reason: str) -> None:
    assert decided(jobs(10, reason=reason)) == End()


@pytest.mark.parametrize("reason", ["stopped", "signal", "node"])
def test_what_the_cluster_ended_goes_on_in_another_job(reason: str) -> None:
    assert decided(jobs(10, reason=reason)) == GoOn("requeue", "")
    assert decided(jobs(10, reason=reason), SiteConfig(continue_by="chain")) == GoOn("chain", "")


def test_a_crash_goes_on_here_where_the_nodes_are_well() -> None:
    assert decided(jobs(10)) == GoOn("here", "")
    assert decided(jobs(10), nodes_are_well=False) == GoOn("requeue", "")
    assert decided(jobs(10), restarts=False) == End("supervision.restarts is 0")
    assert decided(jobs(10, reason="stopped"), restarts=False) == GoOn("requeue", "")


@pytest.mark.parametrize("reason", ["stopped", "signal", "node", "crashed"])
def test_what_the_user_cancelled_ends(reason: str) -> None:
    assert decided(jobs(10, reason=reason), cancelled=True) == End("cancelled by the user; submitting it again goes on")


def test_three_starts_without_progress_end_it() -> None:
    assert isinstance(decided(jobs(0, 0)), GoOn)
    why = "gave up: 3 starts in a row brought no new checkpoint (max_fruitless: 3)"
    assert decided(jobs(0, 0, 0)) == End(why)
    assert decided(jobs(0, 0, 10, 10, 10, 10)) == End(why)
    # each of them got on, even if little
    assert isinstance(decided(jobs(*range(1, 60))), GoOn)
    # it went back: a damaged checkpoint; nothing new came of it
    assert decided(jobs(20, 10, 10, 20)) == End(why)
    assert exhausted(jobs(0, 0, 0), 1e6, SiteConfig(max_fruitless=4)) is None


def test_number_and_hours_are_bounded() -> None:
    assert exhausted(jobs(1, 2, 3), 1e6, SiteConfig(max_jobs=3)) == "gave up: 3 jobs were used (max_jobs: 3)"
    assert exhausted(jobs(1, 2), 1e6, SiteConfig(max_jobs=3)) is None
    hours = "gave up: its jobs ran 3.0 hours together (max_hours: 3)"
    assert exhausted(jobs(1, 2, 3), 1e6, SiteConfig(max_hours=3)) == hours
    assert exhausted(jobs(1, 2), 1e6, SiteConfig(max_hours=3)) is None


def test_starts_in_one_allocation_are_one_job() -> None:
    here = [replace(job, restart=0) for job in jobs(1, 2, 3)]
    assert exhausted(here, 1e6, SiteConfig(max_jobs=2)) is None
    again = [*here[:-1], replace(here[-1], restart=1, then="here")]
    # the second job goes on in its allocation; a third one there will not be
    assert exhausted(again, 1e6, SiteConfig(max_jobs=2)) is None
    assert exhausted([*again[:-1], replace(again[-1], then="requeue")], 1e6, SiteConfig(max_jobs=2)) is not None


def test_a_job_that_runs_counts_up_to_now() -> None:
    running = [*jobs(1), replace(FIRST, restart=1, began=4600.0, position=1)]
    assert exhausted(running, 4600.0 + 1800, SiteConfig(max_hours=1.5)) is not None
    assert exhausted(running, 4600.0 + 1700, SiteConfig(max_hours=1.5)) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_fruitless_starts_are_those_since_the_last_progress(reached: list[int]) -> None:
    best, since = 0, 0
    for step in reached:
        since = 0 if step > best else since + 1
        best = max(best, step)
    assert count_fruitless(jobs(*reached)) == since
