"""Predictions of held-out samples, brought to one place by their ids and scored there once.

Scores over several ranks are those of one process to the last digit: micro-batch k of an evaluation holds the same
samples whatever the number of ranks, and what is added up is added up in the order of the samples, on one rank. With
another micro-batch size the sums inside the model are made in another order: predictions then agree within rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.objective import Kind, ObjectiveConfig
from trainer.objectives.tasks import Task, task_of
from trainer.records import IntArray
from trainer.scores.answers import Window, best_span
from trainer.scores.classes import sigmoid, softmax
from trainer.scores.score import score
from trainer.scores.scores import Scores

SCORED: frozenset[Kind] = frozenset(
    {"classification", "multi_label", "regression", "token_classification", "question_answering"}
)
"""Kinds whose scores need the prediction of each sample; those of the others are sums over targets."""
EMPTY = -1
"""Id of a place of a micro-batch that holds no sample."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts for samples, and what is true of them, as :mod:`trainer.scores` takes them."""

    kind: Kind
    ids: IntArray
    """[samples]"""
    predictions: Any
    """An array [samples, …], or a list of one entry a sample."""
    truths: Any

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
    """

    def __init__(self, objective: ObjectiveConfig, ids: Iterable[IntArray]):
        self._kind = objective.kind
        self._task: Task = task_of(ObjectiveConfig(kind=objective.kind))
        self._ids = iter(ids)
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
        self._kept.append(_outcome(self._kind, next(self._ids), numbers))


def predictions(
    model: torch.nn.Module,
    objective: ObjectiveConfig,
    batches: Iterable[tuple[IntArray, dict[str, NDArray[Any]]]],
    alive: Callable[[], None] = lambda: None,
) -> Predictions:
    """What a model predicts, of this process's batches.

    Args:
        model: on its device; put into evaluation mode.
        batches: (ids [n], arrays [n, …] as the objective's kind has them, `labels` among them).
        alive: called with every batch.
    """
    task = task_of(ObjectiveConfig(kind=objective.kind))
    device = next(model.parameters()).device
    kept = []
    model.eval()
    with torch.no_grad():
        for ids, arrays in batches:
            alive()
            tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            outputs = model(**{name: tensor for name, tensor in tensors.items() if name != "labels"})
            found = task.predict(task.logits(outputs, tensors), tensors["labels"])
            kept.append(_outcome(objective.kind, ids, {name: t.cpu().numpy() for name, t in found.items()}))
    return joined(objective.kind, kept)


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
    return Predictions(kind, ids, _concatenated(predicted), _concatenated(true))


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

    return Predictions(whole.kind, whole.ids[rows], of(whole.predictions), of(whole.truths))


def _outcome(kind: Kind, ids: IntArray, arrays: Arrays) -> Predictions:
    """What `Task.predict` gives for a batch, without empty places; each sample on its own."""
    predicted: Any
    true: Any
    match kind:
        case "classification":
            predicted, true = softmax(arrays["logits"]), arrays["labels"]
        case "multi_label":
            predicted, true = sigmoid(arrays["logits"]), arrays["labels"]
        case "regression":
            predicted, true = arrays["values"].astype(np.float64), arrays["labels"].astype(np.float64)
        case "token_classification":
            rows = list(zip(arrays["predictions"], arrays["labels"], strict=True))
            predicted = [row[labels >= 0].tolist() for row, labels in rows]
            true = [labels[labels >= 0].tolist() for _, labels in rows]
        case "question_answering":
            both = zip(arrays["start_logits"], arrays["end_logits"], strict=True)
            predicted = [_tokens(*_span(starts, ends)) for starts, ends in both]
            true = [[_tokens(first, last + 1)] for first, last in arrays["labels"].tolist()]
        case _:
            predicted, true = arrays["loss"].astype(np.float64), arrays["num_targets"]
    return _chosen(Predictions(kind, ids, predicted, true), np.flatnonzero(ids != EMPTY))


def _span(starts: NDArray[np.floating], ends: NDArray[np.floating]) -> tuple[int, int]:
    """Tokens [first, behind the last) of a window's answer; the first token alone: there is none in it."""
    places = [(place, place + 1) for place in range(len(starts))]
    return best_span([Window(starts, ends, places)])


def _tokens(first: int, end: int) -> str:
    """An answer in numbers of tokens, so that windows are scored as texts are; empty: none."""
    return "" if end <= 1 else " ".join(map(str, range(first, end)))
