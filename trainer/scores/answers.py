"""Scores of answers that are passages of a text, as SQuAD has them (Rajpurkar et al. 2016,
https://arxiv.org/abs/1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.records import FloatArray
from trainer.scores.scores import Scores, make_scores, mean

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
LONGEST = 30
"""Tokens of an answer."""


def normalised(answer: str) -> str:
    """Without case, ASCII punctuation, English articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def overlap(answer: str, truth: str) -> float:
    """F1 of the words of two answers; 1 where both have none, 0 where one has."""
    words, true = normalised(answer).split(), normalised(truth).split()
    if not words or not true:
        return float(words == true)
    common = (Counter(words) & Counter(true)).total()
    return 2 * common / (len(words) + len(true))


def question_answering(predictions: Sequence[str], truths: Sequence[Sequence[str]], _: Sequence[str] = ()) -> Scores:
    """`exact_match` after normalisation and `f1` of words, each the best over the accepted answers of a question.

    Args:
        predictions: one answer a question; empty: none.
        truths: the accepted answers of each; none, or an empty one: it has no answer.
    """
    pairs = list(zip(predictions, ([*true] or [""] for true in truths), strict=True))
    exact = np.array([any(normalised(answer) == normalised(t) for t in true) for answer, true in pairs], dtype=bool)
    f1 = np.array([max(overlap(answer, t) for t in true) for answer, true in pairs])

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        return {"exact_match": mean(counts, exact), "f1": mean(counts, f1)}

    return make_scores("question_answering", len(pairs), measure, hits={"exact_match": exact})


@dataclass(frozen=True, slots=True)
class Window:
    """What a model says about one window of a text."""

    starts: NDArray[np.floating]
    """Logit of each token to begin the answer, [tokens]."""
    ends: NDArray[np.floating]
    """To end it."""
    places: Sequence[tuple[int, int] | None]
    """Characters of the text that each token stands for, [first, behind the last); None: not of the text."""


def best_span(windows: Iterable[Window], longest: int = LONGEST) -> tuple[int, int]:
    """Characters [first, behind the last) of the best answer over all windows of a text: the largest sum of the two
    logits with the start not behind the end and at most `longest` tokens; (0, 0) without any token of the text."""
    best, found = -np.inf, (0, 0)
    for window in windows:
        inside = np.flatnonzero([place is not None for place in window.places])
        if len(inside):
            value, first, last = best_tokens(window.starts[inside], window.ends[inside], longest)
            begin, end = window.places[inside[first]], window.places[inside[last]]
            assert begin is not None
            assert end is not None
            if value > best:
                best, found = value, (begin[0], end[1])
    return found


def best_tokens(
    starts: NDArray[np.floating], ends: NDArray[np.floating], longest: int = LONGEST
) -> tuple[float, int, int]:
    """(sum of the two logits, first, last) of the best span of at most `longest` tokens; of equal ones the first.

    Args:
        starts, ends: [tokens], at least one.
    """
    sums = np.asarray(starts, dtype=np.float64)[:, None] + np.asarray(ends, dtype=np.float64)[None, :]
    length = np.arange(len(ends))[None, :] - np.arange(len(starts))[:, None]
    sums[(length < 0) | (length >= longest)] = -np.inf
    first, last = divmod(int(sums.argmax()), sums.shape[1])
    return float(sums[first, last]), first, last
