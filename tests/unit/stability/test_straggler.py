import gzip
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainer.records import FloatArray
from trainer.stability.straggler import (
    AGAIN,
    FACTOR,
    SLOW_STEPS,
    WARM_UP,
    WINDOW,
    Straggler,
    Stragglers,
    median_of_others,
    sentence,
)

RECORDED = Path(__file__).parent / "rank_seconds.json.gz"
"""Run name → seconds of each rank in each attempt: runs without a fault, 2 and 4 ranks of one thread, on a machine
of two cores on which ten other processes computed at the time."""


def watched(stragglers: Stragglers, steps: Iterable[Iterable[float]]) -> list[tuple[int, Straggler]]:
    """(which step, from 1; what was said)."""
    return [
        (number, said)
        for number, seconds in enumerate(steps, 1)
        for said in stragglers.observe(np.array(list(seconds), dtype=float))
    ]


def steps(number: int, *, ranks: int = 4, slow: dict[int, float] | None = None) -> list[list[float]]:
    """All ranks take a second, but those of `slow`."""
    return [[(slow or {}).get(rank, 1.0) for rank in range(ranks)]] * number


def test_a_slow_rank_is_named_once_it_was_slow_in_16_of_20_steps() -> None:
    said = watched(Stragglers(4, lasting=0.0), steps(100, slow={2: 1.5}))
    assert said == [(WARM_UP + SLOW_STEPS, Straggler(2, False, SLOW_STEPS, SLOW_STEPS, 1.5, 0.5))]


def test_it_must_have_gone_on_for_some_seconds() -> None:
    # beyond 5 slow steps they add up: 14 of 1.5 s are the first to reach 20
    said = watched(Stragglers(4), steps(100, slow={2: 1.5}))
    assert [number for number, _ in said] == [WARM_UP + 5 + 14]
    # of 50 ms, 400
    said = watched(Stragglers(4), [[0.02, 0.02, 0.05, 0.02]] * 1000)
    assert [number for number, _ in said] == [WARM_UP + 5 + 400]


def test_it_is_said_again_after_long_and_when_it_recovers_and_relapses() -> None:
    stragglers = Stragglers(4, lasting=0.0)
    said = watched(stragglers, steps(WARM_UP + SLOW_STEPS + 2 * AGAIN, slow={1: 2.0}))
    assert [number - WARM_UP - SLOW_STEPS for number, _ in said] == [0, AGAIN, 2 * AGAIN]
    assert stragglers.slow == (1,)
    said = watched(stragglers, steps(50))
    # 15 clean steps leave 5 slow ones in the window
    assert said == [(15, Straggler(1, True, 5, WINDOW, 1.0, 0.0))]
    assert stragglers.slow == ()
    said = watched(stragglers, steps(50, slow={1: 2.0}))
    assert [(number, item.rank, item.recovered) for number, item in said] == [(SLOW_STEPS, 1, False)]


def test_two_ranks_are_compared_with_each_other() -> None:
    said = watched(Stragglers(2), steps(60, ranks=2, slow={0: 1.4}))
    assert [(item.rank, item.ratio) for _, item in said] == [(0, pytest.approx(1.4))]


def test_several_ranks_can_be_slow() -> None:
    said = watched(Stragglers(8), steps(60, ranks=8, slow={1: 2.0, 6: 3.0}))
    assert {(item.rank, item.ratio) for _, item in said} == {(1, 2.0), (6, 3.0)}


def test_what_another_rank_lasted_does_not_count() -> None:
    """Rank 2 had hiccups for long, beside a slow rank 1, before it became slow itself."""
    stragglers = Stragglers(6, lasting=60.0)
    hiccups = [[1.0, 2.0, 2.0 if step % 6 == 0 else 1.0, 1.0, 1.0, 1.0] for step in range(300)]
    assert {item.rank for _, item in watched(stragglers, hiccups)} == {1}
    ((number, item),) = watched(stragglers, steps(100, ranks=6, slow={1: 2.0, 2: 2.0}))
    # 30 steps of 2 s, from the one on in which more than 5 of 20 were slow: hiccups make 3 of them
    assert (item.rank, number) == (2, 33)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_slows_all_is_no_straggler(ranks: int) -> None:
    both = [[1.0 + step % 7] * ranks for step in range(300)]
    assert watched(Stragglers(ranks, lasting=0.0), both) == []


def test_hiccups_are_none() -> None:
    """Every third step, and a whole dozen in a row: checkpoints, collections of garbage."""
    third = [[1.0, 9.0 if step % 3 == 0 else 1.0, 1.0] for step in range(300)]
    assert watched(Stragglers(3, lasting=0.0), third) == []
    dozen = [*steps(100, ranks=3), *steps(12, ranks=3, slow={1: 30.0}), *steps(100, ranks=3)]
    assert watched(Stragglers(3, lasting=0.0), dozen) == []


def test_the_first_steps_do_not_count() -> None:
    assert watched(Stragglers(2, lasting=0.0), steps(WARM_UP + SLOW_STEPS - 1, ranks=2, slow={0: 60.0})) == []


def test_tiny_differences_are_none() -> None:
    assert watched(Stragglers(2, lasting=0.0), [[0.001, 0.015]] * 100) == []


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0])
def test_what_was_not_measured_says_nothing(value: float) -> None:
    assert watched(Stragglers(3, lasting=0.0), [[value] * 3] * 100) == []
    assert watched(Stragglers(2, lasting=0.0), [[value, 1.0]] * 100) == []
    # of others it does
    said = watched(Stragglers(3, lasting=0.0), [[value, 2.0, 1.0]] * 100)
    assert [item.rank for _, item in said] == [1]


def test_where_ranks_are_not_known_nothing_is_said() -> None:
    assert watched(Stragglers(1, lasting=0.0), [[1.0]] * 50) == []
    assert watched(Stragglers(4, lasting=0.0), [[]] * 50) == []


@pytest.mark.parametrize(
    "options", [{"slow_steps": 0}, {"slow_steps": 21}, {"factor": 0.9}, {"seconds": -1.0}, {"lasting": -1.0}]
)
def test_what_is_no_rule_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not a rule"):
        Stragglers(2, **options)  # type: ignore[arg-type]


VALUES = st.floats(1e-3, 1e3) | st.just(math.nan)


@given(arrays.arrays(np.float64, st.integers(1, 12), elements=VALUES))
def test_the_median_of_the_others_is_that(values: FloatArray) -> None:
    found = median_of_others(values)
    for index, value in enumerate(values):
        others = np.delete(values, index)
        others = others[~np.isnan(others)]
        expected = np.median(others) if others.size and not np.isnan(value) else np.nan
        np.testing.assert_equal(found[index], expected)


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_ranks_that_are_as_quick_as_each_other_are_never_named(ranks: int, seed: int) -> None:
    """Whatever the steps take: no rank takes 1.3 times as long as another."""
    random = np.random.default_rng(seed)
    lengths = random.uniform(0.1, 100.0, (80, 1)) * random.uniform(1.0, FACTOR, (80, ranks))
    assert watched(Stragglers(ranks, lasting=0.0), lengths) == []


@given(st.integers(3, 6), st.integers(0, 2**32 - 1), st.data())
def test_a_rank_that_is_always_slower_is_always_found(ranks: int, seed: int, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, ranks - 1))
    lengths = np.random.default_rng(seed).uniform(1.0, 1.25, (60, ranks))
    lengths[:, slow] *= FACTOR * 1.3
    said = watched(Stragglers(ranks), lengths)
    assert [(item.rank, item.recovered) for _, item in said] == [(slow, False)]
    assert said[0][1].ratio > FACTOR


RUNS: dict[str, list[list[float]]] = json.loads(gzip.decompress(RECORDED.read_bytes()))


@pytest.mark.parametrize("name", RUNS)
def test_real_runs_on_a_machine_that_was_overloaded_name_nobody(name: str) -> None:
    assert watched(Stragglers(len(RUNS[name][0])), RUNS[name]) == []


@pytest.mark.parametrize("name", RUNS)
def test_in_the_same_runs_a_rank_of_half_the_speed_is_found(name: str) -> None:
    """Repeated until it lasted: some of these runs are over within seconds."""
    lengths = np.array(RUNS[name][1:] * 4)
    lengths[:, 0] = 2 * lengths[:, 0] + 0.02
    said = watched(Stragglers(lengths.shape[1]), lengths)
    assert said
    assert {item.rank for _, item in said} == {0}


def test_sentences_name_rank_and_node() -> None:
    slow = Straggler(1, False, 17, 20, 1.544, 0.123)
    assert sentence(slow, ["node1", "node2"]) == (
        "rank 1 on node2 is slow: in 17 of the last 20 steps it computed clearly longer than the others, 1.54 times as "
        "long as they do; all wait for it, 0.12 s a step"
    )
    assert sentence(Straggler(1, True, 5, 20, 1.0, 0.0), []) == (
        "rank 1 keeps up with the others again (computes 1.00 times as long as they do)"
    )
