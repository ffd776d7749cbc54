"""Scores of words: each one's class, and the spans that tags mark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.records import FloatArray
from trainer.scores.scores import ClassScores, Scores, f1_of, make_scores, mean_defined, ratio

Span = tuple[str, int, int]
"""(type, first word, word behind the last)"""


def spans(tags: Sequence[str]) -> set[Span]:
    """What IOB2 tags mark: a span begins with `B-TYPE` and goes on over `I-TYPE` of the same type. An `I-` that goes on
    with nothing marks no span: seqeval's strict mode (https://github.com/chakki-works/seqeval)."""
    found: set[Span] = set()
    begun: tuple[str, int] | None = None
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if begun is not None and not (prefix == "I" and kind == begun[0]):
            found.add((*begun, place))
            begun = None
        if prefix == "B":
            begun = kind, place
    return found


def mark_spans(names: Sequence[str]) -> bool:
    """Whether the classes are tags `B-…`, `I-…` and `O`."""
    return any(name.startswith("B-") for name in names) and all(n == "O" or n[:2] in ("B-", "I-") for n in names)


def token_classification(
    predictions: Sequence[Sequence[int]], truths: Sequence[Sequence[int]], names: Sequence[str]
) -> Scores:
    """
    `accuracy` over words. Where the classes are IOB2 tags: `f1`, `precision` and `recall` of whole spans over all types
    (micro), and `f1_macro`, the mean over types that are true or predicted; else `f1_macro` over classes of words.

    Args:
        predictions, truths: numbers of classes, of each word of each text.
    """
    for text, (predicted, true) in enumerate(zip(predictions, truths, strict=True)):
        if len(predicted) != len(true):
            raise ValueError(f"text {text} has {len(true)} words, and {len(predicted)} predictions")
    words = np.array([len(true) for true in truths], dtype=np.float64)
    right = np.array([sum(map(int.__eq__, map(int, p), map(int, t))) for p, t in zip(predictions, truths, strict=True)])
    tagged = mark_spans(names)
    if tagged:
        types = sorted({name[2:] for name in names if name != "O"})
        predicted_sets = [spans([names[number] for number in text]) for text in predictions]
        true_sets = [spans([names[number] for number in text]) for text in truths]
    else:
        # a word is a span of its own
        types = list(names)
        predicted_sets = [_words(text, names) for text in predictions]
        true_sets = [_words(text, names) for text in truths]
    place = {name: number for number, name in enumerate(types)}
    numbers = np.zeros((3, len(words), len(types)))
    for text, (predicted_set, true_set) in enumerate(zip(predicted_sets, true_sets, strict=True)):
        for which, found in enumerate((predicted_set & true_set, predicted_set, true_set)):
            for span in found:
                numbers[which, text, place[span[0]]] += 1

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        hits, predicted, true = (counts @ each for each in numbers)
        occurs = (predicted + true) > 0
        result = {
            "accuracy": ratio(counts @ right, counts @ words, np.nan),
            "f1_macro": mean_defined(np.where(occurs, f1_of(hits, predicted, true), np.nan)),
        }
        if tagged:
            sums = [each.sum(axis=1) for each in (hits, predicted, true)]
            result |= {
                "f1": f1_of(*sums),
                "precision": ratio(sums[0], sums[1]),
                "recall": ratio(sums[0], sums[2]),
            }
        return result

    by_class = []
    for name, (hits, predicted, true) in zip(types, numbers.sum(axis=1).T, strict=True):
        precision, recall = hits / predicted if predicted else 0.0, hits / true if true else 0.0
        f1 = 2 * hits / (predicted + true) if predicted + true else 0.0
        by_class.append(ClassScores(name, float(precision), float(recall), float(f1), int(true)))
    return make_scores("token_classification", len(words), measure, by_class=tuple(by_class))


def _words(text: Sequence[int], names: Sequence[str]) -> set[Span]:
    return {(names[number], place, place + 1) for place, number in enumerate(text)}
