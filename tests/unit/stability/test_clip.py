"""Clipping, beside the formulas of the papers written out plainly."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.records import StepStats
from trainer.stability.clip import Clipper


def stats(norms: Any) -> StepStats:
    parameter_norms = np.asarray(norms, dtype=np.float64)
    norm = math.hypot(*parameter_norms.tolist())
    return StepStats(
        attempt=1,
        batch_index=0,
        step=1,
        loss=3.0,
        parts={},
        num_targets=10,
        grad_norm=norm,
        num_nonfinite=0,
        parameter_norms=parameter_norms,
    )


def gradients(n: int, parameters: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    norms = np.exp(0.3 * rng.standard_normal((n, parameters)) - 0.005 * np.arange(n)[:, None])
    norms[:: max(1, n // 7)] *= 20
    return norms


def test_norm_is_the_limit_that_was_given() -> None:
    clipper = Clipper(1.0, "norm", 2)
    for row in gradients(50, 2):
        assert clipper.limits(stats(row)) == (1.0, None)
        clipper.accept(stats(row))


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_zclip_is_the_formula_of_the_paper(clip: float) -> None:
    clipper = Clipper(clip, "zclip", 1)
    seen: list[float] = []
    mean = variance = 0.0
    clipped = 0
    for row in gradients(300, 1, seed=3):
        norm = float(row[0])
        limit, scales = clipper.limits(stats(row))
        clipper.accept(stats(row))
        assert scales is None
        if len(seen) < 25:
            assert limit == clip
            seen.append(norm)
            mean, variance = float(np.mean(seen)), float(np.var(seen))
            continue
        sigma = math.sqrt(variance)
        z = (norm - mean) / (sigma + 1e-6)
        effective = norm
        if z > 2.5:
            clipped += 1
            effective = mean + 2.5**2 / z * sigma
            assert limit == pytest.approx(min(effective, clip) if clip else effective)
        else:
            assert limit == clip
        mean = 0.97 * mean + 0.03 * effective
        variance = 0.97 * variance + 0.03 * (effective - mean) ** 2
    assert clipped >= 5


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adagc_is_the_algorithm_of_the_paper(clip: float) -> None:
    clipper = Clipper(clip, "adagc", 3)
    gamma: np.ndarray | None = None
    for step, row in enumerate(gradients(260, 3, seed=5)):
        limit, scales = clipper.limits(stats(row))
        clipper.accept(stats(row))
        assert limit == clip
        if step < 100:
            assert scales is None
            clipped = row * (min(1.0, clip / np.linalg.norm(row)) if clip else 1.0)
            gamma = clipped if gamma is None else np.minimum(gamma, clipped)
            continue
        assert gamma is not None
        factors = np.minimum(1.05 * gamma / row, 1.0)
        assert (np.ones(3) if scales is None else np.array(scales)) == pytest.approx(factors)
        gamma = 0.98 * gamma + 0.02 * factors * row


@pytest.mark.parametrize("clipping", ["zclip", "adagc"])
@pytest.mark.parametrize("size", [5e-324, 1e-200, 1e200, 1e308])
@pytest.mark.parametrize("before", [0, 10, 150])
def test_extreme_norms_are_borne(clipping: Any, size: float, before: int) -> None:
    clipper = Clipper(1.0, clipping, 1)
    for row in [*gradients(before, 1), [size], *gradients(150, 1)]:
        limit, _ = clipper.limits(stats(row))
        clipper.accept(stats(row))
        assert 0 <= limit <= 1.0
    assert all(math.isfinite(clipper.state()[name]) for name in ("mean", "variance"))


def test_adagc_lets_a_tensor_move_whose_gradient_was_zero_at_first() -> None:
    clipper = Clipper(1.0, "adagc", 2)
    for _ in range(120):
        clipper.accept(stats([0.5, 0.0]))
    assert clipper.limits(stats([0.5, 0.3])) == (1.0, None)
    clipper.accept(stats([0.5, 0.3]))
    assert clipper.limits(stats([0.5, 3.0])) == (1.0, (1.0, pytest.approx(0.105)))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["norm", "zclip", "adagc"]),
    st.lists(st.lists(st.floats(), min_size=2, max_size=2), max_size=5),
    st.sampled_from([0.0, 1.0]),
)
def test_no_norm_breaks_it_and_limits_can_be_used(clipping, rows, clip) -> None:
    clipper = Clipper(clip, clipping, 2)
    for row in gradients(110, 2):
        clipper.accept(stats(row))
    for row in rows:
        limit, scales = clipper.limits(stats(row))
        clipper.accept(stats(row))
        assert math.isfinite(limit)
        assert limit >= 0
        assert scales is None or all(0 <= scale <= 1 for scale in scales)
    json.dumps(clipper.state(), allow_nan=False)


@pytest.mark.parametrize("clipping", ["norm", "zclip", "adagc"])
@pytest.mark.parametrize("at", [10, 60, 150])
def test_a_restored_state_goes_on_the_same(clipping: Any, at: int) -> None:
    rows = gradients(200, 2)
    clipper, copy = Clipper(1.0, clipping, 2), Clipper(1.0, clipping, 2)
    for row in rows[:at]:
        clipper.accept(stats(row))
    copy.restore(json.loads(json.dumps(clipper.state())))
    for row in rows[at:]:
        assert copy.limits(stats(row)) == clipper.limits(stats(row))
        clipper.accept(stats(row))
        copy.accept(stats(row))
        assert copy.fingerprint() == clipper.fingerprint()


def test_the_state_of_another_way_of_clipping_is_left_and_of_another_model_refused() -> None:
    clipper = Clipper(1.0, "zclip", 2)
    clipper.restore(Clipper(1.0, "adagc", 2).state())
    assert clipper.limits(stats([3.0, 4.0])) == (1.0, None)
    with pytest.raises(ValueError, match="2 parameters, but the saved state has 3"):
        Clipper(1.0, "adagc", 2).restore(Clipper(1.0, "adagc", 3).state())
