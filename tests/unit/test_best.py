"""Which evaluation is the best, and when it is time to stop."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.best import Best

VALUES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, math.inf]), max_size=12)


@pytest.mark.parametrize(("score", "best"), [("loss", 20), ("ece", 20), ("accuracy", 30), ("f1_macro", 30)])
def test_errors_are_better_when_smaller(score: str, best: int) -> None:
    tracker = Best(score)
    for step, value in ((10, 0.5), (20, 0.1), (30, 0.9)):
        tracker.take(step, value)
    assert tracker.best is not None
    assert tracker.best.step == best


def test_patience() -> None:
    tracker = Best("accuracy", 2)
    taken = []
    for step, value in enumerate([0.5, 0.6, 0.6, 0.55]):
        assert not tracker.spent
        taken.append(tracker.take(step, value))
    # an equal one is not better, and of equal ones the first stays
    assert taken == [True, True, False, False]
    assert tracker.best == (1, 0.6)
    assert (tracker.waited, tracker.spent) == (2, True)
    assert str(tracker) == "accuracy 0.6000 at step 1"


@given(VALUES, st.sampled_from(["loss", "accuracy"]), st.integers(1, 4))
def test_as_defined(values: list[float], score: str, patience: int) -> None:
    tracker = Best(score, patience)
    record, since = None, 0
    for step, value in enumerate(values):
        sign = -1 if score == "loss" else 1
        better = not math.isnan(value) and (record is None or sign * value > sign * record)
        record, since = (value, 0) if better else (record, since + 1)
        assert tracker.take(step, value) == better
        assert (tracker.waited, tracker.spent) == (since, since >= patience)
        assert (tracker.best and tracker.best.value) == record
        # an evaluation that is made again is the same one
        assert not tracker.take(step, 1e9)


@given(VALUES, st.integers(0, 12))
def test_what_was_rolled_back_never_was(values: list[float], kept: int) -> None:
    tracker, expected = Best("accuracy", 3), Best("accuracy", 3)
    for step, value in enumerate(values, 1):
        tracker.take(10 * step, value)
        if step <= kept:
            expected.take(10 * step, value)
    tracker.went_back(10 * kept + 5)
    assert tracker.best == expected.best
    assert (tracker.newest, tracker.waited, tracker.spent) == (expected.newest, expected.waited, expected.spent)


@given(VALUES, VALUES)
def test_a_resumed_run_decides_alike(before: list[float], after: list[float]) -> None:
    tracker, resumed = Best("loss", 3), Best("loss", 3)
    for step, value in enumerate(before):
        tracker.take(step, value)
    assert resumed.restore(json.loads(json.dumps(tracker.to_json(), allow_nan=False)))
    for step, value in enumerate(after, len(before)):
        assert resumed.take(step, value) == tracker.take(step, value)
    assert (resumed.best, resumed.waited, resumed.spent) == (tracker.best, tracker.waited, tracker.spent)


def test_another_score_begins_anew() -> None:
    tracker = Best("loss")
    tracker.take(10, 0.5)
    assert not Best("accuracy").restore(tracker.to_json())
    assert not Best("accuracy").restore(None)
    off = Best(None, 1)
    assert not off.restore(tracker.to_json())
    assert not off.take(10, 0.5)
    assert (off.best, off.spent, off.lacks(10, 10)) == (None, False, False)


def test_what_a_stop_has_left_out_is_lacking() -> None:
    tracker = Best("loss")
    assert [step for step in range(25) if tracker.lacks(step, 10)] == [10, 20]
    tracker.take(10, 0.5)
    assert [step for step in range(25) if tracker.lacks(step, 10)] == [20]
    assert not tracker.lacks(20, None)
