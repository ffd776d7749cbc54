"""One channel: what enters the history, what it is judged by, and that nothing breaks it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.stability.detector import SLACK, WINSOR, Channel, Tuning

LOG = Tuning("log", floor=0.005, first=0.08, spread=0.1)
LINEAR = Tuning("linear", floor=0.02, first=0.05, spread=0.1)
ANY = st.floats()
"""NaN, infinities, zeros, negative, subnormal and huge values too."""


def fed(values: list[float], tuning: Tuning = LOG) -> Channel:
    channel = Channel(tuning)
    for step, value in enumerate(values, 1):
        channel.accept(step, value)
    return channel


def steady(n: int = 200, level: float = 3.0, noise: float = 0.02) -> list[float]:
    """Alternates around a level: mean absolute log residual `noise`."""
    return [level * math.exp(noise if i % 2 else -noise) for i in range(n)]


@settings(deadline=None, max_examples=60)
@given(st.lists(ANY, max_size=40), ANY, st.sampled_from([LOG, LINEAR]))
def test_any_value_can_be_judged_and_taken(values: list[float], value: float, tuning: Tuning) -> None:
    channel = fed(values, tuning)
    score, height = channel.score(value), channel.climb(value)
    assert math.isnan(score) == math.isnan(height) == (not math.isfinite(value))
    state = channel.state()
    json.dumps(state, allow_nan=False)
    assert channel.sigma() > 0


@settings(deadline=None, max_examples=60)
@given(st.lists(ANY, max_size=40), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_never_enters(values: list[float], bad: float) -> None:
    channel = fed(values)
    before = channel.state()
    channel.accept(99, bad)
    assert channel.state() == before


def test_a_zero_says_nothing_to_a_logarithmic_channel() -> None:
    channel = fed(steady())
    before = channel.state()
    channel.accept(201, 0.0)
    assert channel.state() == before
    assert channel.score(0.0) < -100


@settings(deadline=None, max_examples=60)
@given(st.lists(ANY, min_size=1, max_size=30), st.lists(ANY, min_size=1, max_size=10))
def test_a_state_restored_through_json_goes_on_the_same(values: list[float], later: list[float]) -> None:
    channel = fed(values)
    copy = Channel(LOG)
    copy.restore(json.loads(json.dumps(channel.state())))
    for step, value in enumerate(later, 100):
        assert repr(copy.score(value)) == repr(channel.score(value))
        assert repr(copy.climb(value)) == repr(channel.climb(value))
        channel.accept(step, value)
        copy.accept(step, value)
    assert copy.packed() == channel.packed()
    assert copy.state() == channel.state()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=40), st.floats(1e-6, 1e6))
def test_the_scale_of_the_loss_does_not_matter(values: list[float], factor: float) -> None:
    *past, last = values
    plain, scaled = fed(past), fed([value * factor for value in past])
    assert scaled.score(last * factor) == pytest.approx(plain.score(last), rel=1e-6, abs=1e-6)
    assert scaled.climb(last * factor) == pytest.approx(plain.climb(last), rel=1e-6, abs=1e-6)


def test_the_scale_is_that_of_the_noise() -> None:
    assert fed(steady(400, noise=0.02)).sigma() == pytest.approx(0.02 * math.sqrt(math.pi / 2), rel=0.15)
    assert fed([3.0] * 400).sigma() == LOG.floor


@pytest.mark.parametrize("steps", [10, 30, 60, 100])
@pytest.mark.parametrize("height", [9.0, 1.0])
def test_a_fall_to_a_plateau_without_noise_alarms_nowhere(steps: int, height: float) -> None:
    channel = Channel(LOG)
    for step in range(1, 800):
        value = 2.0 + height * math.exp(-step / steps)
        assert channel.score(value) < 2.0
        assert channel.climb(value) < 2.0
        channel.accept(step, value)
    assert channel.usual == pytest.approx(2.0, rel=0.01)


def test_little_knowledge_makes_wide_thresholds() -> None:
    few = fed([3.0] * 4)
    assert few.sigma() == pytest.approx(0.08 * (1 - 4 / 128), rel=0.05)
    assert few.score(6.0) == pytest.approx(math.log(2) / few.sigma() / 2)
    assert fed([3.0] * 30).sigma() == pytest.approx(0.08 * (1 - 30 / 128))


def test_one_freak_that_was_accepted_moves_little() -> None:
    channel = fed(steady())
    usual, sigma = channel.usual, channel.sigma()
    channel.accept(201, 0.001)
    assert channel.usual == pytest.approx(usual, rel=0.01)
    assert channel.sigma() < 1.1 * sigma


def test_a_level_that_lasts_is_followed() -> None:
    channel = fed(steady())
    for step, value in enumerate(steady(150, level=2.0), 201):
        assert channel.score(value) < 4
        assert channel.climb(value) < 6
        channel.accept(step, value)
    assert channel.usual == pytest.approx(2.0, rel=0.02)


def test_the_cusum_counts_a_residual_up_to_its_limit_and_knows_where_it_began() -> None:
    channel = fed(steady(200))
    assert channel.climb(1e6) <= channel.height + WINSOR - SLACK
    zero = channel.zero_step
    for step in range(201, 206):
        channel.accept(step, 3.15)
    assert channel.height > 5
    assert zero <= channel.zero_step <= 201
    channel.accept(206, 3.2, highest=6.0)
    assert channel.height == 6.0
    channel.pardon()
    assert channel.climb(channel.usual) < 1.0


def test_neighbours_that_resemble_each_other_count_less_as_drift() -> None:
    alike = fed([3.0 * math.exp(0.03 if (i // 4) % 2 else -0.03) for i in range(600)])
    alternating = fed(steady(600, noise=0.03))
    assert alike.correlation > 0.2
    assert alternating.correlation < 0
    assert alike.climb(3.2) < alternating.climb(3.2)


def test_a_negative_value_makes_the_channel_linear_at_the_same_level() -> None:
    channel = fed(steady(level=0.5))
    usual = channel.usual
    channel.accept(201, -0.01)
    assert not channel.logarithmic
    assert channel.usual == pytest.approx(usual, rel=0.1)
    for step in range(202, 400):
        channel.accept(step, -1.0 + 0.01 * (step % 2))
    assert channel.usual == pytest.approx(-0.995, abs=0.02)
    assert channel.score(5.0) > 8


def test_values_are_consistent_where_they_are_close_finite_and_do_not_rise() -> None:
    channel = fed(steady())
    assert channel.consistent([5.0, 5.1] * 6)
    assert not channel.consistent([5.0, 50.0] * 6)
    assert not channel.consistent([*[5.0, 5.1] * 6, math.nan])
    assert not channel.consistent([5.0 * 1.03**i for i in range(12)])


def test_an_adopted_level_is_the_usual_one() -> None:
    channel = fed(steady())
    channel.adopt([5.0, 5.2, 4.9, math.nan])
    assert channel.usual == pytest.approx(5.0)
    assert abs(channel.score(5.1)) < 2
    assert channel.climb(5.0) == 0.0
