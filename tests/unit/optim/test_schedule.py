"""Properties of the learning rate over a whole run."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.resolve import Arithmetic
from trainer.config.schema import OptimConfig, ScheduleConfig
from trainer.optim.schedule import learning_rate


def numbers_for(steps: int, warmup: int, decay: int) -> Arithmetic:
    return Arithmetic(
        ranks=1,
        samples=1,
        micro=1,
        accumulation=1,
        tokens_per_step=1,
        steps=steps,
        warmup_steps=warmup,
        decay_steps=decay,
    )


@st.composite
def runs(draw: st.DrawFn) -> tuple[OptimConfig, ScheduleConfig, Arithmetic]:
    kind = draw(st.sampled_from(["cosine", "linear", "wsd", "constant"]))
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps))
    decay = {
        "constant": 0,
        "wsd": draw(st.integers(0, steps - warmup)),
    }.get(kind, steps - warmup)
    optim = OptimConfig(lr=draw(st.floats(1e-7, 10.0)))
    schedule = ScheduleConfig(duration=steps, warmup=warmup, kind=kind, floor=draw(st.floats(0, 1)))
    return optim, schedule, numbers_for(steps, warmup, decay)


@given(runs())
def test_rates_stay_in_bounds_and_reach_the_ends_exactly(run):
    optim, schedule, numbers = run
    rates = [learning_rate(optim, schedule, numbers, step) for step in range(1, numbers.steps + 1)]
    assert all(0 <= rate <= optim.lr for rate in rates)
    assert rates[max(numbers.warmup_steps, 1) - 1] == optim.lr
    if numbers.warmup_steps > 1:
        assert rates[0] == pytest.approx(optim.lr / numbers.warmup_steps)
    decays = numbers.decay_steps > 0 and numbers.steps > max(numbers.steps - numbers.decay_steps, 1)
    last = optim.lr * schedule.floor if decays else optim.lr
    assert rates[-1] == last
    assert learning_rate(optim, schedule, numbers, numbers.steps + 17) == last


@given(runs())
def test_rises_then_never_rises_again_without_jumps(run):
    optim, schedule, numbers = run
    rates = [learning_rate(optim, schedule, numbers, step) for step in range(1, numbers.steps + 1)]
    peak = max(numbers.warmup_steps, 1) - 1
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    # no jump is steeper than the steepest slope of the warm-up or of the decay (half a cosine: π/2 times the line's)
    decay_steps = numbers.steps - max(numbers.steps - numbers.decay_steps, 1)
    slopes = [1 / n for n in (numbers.warmup_steps,) if n] + [math.pi / 2 / n for n in (decay_steps,) if n]
    steepest = optim.lr * max(slopes, default=0.0)
    assert all(abs(a - b) <= steepest * (1 + 1e-9) for a, b in pairwise(rates))


@pytest.mark.parametrize(
    ("kind", "decay", "expected"),
    [
        ("cosine", 8, {1: 0.5, 2: 1.0, 6: 0.6, 10: 0.2}),
        ("linear", 8, {4: 0.8, 6: 0.6, 8: 0.4}),
        ("wsd", 4, {2: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2}),
        ("constant", 0, {1: 0.5, 2: 1.0, 10: 1.0}),
    ],
)
def test_known_values(kind, decay, expected):
    schedule = ScheduleConfig(duration=10, warmup=2, kind=kind, floor=0.2)
    rates = {step: learning_rate(OptimConfig(lr=1.0), schedule, numbers_for(10, 2, decay), step) for step in expected}
    assert rates == pytest.approx(expected)


def test_there_is_no_step_zero():
    with pytest.raises(ValueError, match="counted from 1"):
        learning_rate(OptimConfig(lr=1.0), ScheduleConfig(duration=3), numbers_for(3, 0, 3), 0)
