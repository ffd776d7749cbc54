"""Where the guard would have acted on a saved curve."""

import math

import numpy as np
import pytest
from loss_curves import curve

from trainer.stability.replay import judge_curve


def losses_of(n: int = 400, sigma: float = 0.01) -> np.ndarray:
    return curve("power law", "normal", sigma, 0, n)[0]


def test_a_clean_curve_asks_for_nothing() -> None:
    losses, norms = curve("power law", "normal", 0.03, 0, 400)
    assert judge_curve(losses.tolist(), norms.tolist()) == []
    assert judge_curve([]) == []


def test_a_spike_is_left_out_and_a_nan_too() -> None:
    losses = losses_of()
    losses[200] *= 2
    losses[300] = math.nan
    spike, nan = judge_curve(losses.tolist(), steps=range(1000, 1400))
    assert (spike.step, spike.action) == (1200, "leave out")
    assert spike.score > 8
    assert (nan.step, nan.text, nan.score) == (1300, "the loss is nan", math.inf)


def test_a_spike_that_lasts_is_rolled_back_to_before_its_first_step() -> None:
    losses = losses_of()
    losses[200:206] *= 2
    actions = [(action.step, action.action, action.since_step) for action in judge_curve(losses.tolist())]
    assert actions == [(201, "leave out", 201), (202, "leave out", 202), (203, "roll back", 201)]


def test_a_drift_is_rolled_back_to_before_it_began() -> None:
    losses = losses_of(600)
    losses[400:] *= np.exp(0.004 * np.arange(200))
    first = judge_curve(losses.tolist())[0]
    assert first.action == "roll back"
    assert 395 <= first.since_step <= 415
    assert first.step <= 430


def test_a_level_that_stays_is_accepted_in_the_end() -> None:
    losses = losses_of(600)
    losses[400:] *= 1.5
    actions = judge_curve(losses.tolist())
    assert [action.action for action in actions] == ["leave out", "leave out", "roll back", "accept level"]
    assert actions[-1].step == 412


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 losses, but 1 gradient norms"):
        judge_curve([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="2 losses, but 3 steps"):
        judge_curve([1.0, 2.0], steps=[1, 2, 3])
