"""Which predictions are the most wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.records import FloatArray
from trainer.scores.classes import THRESHOLD


def badness(kind: str, predictions: Any, truths: Any, exact: NDArray[np.bool_] | None = None) -> FloatArray:
    """How wrong each prediction is, [texts]; 0: it is right.

    Of a class 1 less the probability of the true one; of several labels the distance of the wrong ones; of a number
    the distance; of words the fraction that is wrong; of an answer 1.

    Args:
        predictions, truths: as the scores of the kind take them.
        exact: of answers, which are right to the letter, [texts].
    """
    match kind:
        case "classification":
            probabilities = np.asarray(predictions)
            of_truth = probabilities[np.arange(len(probabilities)), truths]
            return np.where(probabilities.argmax(axis=1) == truths, 0.0, 1 - of_truth)
        case "multi_label":
            off = np.abs(np.asarray(predictions) - truths)
            return np.asarray(np.where(off > THRESHOLD, off, 0.0).sum(axis=1))
        case "regression":
            return np.asarray(np.abs(predictions - truths))
        case "token_classification":
            pairs = zip(predictions, truths, strict=True)
            return np.array([float(np.mean(np.array(p) != np.array(t))) if t else 0.0 for p, t in pairs])
        case "question_answering":
            assert exact is not None
            return np.asarray(~exact, dtype=np.float64)
    return np.zeros(len(truths))


def worst(found: FloatArray, limit: int) -> list[int]:
    """Rows of the most wrong predictions, the worst first; those that are right are none."""
    order = np.argsort(-found, kind="stable")[:limit]
    return [row for row in order.tolist() if found[row] > 0]
