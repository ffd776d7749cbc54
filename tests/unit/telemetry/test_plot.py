"""The braille plot and the bounded history behind it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.telemetry.plot import History, braille


def test_a_falling_line_falls() -> None:
    assert braille([3.0, 2.0, 1.0, 0.0], width=2, height=1) == ["⠑⢄"]
    assert braille([0.0, 1.0, 2.0, 3.0], width=2, height=1) == ["⡠⠊"]


def test_a_jump_is_drawn_without_gaps() -> None:
    assert braille([1.0, 0.0], width=1, height=2) == ["⢱", "⢸"]


def test_what_is_not_finite_leaves_a_gap() -> None:
    assert braille([1.0, math.nan, 1.0, math.inf], width=2, height=1) == ["⠄⠄"]
    assert braille([math.nan], width=3, height=2) == ["⠀" * 3] * 2
    assert braille([], width=3, height=2) == ["⠀" * 3] * 2


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=300),
    st.integers(1, 20),
    st.integers(1, 5),
)
def test_any_values_fill_exactly_the_room(values: list[float], width: int, height: int) -> None:
    lines = braille(values, width, height)
    assert [len(line) for line in lines] == [width] * height
    assert all(0x2800 <= ord(character) <= 0x28FF for line in lines for character in line)


def test_history_thins_by_averaging_and_keeps_the_mean() -> None:
    history = History(capacity=8)
    for step in range(1, 1025):
        history.add(step, float(step))
    values = history.values()
    assert len(values) <= 8
    assert values == sorted(values)
    assert sum(values) / len(values) == pytest.approx(512.5)


def test_history_forgets_what_a_resume_does_again() -> None:
    history = History(capacity=100)
    for step in range(1, 11):
        history.add(step, float(step))
    history.rewind(6)
    history.add(7, 70.0)
    assert history.values() == [1, 2, 3, 4, 5, 6, 70]


def test_a_nan_among_others_does_not_hide_them() -> None:
    history = History(capacity=4)
    for step, value in enumerate([1.0, math.nan, math.nan, math.nan, 5.0], 1):
        history.add(step, value)
    first, second, third = history.values()
    assert (first, third) == (1.0, 5.0)
    assert math.isnan(second)
