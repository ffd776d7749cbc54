"""The detector on stored curves of real small runs (benchmarks/ledgers): false alarms, delay, misses."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

IN_THE_NOISE = {"sudden-rate-30"}
"""Harm that begins no higher than clean steps reach (loss 3 σ, norm 5 σ) and grows: it shows as a drift."""


@pytest.fixture(scope="module")
def detector() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("detector")


@pytest.fixture(scope="module")
def curves(detector: ModuleType) -> Any:
    return detector.read()


@pytest.fixture(scope="module")
def ours(detector: ModuleType, curves: Any) -> Any:
    return detector.measure(detector.watch, curves)


def test_the_stored_curves_are_what_the_recipes_say(detector: ModuleType, curves: Any) -> None:
    made = [curve.recipe for curve in curves]
    assert [recipe.name for recipe in made] == [recipe.name for recipe in detector.recipes()]
    clean = [curve for curve in curves if curve.recipe.kind == "clean"]
    assert len({curve.recipe.seed for curve in clean}) >= 20
    assert sum(len(curve.losses) for curve in clean) >= 10_000
    for curve in clean:
        assert len(curve.losses) == curve.recipe.steps >= 500
        assert all(math.isfinite(value) for value in (*curve.losses, *curve.norms))
    assert sum(path.stat().st_size for path in detector.FOLDER.iterdir()) < 1_500_000


def test_ten_thousand_clean_steps_give_no_rollback(ours: Any) -> None:
    assert ours.clean_steps >= 10_000
    assert ours.false_acts == 0
    assert ours.false_alarms * 10_000 <= ours.clean_steps, ours.where


def test_sudden_harm_is_seen_within_a_step(ours: Any) -> None:
    delays = {case.curve: case.delay for case in ours.cases if case.kind == "sudden"}
    assert len(delays) >= 15
    late = {name: delay for name, delay in delays.items() if delay is None or delay > 1}
    assert set(late) <= IN_THE_NOISE
    assert all(delay is not None and delay <= 10 for delay in late.values()), late


def test_a_run_that_breaks_by_itself_is_seen_early(ours: Any) -> None:
    delays = [case.delay for case in ours.cases if case.kind == "own"]
    assert len(delays) >= 4
    assert all(delay is not None and delay <= 10 for delay in delays), delays


def test_a_slow_drift_is_seen_within_forty_steps(ours: Any, detector: ModuleType) -> None:
    """Where the noise of the loss lets it: 0.002 a step for 40 steps is 0.08."""
    calm = [case for case in ours.cases if case.kind == "rise" and case.noise < detector.CALM]
    delays = sorted(math.inf if case.delay is None else case.delay for case in calm)
    assert len(delays) >= 8
    assert delays[-1] <= 40, delays
