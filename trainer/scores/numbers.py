"""Scores of predicted numbers, and of the likelihood of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.records import FloatArray
from trainer.scores.ordered import Ties, pearson, spearman
from trainer.scores.scores import Scores, make_scores, mean, ratio, total


def regression(predictions: NDArray[np.floating], truths: NDArray[np.floating], _: Sequence[str] = ()) -> Scores:
    """`pearson`, `spearman` (not defined where all predictions or all truths are equal), `mse`, `mae`.

    Args:
        predictions, truths: [texts].
    """
    values, true = np.asarray(predictions, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    if values.shape != true.shape or not np.isfinite(values).all() or not np.isfinite(true).all():
        raise ValueError("predictions and truths must be equally many finite numbers")
    error = values - true
    ties = Ties(values), Ties(true)

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        return {
            "pearson": pearson(counts, values, true),
            "spearman": spearman(counts, *ties),
            "mse": mean(counts, error**2),
            "mae": mean(counts, abs(error)),
        }

    notes: dict[str, str] = {}
    for what, numbers in (("predictions", values), ("truths", true)):
        if len(numbers) and np.ptp(numbers) == 0:
            notes |= dict.fromkeys(("pearson", "spearman"), f"is not defined: all {what} are equal")
    return make_scores("regression", len(values), measure, notes=notes)


def likelihood(predictions: NDArray[np.floating], truths: NDArray[np.integer], _: Sequence[str] = ()) -> Scores:
    """`loss`, nats a target, and `perplexity`, its exponential.

    Args:
        predictions: summed loss of each text, [texts].
        truths: number of its targets, [texts].
    """
    losses, targets = np.asarray(predictions, dtype=np.float64), np.asarray(truths)

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        loss = ratio(total(counts, losses), total(counts, targets), np.nan)
        return {"loss": loss, "perplexity": np.exp(np.minimum(loss, 700.0))}

    return make_scores("likelihood", len(losses), measure)
