"""Scores that depend on the order of predictions: area under the ROC curve, average precision, rank correlation.

Ties count one half, as in sklearn and scipy; a text that counts k times is k tied texts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.records import FloatArray, IntArray
from trainer.scores.scores import BoolArray, ratio


class Ties:
    """Texts in ascending order of a value, tied ones in one group.

    Attributes:
        order: [texts].
        starts: place in `order` where each group begins, [groups].
        group: of each text, [texts].
    """

    def __init__(self, values: NDArray[np.floating]):
        self.order: IntArray = np.argsort(values, kind="stable")
        new = np.diff(values[self.order], prepend=np.nan) != 0
        self.starts: IntArray = np.flatnonzero(new)
        self.group: IntArray = np.empty(len(values), dtype=np.int64)
        self.group[self.order] = np.cumsum(new) - 1

    def sums(self, counts: FloatArray) -> FloatArray:
        """Of each group, [resamples, groups]."""
        return np.asarray(np.add.reduceat(counts[:, self.order], self.starts, axis=1))


def roc_auc(counts: FloatArray, ties: Ties, positive: BoolArray) -> FloatArray:
    """Probability that a positive text is above a negative one (Mann–Whitney), [resamples]; NaN without either."""
    above, below = ties.sums(counts * positive), ties.sums(counts * ~positive)
    before = np.cumsum(below, axis=1) - below
    pairs = above.sum(axis=1) * below.sum(axis=1)
    return ratio((above * (before + below / 2)).sum(axis=1), pairs, np.nan)


def average_precision(counts: FloatArray, ties: Ties, positive: BoolArray) -> FloatArray:
    """Σ over thresholds of the gain in recall × precision, [resamples]; NaN without a positive text."""
    gained, seen = ties.sums(counts * positive)[:, ::-1], ties.sums(counts)[:, ::-1]
    precision = ratio(np.cumsum(gained, axis=1), np.cumsum(seen, axis=1))
    return ratio((gained * precision).sum(axis=1), gained.sum(axis=1), np.nan)


def pearson(counts: FloatArray, first: FloatArray, second: FloatArray) -> FloatArray:
    """Correlation, [resamples], of values [texts] or [resamples, texts]; NaN where one of them is constant."""
    number = counts.sum(axis=1, keepdims=True)
    first = first - ratio((counts * first).sum(axis=1, keepdims=True), number)
    second = second - ratio((counts * second).sum(axis=1, keepdims=True), number)
    squares = [(counts * value**2).sum(axis=1) for value in (first, second)]
    # what is left of a constant after its mean is taken away is rounding
    constant = [square <= 1e-24 * np.maximum(1, number[:, 0]) for square in squares]
    scale = np.where(constant[0] | constant[1], 0.0, np.sqrt(squares[0]) * np.sqrt(squares[1]))
    return np.clip(ratio((counts * first * second).sum(axis=1), scale, np.nan), -1.0, 1.0)


def spearman(counts: FloatArray, first: Ties, second: Ties) -> FloatArray:
    """Correlation of ranks, tied texts at their mean rank, [resamples]."""
    return pearson(counts, _ranks(counts, first), _ranks(counts, second))


def _ranks(counts: FloatArray, ties: Ties) -> FloatArray:
    """[resamples, texts]"""
    sums = ties.sums(counts)
    middle = np.cumsum(sums, axis=1) - sums + (sums + 1) / 2
    return np.asarray(middle[:, ties.group])
