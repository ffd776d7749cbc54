"""Whether and when a run is started again: properties of the decision."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.relaunch import MAX_BACKOFF_SECONDS, Ending, Leave, Relaunch, backoff, decide
from trainer.config.schema import SupervisionConfig

CONFIG = SupervisionConfig(restarts=3, backoff_seconds=5.0)

positions = st.integers(0, 50)
crashes = st.lists(st.builds(Ending, st.just("crashed"), positions), min_size=1, max_size=30)


@given(began_at=positions, restarts=st.integers(1, 6), position=positions)
def test_without_progress_there_are_so_many_restarts_and_no_more(began_at: int, restarts: int, position: int) -> None:
    config = SupervisionConfig(restarts=restarts, backoff_seconds=1.0)
    stuck = Ending("crashed", min(position, began_at))
    decisions = [decide(began_at, [stuck] * count, config) for count in range(1, restarts + 2)]
    assert decisions[:-1] == [Relaunch(2.0**index, index + 1) for index in range(restarts)]
    assert decisions[-1] == Leave(
        f"gave up: {restarts + 1} starts in a row brought no new checkpoint (supervision.restarts={restarts})"
    )


@given(began_at=positions, endings=crashes, further=st.integers(1, 50))
def test_after_progress_it_is_started_at_once(began_at: int, endings: list[Ending], further: int) -> None:
    """However bad the history was, and whether or not it would have been left there."""
    best = max([began_at, *(ending.position for ending in endings)])
    assert decide(began_at, [*endings, Ending("crashed", best + further)], CONFIG) == Relaunch(0.0, 0)


@given(began_at=positions, endings=crashes)
def test_going_to_and_fro_is_no_progress(began_at: int, endings: list[Ending]) -> None:
    """Checkpoints that a rollback took back and that are written again do not let a run crash for ever."""
    best = max([began_at, *(ending.position for ending in endings)])
    to_and_fro = [Ending("crashed", best - index % 2) for index in range(CONFIG.restarts + 1)]
    assert isinstance(decide(began_at, [*endings, *to_and_fro], CONFIG), Leave)


@given(
    began_at=positions,
    endings=crashes,
    reason=st.sampled_from(["completed", "stopped", "halted", "refused", "superseded"]),
    position=positions,
)
def test_what_another_start_would_not_change_is_left(
    began_at: int, endings: list[Ending], reason: str, position: int
) -> None:
    assert decide(began_at, [*endings, Ending(reason, position)], CONFIG) == Leave()


@given(began_at=positions, endings=crashes)
def test_a_run_that_was_asked_to_stop_is_left_however_it_ended(began_at: int, endings: list[Ending]) -> None:
    last = replace(endings[-1], stop_requested=True, position=100)
    assert decide(began_at, [*endings[:-1], last], CONFIG) == Leave()


@pytest.mark.parametrize("position", [0, 7])
def test_no_restarts_means_none_after_progress_either(position: int) -> None:
    assert decide(0, [Ending("crashed", position)], SupervisionConfig(restarts=0)) == Leave()


@given(fruitless=st.integers(0, 100_000), first=st.floats(1e-3, 1e6))
def test_the_wait_doubles_up_to_five_minutes(fruitless: int, first: float) -> None:
    wait = backoff(fruitless, first)
    assert 0 <= wait <= MAX_BACKOFF_SECONDS == 300
    assert wait == (0 if fruitless == 0 else min(300, first if fruitless == 1 else 2 * backoff(fruitless - 1, first)))
