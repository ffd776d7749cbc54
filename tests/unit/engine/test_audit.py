"""The bounds of AdamW's steps: never exceeded by any gradients, and not far above what gradients can do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.engine.audit import Adam, Limits, Updates, beyond, impossible_values, limits_of, update_bound

ADAM = Adam((0.9, 0.95), 1e-8, 0.1)


def largest_step(gradients: list[float], betas: tuple[float, float]) -> float:
    """Largest |m̂|/√v̂ that Adam takes on a sequence of gradients (its algorithm 1, ε left out)."""
    m = v = largest = 0.0
    for t, gradient in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        if v > 0:
            largest = max(largest, abs(m / (1 - betas[0] ** t)) / math.sqrt(v / (1 - betas[1] ** t)))
    return largest


BETAS = st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.5, 0.9), (0.95, 0.98)])
# squares of smaller ones underflow
GRADIENTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6)), min_size=1, max_size=80)


@given(gradients=GRADIENTS, betas=BETAS)
@settings(max_examples=300, deadline=None)
def test_no_gradients_exceed_the_bound(gradients: list[float], betas: tuple[float, float]) -> None:
    assert largest_step(gradients, betas) <= update_bound(betas, 1e-8) * (1 + 1e-9)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.98)])
def test_the_worst_gradients_come_close_to_the_bound(betas: tuple[float, float]) -> None:
    """Equality in Cauchy–Schwarz: gradients that grow by β₂/β₁ a step, after a long silence."""
    rising = [(betas[1] / betas[0]) ** i for i in range(200)]
    bound = update_bound(betas, 1e-8)
    assert largest_step([0.0] * 20_000 + rising, betas) == pytest.approx(bound, rel=1e-3)
    # one gradient after silence: Kingma and Ba, section 2.1
    sparse = largest_step([0.0] * 20_000 + [1.0], betas)
    assert sparse == pytest.approx((1 - betas[0]) / math.sqrt(1 - betas[1]), rel=1e-3)
    assert sparse < bound


@pytest.mark.parametrize(("betas", "eps"), [((0.95, 0.9), 1e-8), ((0.0, 0.0), 1e-8), ((0.9, 0.95), 1e-30)])
def test_where_nothing_bounds_an_update_none_is_claimed(betas: tuple[float, float], eps: float) -> None:
    assert update_bound(betas, eps) == math.inf
    updates = Updates()
    updates.add(1e-3, 1.0)
    assert limits_of("master", 2.0, updates, Adam(betas, eps, 0.1)) == Limits()


def test_limits_follow_from_what_was_applied() -> None:
    updates = Updates()
    updates.add(1e-3, 0.5)
    updates.add(3e-3, 0.25)
    assert limits_of("exp_avg", 0.1, updates, ADAM) == Limits(-1.0, 1.0)
    assert limits_of("exp_avg", 3.0, updates, ADAM) == Limits(-6.0, 6.0)
    assert limits_of("exp_avg_sq", 0.1, updates, ADAM) == Limits(0.0, 0.5)
    master = limits_of("master", 2.0, updates, ADAM)
    bound = update_bound(ADAM.betas, ADAM.eps)
    largest = 2.0 + 4 * 4e-3 * bound
    assert master.change == pytest.approx(4 * 4e-3 * (bound + 0.1 * largest), rel=1e-4)
    assert (master.low, master.high) == (-2.0 - master.change, 2.0 + master.change)


def test_nothing_applied_means_nothing_changed() -> None:
    assert limits_of("master", 2.0, Updates(), ADAM).change == 0.0


def test_without_a_snapshot_before_only_signs_and_finiteness_are_asked() -> None:
    assert limits_of("master", None, None, ADAM) == Limits()
    assert limits_of("exp_avg", None, None, ADAM) == Limits()
    assert limits_of("exp_avg_sq", None, None, ADAM) == Limits(low=0.0)
    assert limits_of("exp_avg_sq", math.inf, Updates(), ADAM) == Limits(low=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.5, -1.5, 0.8])
def test_every_kind_of_impossible_value_is_found(value: float) -> None:
    before = np.full(1000, 0.5, dtype=np.float32)
    values, scratch, limits = before.copy(), np.empty(1000, dtype=np.float32), Limits(-1.0, 1.0, 0.2)
    extremes = float(values.min()), float(values.max())
    assert not beyond(values, extremes, limits, before, scratch)
    values[[77, 500]] = value
    extremes = float(values.min()), float(values.max())
    assert beyond(values, extremes, limits, before, scratch)
    assert impossible_values(values, limits, before) == (2, 77)
