"""The scores of each kind of objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer.scores.answers import question_answering
from trainer.scores.classes import classification, multi_label
from trainer.scores.generated import generation
from trainer.scores.numbers import likelihood, regression
from trainer.scores.scores import Scores
from trainer.scores.spans import token_classification

Score = Callable[[Any, Any, Sequence[str]], Scores]
"""(predictions, truths, names of classes) → scores; what the first two are, each function says."""

BY_KIND: dict[str, Score] = {
    "classification": classification,
    "multi_label": multi_label,
    "regression": regression,
    "token_classification": token_classification,
    "question_answering": question_answering,
    "generation": generation,
    "seq2seq": likelihood,
    "causal": likelihood,
    "masked": likelihood,
}
"""Generated texts (`generation`) are scored beside the likelihood of the right ones."""

MAIN = {
    "classification": "accuracy",
    "multi_label": "f1_micro",
    "regression": "pearson",
    "token_classification": "accuracy",
    "question_answering": "f1",
    "generation": "bleu",
}
"""What is told first."""


def score(kind: str, predictions: Any, truths: Any, names: Sequence[str] = ()) -> Scores:
    """The scores of predictions for texts.

    Raises:
        ValueError: there is no text, or predictions and truths do not fit each other.
    """
    return BY_KIND[kind](predictions, truths, names)
