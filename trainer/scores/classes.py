"""Scores of classes: one of a text, or any number of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.records import FloatArray, IntArray
from trainer.scores.ordered import Ties, average_precision, roc_auc
from trainer.scores.scores import (
    BoolArray,
    ClassScores,
    Scores,
    f1_of,
    make_scores,
    mean,
    mean_defined,
    ratio,
    total,
)

BINS = 15
"""Of the calibration error."""
THRESHOLD = 0.5
"""Probability from which on a label is predicted, where a text has any number of them."""


def softmax(logits: NDArray[np.floating]) -> FloatArray:
    """Probabilities over the last axis, in double precision."""
    logits = np.asarray(logits, dtype=np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(logits: NDArray[np.floating]) -> FloatArray:
    """Probability of each, in double precision."""
    powers = np.exp(-np.abs(np.asarray(logits, dtype=np.float64)))
    return np.where(np.asarray(logits) >= 0, 1 / (1 + powers), powers / (1 + powers))


def classification(predictions: NDArray[np.floating], truths: NDArray[np.integer], names: Sequence[str]) -> Scores:
    """
    `accuracy`; `precision_macro`, `recall_macro`, `f1_macro` over the classes that are true of a text or predicted (as
    sklearn does; 0 for a class that is never predicted); `f1_micro` (with one class a text also precision, recall and
    accuracy); `matthews` (R_K, Gorodkin 2004; 0 where all truths or all predictions are one class); `auc`, area under
    the ROC curve, of more than two classes each against the rest, mean over those with texts in and out of them; `ece`,
    expected calibration error of the largest probability in 15 bins of equal width (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599); `brier`, Σ over classes of squared error, 0 … 2 (Brier 1950); `log_loss`, nats.

    Args:
        predictions: probabilities [texts, classes].
        truths: numbers of classes [texts].
    """
    probabilities = np.asarray(predictions, dtype=np.float64)
    num_texts, num_classes = len(probabilities), len(names)
    _require(probabilities.shape == (len(truths), num_classes), probabilities, num_classes)
    if num_texts and not (truths.min() >= 0 and truths.max() < num_classes):
        raise ValueError(f"a class is {int(truths.min())} … {int(truths.max())}, and there are {num_classes}")
    chosen = probabilities.argmax(axis=1)
    right = chosen == truths
    true, predicted = _one_hot(truths, num_classes), _one_hot(chosen, num_classes)
    confidence = probabilities.max(axis=1)
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    members = [np.flatnonzero(bins == number) for number in range(BINS)]
    gap = right - confidence
    # as numbers, once: products with counts are exact
    hit, of, chosen_as = ((true & predicted).astype(float), true.astype(float), predicted.astype(float))
    brier = ((probabilities - true) ** 2).sum(axis=1)
    surprise = -np.log(np.maximum(probabilities[np.arange(num_texts), truths], np.finfo(np.float64).tiny))
    areas = range(1, 2) if num_classes == 2 else range(num_classes)
    ties = {number: Ties(probabilities[:, number]) for number in areas}

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        number = counts.sum(axis=1)
        hits, of_class, as_class = counts @ hit, counts @ of, counts @ chosen_as
        accuracy = mean(counts, right)
        area = np.stack([roc_auc(counts, ties[each], truths == each) for each in areas], axis=1)
        off = sum(abs(total(counts[:, rows], gap[rows])) for rows in members if len(rows))
        return {
            "accuracy": accuracy,
            **_macro(hits, as_class, of_class),
            "f1_micro": accuracy,
            "matthews": _matthews(hits.sum(axis=1), as_class, of_class, number),
            "auc": mean_defined(area),
            "ece": ratio(np.asarray(off), number, np.nan),
            "brier": mean(counts, brier),
            "log_loss": mean(counts, surprise),
        }

    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (truths, chosen), 1)
    return make_scores(
        "classification",
        num_texts,
        measure,
        by_class=_by_class(names, true & predicted, predicted, true),
        confusion=confusion,
        notes=_about_areas(names, true) | _about_macro(names, true, predicted),
        hits={"accuracy": right},
    )


def multi_label(predictions: NDArray[np.floating], truths: NDArray[np.number], names: Sequence[str]) -> Scores:
    """
    A label is predicted from a probability of 0.5 on. `f1_micro`, `precision_micro`, `recall_micro` over all decisions;
    `f1_macro` (and precision, recall) over the labels that are true of a text or predicted; `f1_samples`, mean over
    texts, 0 for one without any label, true or predicted (as sklearn does); `exact_match`; `auc` and
    `mean_average_precision`, means over labels for which they are defined.

    Args:
        predictions: probabilities [texts, labels].
        truths: 0 and 1, [texts, labels].
    """
    probabilities, true = np.asarray(predictions, dtype=np.float64), np.asarray(truths) > THRESHOLD
    _require(probabilities.shape == (len(true), len(names)), probabilities, len(names))
    predicted = probabilities >= THRESHOLD
    both = true & predicted
    alone = f1_of(both.sum(axis=1).astype(float), predicted.sum(axis=1).astype(float), true.sum(axis=1).astype(float))
    exact = (true == predicted).all(axis=1)
    hit, of, chosen_as = both.astype(float), true.astype(float), predicted.astype(float)
    ties = [Ties(column) for column in probabilities.T]

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        hits, as_label, of_label = counts @ hit, counts @ chosen_as, counts @ of
        all_hits, all_as, all_of = hits.sum(axis=1), as_label.sum(axis=1), of_label.sum(axis=1)
        each = list(zip(ties, true.T, strict=True))
        return {
            "f1_micro": f1_of(all_hits, all_as, all_of),
            "precision_micro": ratio(all_hits, all_as),
            "recall_micro": ratio(all_hits, all_of),
            **_macro(hits, as_label, of_label),
            "f1_samples": mean(counts, alone),
            "exact_match": mean(counts, exact),
            "auc": mean_defined(np.stack([roc_auc(counts, *pair) for pair in each], axis=1)),
            "mean_average_precision": mean_defined(
                np.stack([average_precision(counts, *pair) for pair in each], axis=1)
            ),
        }

    return make_scores(
        "multi_label",
        len(true),
        measure,
        by_class=_by_class(names, both, predicted, true),
        notes=_about_areas(names, true) | _about_macro(names, true, predicted),
        hits={"exact_match": exact},
    )


def _require(fits: bool, probabilities: FloatArray, num_classes: int) -> None:
    if not fits:
        raise ValueError(f"probabilities {list(probabilities.shape)} do not fit the truths and {num_classes} classes")
    if not np.isfinite(probabilities).all():
        raise ValueError("a prediction is not a finite number: the model is broken")


def _one_hot(numbers: NDArray[np.integer], size: int) -> BoolArray:
    result: BoolArray = np.asarray(numbers)[:, None] == np.arange(size)
    return result


def _macro(hits: FloatArray, predicted: FloatArray, true: FloatArray) -> dict[str, FloatArray]:
    """Means over classes that occur; arguments [resamples, classes]."""
    occurs = (predicted + true) > 0
    by_name = {
        "precision_macro": ratio(hits, predicted),
        "recall_macro": ratio(hits, true),
        "f1_macro": f1_of(hits, predicted, true),
    }
    return {name: mean_defined(np.where(occurs, value, np.nan)) for name, value in by_name.items()}


def _matthews(hits: FloatArray, predicted: FloatArray, true: FloatArray, number: FloatArray) -> FloatArray:
    """hits, number [resamples]; predicted, true [resamples, classes]."""
    covariance = hits * number - (predicted * true).sum(axis=1)
    spread = (number**2 - (predicted**2).sum(axis=1)) * (number**2 - (true**2).sum(axis=1))
    return ratio(covariance, np.sqrt(np.maximum(spread, 0)))


def _by_class(names: Sequence[str], hits: BoolArray, predicted: BoolArray, true: BoolArray) -> tuple[ClassScores, ...]:
    """Arguments [texts, classes]."""
    numbers: list[IntArray] = [each.sum(axis=0) for each in (hits, predicted, true)]
    result = []
    for name, hit, as_class, of_class in zip(names, *(number.tolist() for number in numbers), strict=True):
        precision, recall = hit / as_class if as_class else 0.0, hit / of_class if of_class else 0.0
        f1 = 2 * hit / (as_class + of_class) if as_class + of_class else 0.0
        result.append(ClassScores(name, precision, recall, f1, of_class))
    return tuple(result)


def _about_areas(names: Sequence[str], true: BoolArray) -> dict[str, str]:
    number = true.sum(axis=0)
    lacking = [name for name, count in zip(names, number, strict=True) if count in (0, len(true))]
    if not lacking:
        return {}
    what = "is not defined" if len(lacking) == len(names) or len(names) == 2 else "leaves out"
    return {"auc": f"{what}: there are not texts both in and out of {_some(lacking)}"}


def _about_macro(names: Sequence[str], true: BoolArray, predicted: BoolArray) -> dict[str, str]:
    number, as_class = true.sum(axis=0).tolist(), predicted.sum(axis=0).tolist()
    absent = [name for name, n, p in zip(names, number, as_class, strict=True) if not n and not p]
    never = [name for name, n, p in zip(names, number, as_class, strict=True) if n and not p]
    notes = {}
    if absent:
        notes["f1_macro"] = f"leaves out what is neither true of a text nor predicted: {_some(absent)}"
    if never:
        notes["precision_macro"] = f"counts 0 for what is never predicted: {_some(never)}"
    return notes


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
