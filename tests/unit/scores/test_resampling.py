"""Intervals and tests between models: what they promise, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.scores.classes import classification, softmax
from trainer.scores.generated import generation
from trainer.scores.numbers import regression
from trainer.scores.resampling import compare, flips, intervals, mcnemar
from trainer.scores.scores import Scores

NAMES = ("a", "b", "c")


def classes(predictions: np.ndarray, truths: np.ndarray) -> Scores:
    return classification(predictions, truths, NAMES)


def predicted(number: int, seed: int, strength: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truths = generator.integers(0, 3, number)
    return softmax(generator.normal(size=(number, 3)) + strength * np.eye(3)[truths]), truths


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 300 samples of 150 texts: their intervals of 90 % hold the accuracy and the correlation of the population."""
    generator, covered = np.random.default_rng(5), np.zeros(2)
    for _ in range(300):
        truths = generator.integers(0, 2, 150)
        right = generator.random(150) < 0.8
        probabilities = np.eye(2)[np.where(right, truths, 1 - truths)]
        found = intervals(classification(probabilities, truths, ("a", "b")), resamples=200, confidence=0.9)
        covered[0] += found["accuracy"].low <= 0.8 <= found["accuracy"].high
        values = generator.normal(size=150)
        numbers = regression(0.6 * values + 0.8 * generator.normal(size=150), values)
        found = intervals(numbers, resamples=200, confidence=0.9)
        covered[1] += found["pearson"].low <= 0.6 <= found["pearson"].high
    # three standard deviations of a fraction of 300
    assert (abs(covered / 300 - 0.9) < 0.052).all()


def test_seeded_and_by_name() -> None:
    found = classes(*predicted(200, 0))
    again = intervals(found, seed=1)
    assert intervals(found, seed=1) == again != intervals(found, seed=2)
    assert set(again) == set(found.values)
    for name, interval in again.items():
        # the resampled error of calibration is larger than that of the sample itself
        assert interval.low < interval.high
        if name != "ece":
            assert interval.low < found.values[name] < interval.high


def test_many_texts_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = classes(*predicted(50, 0))
    whole = intervals(found, resamples=100)
    monkeypatch.setattr("trainer.scores.resampling._ELEMENTS", 50 * 7)
    assert intervals(found, resamples=100) == whole


def test_equal_models_do_not_differ() -> None:
    probabilities, truths = predicted(80, 0)
    for name, one in compare(classes, probabilities, probabilities, truths, resamples=200).items():
        assert (one.difference, one.p_bootstrap, one.p_value) == (0, 1, 1), name
        assert (one.interval.low, one.interval.high) == (0, 0)
        assert one.test == ("mcnemar" if name == "accuracy" else "randomisation")


def test_equally_good_models_are_told_apart_as_rarely_as_promised() -> None:
    """Two models with independent errors of the same rate: p ≤ 0.1 in at most a tenth of 200 cases (McNemar's exact
    test is conservative), and about a tenth for approximate randomisation."""
    generator = np.random.default_rng(8)
    found = {"accuracy": 0, "f1_macro": 0, "log_loss": 0}
    for _ in range(200):
        truths = generator.integers(0, 3, 60)
        both = [softmax(generator.normal(size=(60, 3)) + 1.5 * np.eye(3)[truths]) for _ in range(2)]
        for name, one in compare(classes, *both, truths, resamples=99).items():
            if name in found:
                found[name] += one.p_value <= 0.1
    deviation = 3 * np.sqrt(0.1 * 0.9 * 200)
    assert found["accuracy"] <= 20 + deviation
    for name in ("f1_macro", "log_loss"):
        assert abs(found[name] - 20) <= deviation


def test_a_better_model_is_found() -> None:
    truths = predicted(400, 3)[1]
    generator = np.random.default_rng(4)
    worse, better = (softmax(generator.normal(size=(400, 3)) + s * np.eye(3)[truths]) for s in (0.7, 2.0))
    found = compare(classes, worse, better, truths)
    for name in ("accuracy", "f1_macro", "matthews", "auc"):
        one = found[name]
        assert one.difference == pytest.approx(one.second - one.first)
        assert 0 < one.interval.low < one.difference < one.interval.high
        assert one.p_value <= 0.002
        assert one.p_bootstrap <= 0.002
    assert found["log_loss"].interval.high < 0


def test_sequences_are_compared_too() -> None:
    truths = [f"the sentence number {n} is here" for n in range(12)]
    worse = [text.replace("number", "of") for text in truths]
    found = compare(generation, worse, truths, truths, resamples=200)["bleu"]
    assert found.second == pytest.approx(100)
    assert found.p_value == pytest.approx(1 / 201, abs=0.01)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_mcnemar_is_the_binomial_of_who_is_right_alone(first: int, second: int, both: int) -> None:
    from math import comb

    one = np.array([True] * first + [False] * second + [True] * both, dtype=bool)
    other = np.array([False] * first + [True] * second + [True] * both, dtype=bool)
    number, few = first + second, min(first, second)
    tail = sum(comb(number, k) for k in range(few + 1)) / 2**number
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(one, other) == mcnemar(other, one)


def test_flips() -> None:
    assert flips(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 0])) == 0.5
    assert flips(np.array([[0, 1], [1, 1]]), np.array([[0, 1], [1, 0]])) == 0.5
    assert flips(["a", "b"], ["a", "c"]) == 0.5
