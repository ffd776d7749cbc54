"""Names of the scores that an evaluation gives, by kind of objective, and which way each gets better. Pure."""

from __future__ import annotations

from trainer.config.objective import Kind, ObjectiveConfig

_LIKELIHOOD = ("perplexity", "accuracy")
_OF_CLASSES = ("precision_macro", "recall_macro", "f1_macro")

SCORES: dict[Kind, tuple[str, ...]] = {
    "causal": _LIKELIHOOD,
    "masked": _LIKELIHOOD,
    "classification": ("accuracy", *_OF_CLASSES, "f1_micro", "matthews", "auc", "ece", "brier", "log_loss"),
    "multi_label": (
        *("f1_micro", "precision_micro", "recall_micro", *_OF_CLASSES),
        *("f1_samples", "exact_match", "auc", "mean_average_precision"),
    ),
    "regression": ("pearson", "spearman", "mse", "mae"),
    "token_classification": ("accuracy", "f1_macro", "f1", "precision", "recall"),
    "question_answering": ("exact_match", "f1"),
    # texts are written by `trimtab evaluate` only
    "seq2seq": _LIKELIHOOD,
    # of each task its own
    "several": (),
}
"""Beside `loss`, which every kind has."""

_SMALLER_IS_BETTER = frozenset({"loss", "perplexity", "ece", "brier", "log_loss", "mse", "mae"})
"""Errors; of all others more is better."""


def smaller_is_better(score: str) -> bool:
    """Whether it is an error; of one of several tasks, `task/score`."""
    return score.rpartition("/")[2] in _SMALLER_IS_BETTER


def names_of(objective: ObjectiveConfig) -> tuple[str, ...]:
    """What the evaluations of an objective can be compared by."""
    of_tasks = (f"{task.name}/{score}" for task in objective.tasks for score in SCORES[task.kind])
    return ("loss", *SCORES[objective.kind], *of_tasks)
