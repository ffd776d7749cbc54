"""Predictions of held-out samples, brought to one place by their ids and scored there once.

Scores over several ranks are those of one process to the last digit: micro-batch k of an evaluation holds the same
samples whatever the number of ranks, and what is added up is added up in the order of the samples, on one rank. With
another micro-batch size the sums inside the model are made in another order: predictions then agree within rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.objective import Kind, ObjectiveConfig, Outputs, outputs_of
from trainer.data.labelled import LabelledSamples
from trainer.data.questions import QuestionSamples
from trainer.objectives.objective import of_kind
from trainer.objectives.tasks import Task
from trainer.records import FloatArray, IntArray
from trainer.scores.answers import best_tokens
from trainer.scores.classes import sigmoid, softmax
from trainer.scores.score import score
from trainer.scores.scores import Scores
from trainer.scores.several import several

SCORED: frozenset[Kind] = frozenset(
    {"classification", "multi_label", "regression", "token_classification", "question_answering", "several"}
)
"""Kinds whose scores need the prediction of each sample; those of the others are sums over targets."""
EMPTY = -1
"""Id of a place of a micro-batch that holds no sample."""

Arrays = Mapping[str, NDArray[Any]]
Columns = Callable[[IntArray], IntArray]
Span = tuple[float, float, int, int]
"""Of a window: logits for no answer, logits of the best one, and its first and last token."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts for samples, and what is true of them, as :mod:`trainer.scores` takes them."""

    kind: Kind
    ids: IntArray
    """[samples]"""
    predictions: Any
    """An array [samples, …], or a list of one entry a sample."""
    truths: Any
    tasks: tuple[Outputs, ...] = ()
    """Of several."""

    @property
    def finite(self) -> bool:
        """Whether all predicted numbers are."""
        return not isinstance(self.predictions, np.ndarray) or bool(np.isfinite(self.predictions).all())

    def scores(self, names: Sequence[str]) -> Scores:
        """
        Args:
            names: of the classes.

        Raises:
            ValueError: there is no sample, or a prediction is no number.
        """
        if self.kind == "several":
            return several(self.predictions, self.truths, self.tasks, score)
        return score(self.kind, self.predictions, self.truths, names)


def held_out_ids(
    num_samples: int, *, micro: int, rank: int = 0, ranks: int = 1, max_samples: int | None = None
) -> Iterator[IntArray]:
    """Ids of the samples of each micro-batch that `evaluation_batches` gives this rank, [micro]; EMPTY where there is
    none."""
    total = min(num_samples, max_samples or num_samples)
    for first in range(rank * micro, -(-total // (micro * ranks)) * micro * ranks, micro * ranks):
        places = first + np.arange(micro)
        yield np.where(places < total, np.minimum(places, total - 1) * num_samples // total, EMPTY)


class Keeper:
    """Keeps what a model predicts while something else runs it, without another forward pass.

    Args:
        objective: its kind says what a prediction is.
        ids: of the samples of each batch, in the order of the batches.
        columns: of questions: (ids [n]) → where the text of each window stands, [n, 2].
        names: of the classes.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        ids: Iterable[IntArray],
        columns: Columns | None = None,
        names: Sequence[str] = (),
    ):
        self._kind = objective.kind
        self._task, self._tasks = _task_and_tasks(objective, names)
        self._ids = iter(ids)
        self._columns = columns
        self._waiting: deque[Arrays] = deque()
        self._kept: list[Predictions] = []

    def seen(self, batches: Iterable[dict[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
        """The batches, noted as they are handed out."""
        for arrays in batches:
            self._waiting.append(arrays)
            yield arrays

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it, each forward pass of `model` belongs to the next batch that was handed out."""
        handle = model.register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def predictions(self) -> Predictions:
        """Of all batches of this rank, in their order; empty places among them are left out."""
        return joined(self._kind, self._kept)

    @torch.no_grad()
    def _note(self, _module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
        arrays = self._waiting.popleft()
        device = next(value.device for value in outputs.values() if isinstance(value, Tensor))
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        found = self._task.predict(self._task.logits(outputs, tensors), tensors["labels"])
        numbers = {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}
        self._kept.append(_outcome(self._kind, *_with_columns(next(self._ids), numbers, self._columns), self._tasks))


def predictions(
    model: torch.nn.Module,
    objective: ObjectiveConfig,
    batches: Iterable[tuple[IntArray, dict[str, NDArray[Any]]]],
    columns: Columns | None = None,
    alive: Callable[[], None] = lambda: None,
    names: Sequence[str] = (),
) -> Predictions:
    """What a model predicts, of this process's batches.

    Args:
        model: on its device; put into evaluation mode.
        batches: (ids [n], arrays [n, …] as the objective's kind has them, `labels` among them).
        columns: as of :class:`Keeper`.
        alive: called with every batch.
        names: of the classes.
    """
    task, tasks = _task_and_tasks(objective, names)
    device = next(model.parameters()).device
    kept = []
    model.eval()
    with torch.no_grad():
        for ids, arrays in batches:
            alive()
            tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            outputs = model(**{name: tensor for name, tensor in tensors.items() if name != "labels"})
            found = task.predict(task.logits(outputs, tensors), tensors["labels"])
            numbers = {name: tensor.cpu().numpy() for name, tensor in found.items()}
            kept.append(_outcome(objective.kind, *_with_columns(ids, numbers, columns), tasks))
    return joined(objective.kind, kept)


def _task_and_tasks(objective: ObjectiveConfig, names: Sequence[str]) -> tuple[Task, tuple[Outputs, ...]]:
    """Of the kind alone: predictions are without what regularises."""
    tasks = outputs_of(objective.tasks, names) if objective.kind == "several" else ()
    return of_kind(ObjectiveConfig(kind=objective.kind, tasks=objective.tasks), names), tasks


def _with_columns(ids: IntArray, arrays: Arrays, columns: Columns | None) -> tuple[IntArray, Arrays, IntArray | None]:
    if columns is None:
        return ids, arrays, None
    # an empty place has a window too, whatever it is
    return ids, arrays, columns(np.maximum(ids, 0))


def gathered(own: Predictions) -> Predictions | None:
    """Those of all ranks in the order of their ids, on rank 0; None on the others. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _sorted(own)
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, box, dst=0)
    return None if box is None else _sorted(joined(own.kind, box))


def joined(kind: Kind, parts: Sequence[Predictions]) -> Predictions:
    """One after the other."""
    if not parts:
        return Predictions(kind, np.empty(0, dtype=np.int64), [], [])
    # a rank without a sample has no arrays
    filled = [part for part in parts if len(part.ids)] or [parts[0]]
    ids = np.concatenate([part.ids for part in filled])
    predicted, true = ([getattr(part, name) for part in filled] for name in ("predictions", "truths"))
    return Predictions(kind, ids, _concatenated(predicted), _concatenated(true), parts[0].tasks)


def _concatenated(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [one for part in parts for one in part]


def _sorted(all_of_them: Predictions) -> Predictions:
    order = np.argsort(all_of_them.ids, kind="stable")
    return _chosen(all_of_them, order)


def _chosen(whole: Predictions, rows: IntArray) -> Predictions:
    def of(values: Any) -> Any:
        return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows.tolist()]

    return replace(whole, ids=whole.ids[rows], predictions=of(whole.predictions), truths=of(whole.truths))


def _outcome(
    kind: Kind, ids: IntArray, arrays: Arrays, columns: IntArray | None, tasks: Sequence[Outputs] = ()
) -> Predictions:
    """What `Task.predict` gives for a batch, without empty places; each sample on its own.

    Args:
        columns: of questions, where the text of each window stands, [n, 2].
    """
    predicted: Any
    true: Any
    match kind:
        case "classification":
            predicted, true = softmax(arrays["logits"]), arrays["labels"]
        case "multi_label":
            predicted, true = sigmoid(arrays["logits"]), arrays["labels"]
        case "regression":
            predicted, true = arrays["values"].astype(np.float64), arrays["labels"].astype(np.float64)
        case "several":
            predicted, true = _by_task(arrays["logits"], tasks), arrays["labels"]
        case "token_classification":
            rows = list(zip(arrays["predictions"], arrays["labels"], strict=True))
            predicted = [row[labels >= 0].tolist() for row, labels in rows]
            true = [labels[labels >= 0].tolist() for _, labels in rows]
        case "question_answering":
            assert columns is not None
            windows = zip(arrays["start_logits"], arrays["end_logits"], columns.tolist(), strict=True)
            predicted = [_span(starts, ends, begin, end) for starts, ends, (begin, end) in windows]
            true = arrays["labels"].tolist()
        case _:
            predicted, true = arrays["loss"].astype(np.float64), arrays["num_targets"]
    return _chosen(Predictions(kind, ids, predicted, true, tuple(tasks)), np.flatnonzero(ids != EMPTY))


def _by_task(logits: NDArray[np.floating], tasks: Sequence[Outputs]) -> NDArray[np.float64]:
    """Probabilities of each task's classes, and the numbers of regressions, [n, C]."""
    scales: dict[str, Callable[[Any], FloatArray]] = {"classification": softmax, "multi_label": sigmoid}
    return np.concatenate(
        [scales.get(task.kind, np.float64)(logits[:, task.columns]) for task in tasks], axis=1, dtype=np.float64
    )


def _span(starts: NDArray[np.floating], ends: NDArray[np.floating], begin: int, end: int) -> Span:
    """The best answer of a window whose text stands in the columns [begin, end)."""
    nothing = float(starts[0]) + float(ends[0])
    if end <= begin:
        return nothing, -np.inf, 0, 0
    value, first, last = best_tokens(starts[begin:end], ends[begin:end])
    return nothing, value, begin + first, begin + last


def of_texts(found: Predictions, samples: LabelledSamples) -> Predictions:
    """One prediction a text, from those of its windows: probabilities and numbers are their mean, the words of all are
    put together, and an answer is the best of all (none, where some question has none and every window prefers that).

    Args:
        found: in the order of their ids.
    """
    document = samples.document_of(found.ids)
    groups = np.split(np.arange(len(document)), np.flatnonzero(np.diff(document)) + 1)
    first = np.array([group[0] for group in groups], dtype=np.int64)
    if isinstance(samples, QuestionSamples):
        truths = [list(samples.answers_of(sample)) for sample in found.ids[first].tolist()]
        may_be_none = not all(truths)
        return Predictions(
            found.kind, found.ids[first], [_answer(found, group, samples, may_be_none) for group in groups], truths
        )
    whole = _chosen(found, first)
    if len(groups) == len(document):
        return whole
    if isinstance(found.predictions, np.ndarray):
        together: Any = np.stack([found.predictions[group].mean(axis=0) for group in groups])
        return replace(whole, predictions=together)
    words, true = (
        [[word for row in group.tolist() for word in each[row]] for group in groups]
        for each in (found.predictions, found.truths)
    )
    return replace(whole, predictions=words, truths=true)


def _answer(found: Predictions, group: IntArray, samples: QuestionSamples, may_be_none: bool) -> str:
    spans: list[tuple[int, Span]] = [(int(found.ids[row]), found.predictions[row]) for row in group.tolist()]
    sample, (_, value, first, last) = max(spans, key=lambda one: one[1][1])
    if may_be_none and min(span[0] for _, span in spans) > value:
        return ""
    return samples.passage(sample, first, last)
