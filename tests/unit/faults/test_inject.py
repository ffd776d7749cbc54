"""Faults of the hardware: when each strikes, on which rank, and which bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from trainer.config.files import RunFiles
from trainer.errors import ConfigError
from trainer.faults import Fault, all_of, at, parse_fault
from trainer.faults.inject import FaultInjector, flip_one

STEPS = [1, 2, 3, 3, 4, 5, 2, 3, 4, 5, 6]
"""Step of each attempt: step 3 is replayed; after the first 5 comes a rollback to 1."""


def gradients(fault: Fault, rank: int, steps: list[int] = STEPS) -> list[float]:
    """What becomes of a gradient of 1 in each attempt."""
    injector = FaultInjector([fault], rank, 2)
    found = []
    for attempt, step in enumerate(steps):
        injector.begin(attempt, step, step - 1)
        first, second = (injector.local_gradient(index, torch.ones(3)) for index in range(2))
        assert torch.equal(first.nan_to_num(7), second.nan_to_num(7)), "the same fault in all parameters"
        found.append(first[0].item())
    return found


def attempts(values: list[float]) -> list[int]:
    return [index for index, value in enumerate(values) if value != 1]


@pytest.mark.parametrize(
    ("sentence", "rank", "struck"),
    [
        ("at(step=3).gradient_times(5)", 0, [2]),
        ("at(step=3).gradient_times(5)", 1, []),
        ("at(step=3, rank=1).gradient_times(5)", 1, [2]),
        ("at(step=3).gradient_times(5).every_time()", 0, [2, 3, 7]),
        ("at(step=3, visit=2).gradient_times(5)", 0, [3]),
        ("at(step=4, visit=2).gradient_times(5)", 0, [8]),
        ("at(step=4, visit=2).gradient_times(5).every_time()", 0, [8]),
        ("at(step=9).gradient_times(5)", 0, []),
        ("at(batch=2).data_is_nan()", 0, [2, 3, 7]),
        ("at(batch=2).data_is_nan()", 1, [2, 3, 7]),
        ("all_of(at(step=2).gradient_times(5), at(step=5).gradient_is_nan())", 0, [1, 5]),
    ],
)
def test_when_and_where_it_strikes(sentence: str, rank: int, struck: list[int]) -> None:
    assert attempts(gradients(parse_fault(sentence), rank)) == struck


def test_what_becomes_of_the_gradient() -> None:
    assert gradients(at(step=3).gradient_times(1000), 0)[2] == 1000
    assert math.isnan(gradients(at(step=3).gradient_is_nan(), 0)[2])
    twice = all_of(at(step=3).gradient_times(10), at(step=3).gradient_times(10))
    assert gradients(twice, 0)[2] == 100


def rates(fault: Fault, steps: list[int]) -> list[float]:
    injector = FaultInjector([fault], 1, 2)
    found = []
    for attempt, step in enumerate(steps):
        injector.begin(attempt, step, attempt)
        found.append(injector.learning_rate(1.0))
    return found


def test_a_window_of_the_learning_rate_is_over_after_a_rollback() -> None:
    fault = at(step=3).learning_rate_times(30, steps=3)
    assert rates(fault, [1, 2, 3, 4, 5, 6, 7]) == [1, 1, 30, 30, 30, 1, 1]
    assert rates(fault, [1, 2, 3, 4, 2, 3, 4, 5, 6]) == [1, 1, 30, 30, 1, 1, 1, 1, 1]
    assert rates(fault.every_time(), [2, 3, 4, 2, 3, 4, 5, 6]) == [1, 30, 30, 1, 30, 30, 30, 1]


def test_a_disagreement_is_of_one_rank() -> None:
    for rank, changes in ((0, False), (1, True)):
        injector = FaultInjector([at(step=3, rank=1).disagree()], rank, 2)
        for attempt, step in enumerate([2, 3, 4]):
            injector.begin(attempt, step, attempt)
            assert (injector.digest(5) != 5) == (changes and step == 3)


def test_the_first_snapshot_from_a_step_on_is_corrupted_once() -> None:
    injector = FaultInjector([at(step=5).corrupt_snapshot()], 0, 1)
    changed = []
    for step in (3, 6, 9, 6):
        tensors = {"a": torch.full((4,), 0.5), "b": torch.full((4,), 0.25)}
        injector.snapshot(step, tensors)
        changed.append(int((tensors["a"] != 0.5).sum() + (tensors["b"] != 0.25).sum()))
    assert changed == [0, 1, 0, 0]


def test_it_says_what_it_did() -> None:
    injector = FaultInjector([at(step=2).gradient_is_nan(), at(step=3, rank=1).disagree()], 0, 2)
    for attempt, step in enumerate([1, 2, 3]):
        injector.begin(attempt, step, attempt)
        for index in range(3):
            injector.local_gradient(index, torch.ones(1))
        injector.digest(0)
    assert injector.struck == [(1, "at(step=2, rank=0).gradient_is_nan()")]


def test_a_fault_may_be_of_one_start_of_the_run() -> None:
    for start, factor in ((1, 1.0), (2, 7.0)):
        injector = FaultInjector([at(step=3, start=2).gradient_times(7)], 0, 2, start=start)
        injector.begin(0, 3, 2)
        assert injector.local_gradient(0, torch.ones(1)).item() == factor


def test_a_thread_dies_on_the_rank_that_is_named(tmp_path: Path) -> None:
    for rank, start, dies in ((0, 1, False), (1, 1, True), (1, 2, False)):
        injector = FaultInjector(
            [at(step=3, rank=1).data_worker_dies()], rank, 2, start=start, files=RunFiles(tmp_path)
        )
        injector.begin(0, 3, 2)
        injector.moment("begin", tmp_path)
        if dies:
            with pytest.raises(RuntimeError, match="data_worker_dies"):
                injector.reading(5)
        else:
            injector.reading(5)


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranks are 0 to 1"):
        FaultInjector([at(step=2, rank=2).gradient_is_nan()], 0, 2)


@pytest.mark.parametrize(
    ("dtype", "times"), [(torch.float32, 2.0**128), (torch.bfloat16, 2.0**128), (torch.float16, 2.0**16)]
)
def test_the_flipped_bit_is_the_top_of_the_exponent(dtype: torch.dtype, times: float) -> None:
    before = [
        torch.tensor([1.0, 0.0, math.inf, 3.0], dtype=dtype),
        torch.tensor([[1.0, 0.0], [0.01, 2.0]], dtype=dtype),
    ]
    after = [tensor.clone() for tensor in before]
    assert flip_one(after, seed=1) == (1, 2), "the only element of ordinary size"
    assert torch.equal(after[0], before[0])
    assert after[1][1, 0].double() / before[1][1, 0].double() == times
    assert flip_one(after, seed=1) == (-1, -1), "none is left"


def test_the_lowest_bit_is_hardly_seen() -> None:
    tensors = [torch.full((5,), 0.3)]
    _, element = flip_one(tensors, seed=3, lowest=True)
    different = tensors[0] != 0.3
    assert different.nonzero().flatten().tolist() == [element]
    assert tensors[0][element].item() == pytest.approx(0.3, rel=1e-6)


def test_which_element_depends_on_the_seed_alone() -> None:
    places = []
    for seed in (1, 1, 2, 3, 4):
        tensors = [torch.full((100,), 0.3), torch.full((100,), 0.3)]
        places.append(flip_one(tensors, seed))
    assert places[0] == places[1]
    assert len(set(places)) == 4
