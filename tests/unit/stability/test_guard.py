"""Verdicts from numbers alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.schema import GuardConfig
from trainer.records import Halt, Skip, Step, StepStats
from trainer.stability.guard import Guard

NAMES = ("embedding", "head")


def make_stats(**changes: Any) -> StepStats:
    values: dict[str, Any] = {
        "attempt": 5,
        "batch_index": 9,
        "step": 5,
        "loss": 2.0,
        "parts": {},
        "num_targets": 100,
        "grad_norm": 1.0,
        "num_nonfinite": 0,
        "parameter_norms": np.ones(2),
    }
    return StepStats(**values | changes)


def make_guard(max_skips: int = 2) -> Guard:
    return Guard(GuardConfig(max_consecutive_skips=max_skips), clip=1.0, parameter_names=NAMES)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_every_finite_gradient_is_applied(loss: float, norm: float) -> None:
    assert make_guard().judge(make_stats(loss=loss, grad_norm=norm)) == Step(1.0)


def test_a_nonfinite_gradient_is_skipped_and_the_parameter_named() -> None:
    bad = make_stats(grad_norm=math.nan, num_nonfinite=3, parameter_norms=np.array([1.0, math.nan]))
    verdict = make_guard().judge(bad)
    assert isinstance(verdict, Skip)
    assert "3 gradient elements are not finite (in head)" in verdict.reason


def test_a_nonfinite_loss_is_skipped_although_the_gradient_is_finite() -> None:
    verdict = make_guard().judge(make_stats(loss=math.inf))
    assert isinstance(verdict, Skip)
    assert "the loss is inf" in verdict.reason


def test_skips_in_a_row_end_in_a_halt_and_one_good_step_starts_the_count_anew() -> None:
    guard = make_guard(max_skips=2)
    bad = make_stats(grad_norm=math.inf)
    assert [type(guard.judge(bad)) for _ in range(2)] == [Skip, Skip]
    guard.judge(make_stats())
    assert [type(guard.judge(bad)) for _ in range(3)] == [Skip, Skip, Halt]


def test_the_count_survives_a_checkpoint() -> None:
    guard, later = make_guard(max_skips=1), make_guard(max_skips=1)
    guard.judge(make_stats(grad_norm=math.nan))
    later.restore(guard.consecutive_skips)
    assert isinstance(later.judge(make_stats(grad_norm=math.nan)), Halt)


def test_an_fp16_overflow_is_left_to_the_loss_scaler_for_a_while() -> None:
    guard = make_guard(max_skips=0)
    overflow = make_stats(grad_norm=math.inf, loss_scale=65536.0)
    verdicts = [type(guard.judge(overflow)) for _ in range(33)]
    assert verdicts == [Step] * 32 + [Halt]


def test_ranks_that_disagree_halt() -> None:
    verdict = make_guard().judge(make_stats(agree=False))
    assert isinstance(verdict, Halt)
    assert "attempt 4" in verdict.reason
