"""What each kind of objective makes of a model's outputs and of the labels: losses, scores, predictions, all sums over
targets. :mod:`trainer.objectives.objective` puts them together with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.config.objective import ObjectiveConfig, meaningless
from trainer.errors import ConfigError
from trainer.objectives.losses import (
    binary_cross_entropy_sum,
    cross_entropy_and_squared_partition,
    cross_entropy_sum,
    squared_error_sum,
    symmetric_binary_kl_sum,
    symmetric_kl_sum,
)

Sums = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(logits as :meth:`Task.logits` makes them, labels) → terms by name, each a 0-dim fp32 sum over the targets of the
batch; `loss` is the main one and always there."""


class Task:
    """A class a target, among the last dimension of the logits: what language models predict, and the base of others.

    Shapes of logits and labels: [B, T, V] and [B, T] int64 (already shifted), of texts [B, C] and [B]; −100: no target.
    """

    def logits(self, outputs: Any, tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """What the losses are made of, [B, …], from what the model returns for the tensors."""
        logits: Tensor = outputs.logits
        return logits

    def targets(self, labels: Tensor) -> Tensor:
        """Number of targets of each sample, [B] int64; 0: an empty place of an evaluation."""
        return (labels >= 0).reshape(len(labels), -1).sum(-1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task's own loss, summed over the targets: 0-dim fp32."""
        return cross_entropy_sum(logits, labels)

    def sums(self, config: ObjectiveConfig, class_weights: Tensor | None = None) -> Sums:
        """What is minimised: the loss with label smoothing, class weights [C] and z-loss as `config` asks for."""
        smoothing, z_loss = config.label_smoothing, config.z_loss
        if not (smoothing or z_loss or class_weights is not None):
            return lambda logits, labels: {"loss": self.loss(logits, labels)}
        weights = None if class_weights is None else Weights(class_weights)

        def sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
            factors = None if weights is None else weights.on(logits.device)
            loss, squared = cross_entropy_and_squared_partition(
                logits, labels, smoothing=smoothing, class_weights=factors
            )
            return {"loss": loss, "z_loss": z_loss * squared} if z_loss else {"loss": loss}

        return sums

    def divergence(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """(KL(p‖q) + KL(q‖p)) / 2 of the predictions of two passes, summed over the targets: 0-dim fp32."""
        return symmetric_kl_sum(first, second, labels)

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What else an evaluation says, by name: sums over the targets, 0-dim."""
        return {"accuracy": (logits.argmax(dim=-1) == labels).sum()}

    def predict(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What scores are made of, by name, [B, …]: here `loss` [B] fp32, summed over the sample's targets, and
        `num_targets` [B] int64."""
        rows = (slice(row, row + 1) for row in range(len(labels)))
        losses = torch.stack([self.loss(logits[row], labels[row]) for row in rows])
        return {"loss": losses, "num_targets": self.targets(labels)}


class Classification(Task):
    """One class a text: logits [B, C], labels [B]."""

    def predict(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`logits` [B, C] fp32 and `labels` [B]."""
        return {"logits": logits.float(), "labels": labels}


class TokenClassification(Task):
    """One class a word: logits [B, L, C], labels [B, L], ≥ 0 at the first token of each word."""

    def predict(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`predictions` [B, L] int64, the most probable class at each token, and `labels` [B, L]."""
        return {"predictions": logits.argmax(-1), "labels": labels}


class MultiLabel(Task):
    """Any number of classes a text: logits [B, C], labels [B, C] float of 0 and 1; an empty place: all −100."""

    def targets(self, labels: Tensor) -> Tensor:
        return (labels[:, 0] >= 0).long()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy_sum(logits, labels)

    def sums(self, config: ObjectiveConfig, class_weights: Tensor | None = None) -> Sums:  # noqa: ARG002
        smoothing = config.label_smoothing
        return lambda logits, labels: {"loss": binary_cross_entropy_sum(logits, labels, smoothing=smoothing)}

    def divergence(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        return symmetric_binary_kl_sum(first, second, labels)

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`accuracy`: texts of which every class is told right."""
        return {"accuracy": ((logits > 0) == labels).all(-1).sum()}

    def predict(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`logits` [B, C] fp32 and `labels` [B, C]."""
        return {"logits": logits.float(), "labels": labels}


class Regression(Task):
    """A number a text: values [B], labels [B] float; an empty place: NaN."""

    def logits(self, outputs: Any, tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        values: Tensor = outputs.logits.squeeze(-1)
        return values

    def targets(self, labels: Tensor) -> Tensor:
        return (~labels.isnan()).long()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return squared_error_sum(logits, labels)

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`absolute_error`"""
        return {"absolute_error": (logits.float() - labels.float()).abs().nansum()}

    def predict(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`values` [B] fp32 and `labels` [B]."""
        return {"values": logits.float(), "labels": labels}


class QuestionAnswering(Task):
    """The first and the last token of an answer: logits [B, 2, L], labels [B, 2]; one target a window, whose loss is
    the mean of both cross-entropies. Padding is left out of the distributions, so that the loss of a window does not
    depend on the length of others; without padding it is that of transformers."""

    def logits(self, outputs: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        both = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        mask = tensors.get("attention_mask")
        if mask is None:
            return both
        return both.masked_fill(mask[:, None, :] == 0, torch.finfo(both.dtype).min)

    def targets(self, labels: Tensor) -> Tensor:
        return (labels >= 0).all(-1).long()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) / 2.0

    def sums(self, config: ObjectiveConfig, class_weights: Tensor | None = None) -> Sums:
        if not config.z_loss:
            return lambda logits, labels: {"loss": self.loss(logits, labels)}
        both = super().sums(config, class_weights)
        return lambda logits, labels: {name: value / 2.0 for name, value in both(logits, labels).items()}

    def divergence(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        return super().divergence(first, second, labels) / 2.0

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`accuracy`: windows of which both tokens are the most probable."""
        return {"accuracy": (logits.argmax(dim=-1) == labels).all(-1).sum()}

    def predict(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`start_logits` and `end_logits` [B, L] fp32, least at padding, and `labels` [B, 2]."""
        start, end = logits.float().unbind(1)
        return {"start_logits": start, "end_logits": end, "labels": labels}


class Weights:
    """Of classes: kept on the device that asks for them."""

    def __init__(self, values: Tensor):
        self._values = values

    def on(self, device: torch.device) -> Tensor:
        if self._values.device != device:
            self._values = self._values.to(device)
        return self._values


_TASKS: dict[str, Task] = {
    "causal": Task(),
    "masked": Task(),
    "seq2seq": Task(),
    "classification": Classification(),
    "multi_label": MultiLabel(),
    "regression": Regression(),
    "token_classification": TokenClassification(),
    "question_answering": QuestionAnswering(),
    # which needs to know its tasks: see trainer.objectives.several
    "several": Task(),
}


def task_of(config: ObjectiveConfig) -> Task:
    """
    Raises:
        ConfigError: an option that has no meaning for the kind.
    """
    if problems := meaningless(config):
        raise ConfigError(problems)
    return _TASKS[config.kind]


def balanced_weights(class_counts: Tensor) -> Tensor:
    """Factor on the loss of a target of each class, [C] fp32: N / (C' · n_c) with n_c targets of class c, N of all and
    C' classes that have any; 0 for a class without any. Their mean over the training targets is 1, so that the loss
    stays a mean over the number of targets.

    Args:
        class_counts: [C], of the training split.
    """
    counts = class_counts.double()
    present = counts > 0
    weights = counts.sum() / (present.sum().clamp(min=1) * counts.where(present, 1.0))
    return weights.where(present, 0.0).float()
