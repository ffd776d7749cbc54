"""Objectives over the outputs of a model: of language models, and of the tasks that fine-tuning knows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from trainer.config.objective import ObjectiveConfig, outputs_of
from trainer.objectives.several import Several
from trainer.objectives.tasks import Sums, Task, balanced_weights, task_of
from trainer.records import Classes
from trainer.terms import Model, See, Terms


class LogitObjective:
    """What follows from the model's outputs and the labels alone; the total is the sum of the terms.

    Args:
        sums: makes the terms.
        parts: their names but `loss`.
        task: what the kind makes of outputs and labels.
        r_drop: weight α of the divergence between two passes with different dropout; 0: one pass. The other terms are
            the mean over both passes (R-Drop, Liang et al. 2021, https://arxiv.org/abs/2106.14448, algorithm 1: the
            samples go through the model twice in one pass). Eq. 4 there adds the cross-entropies of both, so its α is
            twice this one, on a loss twice as large.
    """

    measures: tuple[str, ...] = ()

    def __init__(self, sums: Sums, parts: Sequence[str] = (), task: Task | None = None, r_drop: float = 0.0):
        self.sums = sums
        self.parts = (*parts, "r_drop") if r_drop else tuple(parts)
        self.minimised = ("loss", *self.parts)
        self.task = task or Task()
        self._r_drop = r_drop
        self._total: Callable[[dict[str, Tensor]], Tensor] = sum_of

    def alone(self, name: str) -> LogitObjective:
        result = copy.copy(self)
        result._total = itemgetter(name)
        return result

    def __call__(self, model: Model, tensors: Mapping[str, Tensor], see: See) -> Terms:
        if self._r_drop:
            tensors = twice(tensors)
        logits, labels = self._outputs(model, tensors)
        see(logits)
        terms = self.sums(logits, labels)
        if self._r_drop:
            terms = {name: value / 2.0 for name, value in terms.items()}
            (first, second), (labels, _) = logits.chunk(2), labels.chunk(2)
            terms["r_drop"] = self._r_drop * self.task.divergence(first, second, labels)
        return Terms(self._total(terms), terms)

    def targets(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.task.targets(tensors["labels"])

    def evaluate(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = self._outputs(model, tensors)
        return {"loss": self.task.loss(logits, labels), **self.task.scores(logits, labels)}

    def predict(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.task.predict(*self._outputs(model, tensors))

    def sample_losses(self, model: Model, tensors: Mapping[str, Tensor]) -> Tensor:
        passes = 2 if self._r_drop else 1
        logits, labels = self._outputs(model, twice(tensors) if self._r_drop else tensors)
        rows = (slice(row, row + 1) for row in range(len(labels)))
        losses = torch.stack([self.sums(logits[row], labels[row])["loss"] for row in rows])
        return losses.view(passes, -1).mean(0)

    def _outputs(self, model: Model, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits as the task has them, and the labels."""
        inputs = {name: tensor for name, tensor in tensors.items() if name != "labels"}
        return self.task.logits(model(**inputs), tensors), tensors["labels"]


def make_objective(
    config: ObjectiveConfig, *, classes: Classes | None = None, class_counts: Tensor | None = None
) -> LogitObjective:
    """The objective of `config`; next-token, masked and sequence-to-sequence runs differ in their labels only.

    Terms: `loss`, with label smoothing and class weights; with `z_loss` on also `z_loss`: its weight times Σ log²Z, and
    with `r_drop` on `r_drop`: its weight times the divergence, as they enter the total. Evaluations, and what
    `predict` gives, are without any of these.

    Args:
        classes: of the data, where it has some.
        class_counts: training targets (texts, or words) of each class, [classes]; for `class_weights: balanced`.

    Raises:
        ConfigError: an option that has no meaning for the kind.
        ValueError: balanced weights without counts, or with counts of another number of classes.
    """
    task = of_kind(config, classes.names if classes else ())
    weights = None
    if config.class_weights == "balanced":
        if class_counts is None or (classes is not None and len(class_counts) != len(classes.names)):
            raise ValueError("balanced class weights need the number of training targets of every class")
        weights = balanced_weights(class_counts)
    parts = ("z_loss",) if config.z_loss else ()
    return LogitObjective(task.sums(config, weights), parts, task, config.r_drop)


def of_kind(config: ObjectiveConfig, names: Sequence[str] = ()) -> Task:
    """What the kind of `config` makes of outputs and labels.

    Args:
        names: of the outputs; needed where there are several tasks.

    Raises:
        ConfigError: an option that has no meaning for the kind.
    """
    task = task_of(config)
    return Several(outputs_of(config.tasks, names)) if config.kind == "several" else task


def twice(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The samples of a micro-batch two times over, [2B, …]: dropout tells the halves apart."""
    return {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}


def sum_of(terms: Mapping[str, Tensor]) -> Tensor:
    """The terms added up, in the order of their names' insertion."""
    values = iter(terms.values())
    total = next(values)
    for value in values:
        total = total + value
    return total
