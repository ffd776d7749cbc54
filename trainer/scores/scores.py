"""What a score is: a number over texts, each of which may count several times or not at all.

Every score is a function of how often each text counts. With ones it is the score itself, with the counts of a
resample one value of its bootstrap distribution, and over the texts of two models one value of a test between them.
All are vectorised over resamples, and sums do not depend on the number of threads: equal predictions, equal digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.records import FloatArray, IntArray

BoolArray = NDArray[np.bool_]
Measure = Callable[[FloatArray], dict[str, FloatArray]]
"""(counts [resamples, texts]) → score by name, each [resamples]; NaN where it is not defined."""


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Of one class."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """Texts (or spans) that are of it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What is made of predictions for `num_texts` texts."""

    kind: str
    num_texts: int
    values: dict[str, float]
    """By name; NaN where a score is not defined for these texts."""
    measure: Measure
    by_class: tuple[ClassScores, ...] = ()
    confusion: IntArray | None = None
    """Texts by [true class, predicted class]."""
    notes: dict[str, str] = field(default_factory=dict)
    """By score: why it is not defined or of what it leaves out; of BLEU and chrF their signatures."""
    hits: Mapping[str, BoolArray] = field(default_factory=dict)
    """Scores that are the fraction of texts that are right: which texts are, [texts]."""


def make_scores(
    kind: str,
    num_texts: int,
    measure: Measure,
    *,
    by_class: tuple[ClassScores, ...] = (),
    confusion: IntArray | None = None,
    notes: dict[str, str] | None = None,
    hits: Mapping[str, BoolArray] | None = None,
) -> Scores:
    """The scores that `measure` gives where each text counts once.

    Raises:
        ValueError: there is no text.
    """
    if not num_texts:
        raise ValueError("there is no text to score")
    values = {name: float(value[0]) for name, value in measure(np.ones((1, num_texts))).items()}
    return Scores(kind, num_texts, values, measure, by_class, confusion, notes or {}, hits or {})


def total(counts: FloatArray, values: NDArray[Any]) -> FloatArray:
    """Σ over texts of count × value, [resamples]; `values` [texts]."""
    return np.asarray((counts * values).sum(axis=1))


def mean(counts: FloatArray, values: NDArray[Any]) -> FloatArray:
    """Mean of `values` [texts], [resamples]; NaN where no text counts."""
    return ratio(total(counts, values), counts.sum(axis=1), np.nan)


def ratio(numerator: FloatArray, denominator: FloatArray, otherwise: float = 0.0) -> FloatArray:
    """Elementwise quotient; `otherwise` where the denominator is 0."""
    result = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), otherwise)
    np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result


def f1_of(hits: FloatArray, predicted: FloatArray, true: FloatArray) -> FloatArray:
    """2·hits / (predicted + true): the harmonic mean of precision and recall; 0 where nothing is either."""
    return ratio(2 * hits, predicted + true)


def mean_defined(values: FloatArray, axis: int = 1) -> FloatArray:
    """Mean over what is not NaN; NaN where all is."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=axis), defined.sum(axis=axis).astype(float), np.nan)
