"""The scores of several tasks over the same predictions, each over its own texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np

from trainer.records import FloatArray, IntArray
from trainer.scores.scores import Scores, make_scores

ScoreOne = Callable[[str, Any, Any, Sequence[str]], Scores]


class Task(Protocol):
    """One of the tasks."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def columns(self) -> slice:
        """Of predictions and truths: its own."""
        ...

    @property
    def classes(self) -> Sequence[str]: ...


class Own(NamedTuple):
    """What is of one task, as the scores of its kind take it."""

    task: Task
    rows: IntArray
    """Its texts among all."""
    predictions: Any
    truths: Any


def parts(predictions: FloatArray, truths: FloatArray, tasks: Sequence[Task]) -> list[Own]:
    """Each task that has texts.

    Args:
        predictions: [texts, C]: probabilities, or numbers.
        truths: [texts, C], NaN outside of the columns of a text's own task.
    """
    result = []
    for task in tasks:
        own = truths[:, task.columns]
        rows = np.flatnonzero(~np.isnan(own).any(axis=1))
        if not len(rows):
            continue
        predicted, true = predictions[rows][:, task.columns], own[rows]
        match task.kind:
            case "classification":
                result.append(Own(task, rows, predicted, true.argmax(axis=1)))
            case "multi_label":
                result.append(Own(task, rows, predicted, true))
            case _:
                result.append(Own(task, rows, predicted[:, 0], true[:, 0].astype(np.float64)))
    return result


def several(predictions: FloatArray, truths: FloatArray, tasks: Sequence[Task], score: ScoreOne) -> Scores:
    """The scores of each task, called `task/score`. Arguments as of :func:`parts`.

    Args:
        score: (kind, predictions, truths, names of classes) → scores of one task.

    Raises:
        ValueError: there is no text.
    """
    found = [
        (own, score(own.task.kind, own.predictions, own.truths, own.task.classes))
        for own in parts(predictions, truths, tasks)
    ]

    def measure(counts: FloatArray) -> dict[str, FloatArray]:
        each = [
            [(f"{own.task.name}/{name}", values) for name, values in scores.measure(counts[:, own.rows]).items()]
            for own, scores in found
        ]
        # what is told first of one task, is told first of all
        return dict(named for row in zip_longest(*each) for named in row if named)

    return make_scores(
        "several",
        len(truths),
        measure,
        by_class=tuple(
            replace(each, name=f"{own.task.name}/{each.name}") for own, scores in found for each in scores.by_class
        ),
        notes={f"{own.task.name}/{name}": note for own, scores in found for name, note in scores.notes.items()},
    )
