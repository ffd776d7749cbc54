"""How sure a score is, and whether two models differ: by resampling texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.records import FloatArray
from trainer.scores.scores import BoolArray, Measure, Scores

RESAMPLES = 1000
CONFIDENCE = 0.95
_ELEMENTS = 2_000_000
"""Of counts at a time: 16 MB, and a few arrays as large."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a score lies."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One score of two models over the same texts."""

    first: float
    second: float
    difference: float
    """second − first"""
    interval: Interval
    """Of the difference."""
    p_bootstrap: float
    """Two-sided, by the paired bootstrap: 2 × the smaller fraction of resamples with a difference on either side of
    0."""
    p_value: float
    """Two-sided, by `test`: how likely so large a difference is between models that are equally good."""
    test: str
    """`mcnemar` (exact) or `randomisation`."""


def intervals(
    scores: Scores, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> dict[str, Interval]:
    """Percentile bootstrap over texts (Efron 1979), by score; NaN where a score is defined in no resample."""
    drawn = _gather(scores.measure, _resamples(scores.num_texts, seed, resamples))
    return {name: _percentiles(values, confidence) for name, values in drawn.items()}


def compare(
    make: Callable[[Any, Any], Scores],
    first: Any,
    second: Any,
    truths: Any,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> dict[str, Comparison]:
    """Scores of two models side by side.

    The interval of the difference and `p_bootstrap` come from the paired bootstrap: both models see the same resample
    (Koehn 2004, https://aclanthology.org/W04-3250). `p_value` is McNemar's exact test for fractions of texts that are
    right (binomial over the texts of which one model alone is right), and approximate randomisation for all others
    (Noreen 1989; Riezler and Maxwell 2005, https://aclanthology.org/W05-0908): predictions change sides text by text
    with probability ½; (1 + exchanges with a difference at least as large) / (1 + exchanges).

    Args:
        make: (predictions, truths) → scores.
        first, second: predictions of both models, arrays or sequences over the same texts.
    """
    one, other = make(first, truths), make(second, truths)
    number = one.num_texts
    measure = make(_joined(first, second), _joined(truths, truths)).measure
    drawn = _gather(_difference(measure), (np.stack([c, c]) for c in _resamples(number, seed, resamples)))
    # another stream than that of the resamples
    swaps = (_sides(swapped) for swapped in _swaps(number, seed + 1, resamples))
    exchanged = _gather(_exchange(measure), swaps)
    result = {}
    for name, value in one.values.items():
        difference = other.values[name] - value
        if name in one.hits:
            p_value, test = mcnemar(one.hits[name], other.hits[name]), "mcnemar"
        else:
            p_value, test = _exceedance(exchanged[name], difference), "randomisation"
        result[name] = Comparison(
            value,
            other.values[name],
            difference,
            _percentiles(drawn[name], confidence),
            _both_sides(drawn[name]),
            p_value,
            test,
        )
    return result


def mcnemar(first: BoolArray, second: BoolArray) -> float:
    """p-value of McNemar's exact test, two-sided: which texts each of two models has right, [texts]."""
    from scipy.stats import binomtest

    alone = int((first & ~second).sum())
    apart = int((first != second).sum())
    return float(binomtest(alone, apart, 0.5).pvalue) if apart else 1.0


def flips(first: Any, second: Any) -> float:
    """Fraction of texts whose prediction differs, of two arrays [texts] or [texts, labels], or two sequences."""
    if isinstance(first, np.ndarray):
        return float((first != second).reshape(len(first), -1).any(axis=1).mean())
    return float(np.mean([one != other for one, other in zip(first, second, strict=True)]))


def _chunks(number: int, resamples: int) -> Iterator[int]:
    size = max(1, _ELEMENTS // number)
    for done in range(0, resamples, size):
        yield min(size, resamples - done)


def _resamples(number: int, seed: int, resamples: int) -> Iterator[FloatArray]:
    """How often each text counts in each resample, [some, texts]."""
    generator = np.random.default_rng(seed)
    for size in _chunks(number, resamples):
        drawn = generator.integers(0, number, (size, number)) + number * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number).astype(np.float64)


def _swaps(number: int, seed: int, resamples: int) -> Iterator[FloatArray]:
    generator = np.random.default_rng(seed)
    for size in _chunks(number, resamples):
        yield generator.integers(0, 2, (size, number)).astype(np.float64)


def _sides(swapped: FloatArray) -> FloatArray:
    return np.stack([1 - swapped, swapped])


def _difference(measure: Measure) -> Measure:
    """Of the second model from the first; counts [2, some, texts]."""

    def result(counts: FloatArray) -> dict[str, FloatArray]:
        none = np.zeros_like(counts[0])
        return _minus(
            measure(np.concatenate([none, counts[1]], axis=1)), measure(np.concatenate([counts[0], none], axis=1))
        )

    return result


def _exchange(measure: Measure) -> Measure:
    """The same after an exchange; [2, some, texts]: what counts of the own side, and of the other."""

    def result(sides: FloatArray) -> dict[str, FloatArray]:
        own, other = sides
        return _minus(measure(np.concatenate([other, own], axis=1)), measure(np.concatenate([own, other], axis=1)))

    return result


def _minus(first: dict[str, FloatArray], second: dict[str, FloatArray]) -> dict[str, FloatArray]:
    return {name: value - second[name] for name, value in first.items()}


def _gather(measure: Measure, chunks: Iterator[FloatArray]) -> dict[str, FloatArray]:
    found = [measure(counts) for counts in chunks]
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, np.ndarray):
        return np.concatenate([first, second])
    return [*first, *second]


def _percentiles(values: FloatArray, confidence: float) -> Interval:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return Interval(np.nan, np.nan)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _both_sides(differences: FloatArray) -> float:
    defined = differences[~np.isnan(differences)]
    if not len(defined):
        return float("nan")
    smaller = min((defined <= _ROUNDING).sum(), (defined >= -_ROUNDING).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(defined) + 1)))


def _exceedance(exchanged: FloatArray, difference: float) -> float:
    defined = exchanged[~np.isnan(exchanged)]
    if np.isnan(difference) or not len(defined):
        return float("nan")
    larger = (abs(defined) >= abs(difference) - _ROUNDING).sum()
    return float((1 + larger) / (1 + len(defined)))


_ROUNDING = 1e-12
"""What equal sums may differ by."""
