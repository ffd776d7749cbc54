"""The objective of language models over whole logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from trainer.config.objective import ObjectiveConfig
from trainer.objectives.losses import cross_entropy_and_squared_partition, cross_entropy_sum
from trainer.terms import Model, See, Terms

Sums = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(logits [B, T, V], labels [B, T] int64, already shifted, −100: no target) → terms by name, each a 0-dim fp32 sum over
the targets of the batch; `loss` is the cross-entropy in nats and always there."""


class LogitObjective:
    """What follows from the model's logits and the labels alone; the total is the sum of the terms.

    Args:
        sums: makes the terms.
        parts: their names but `loss`.
    """

    measures: tuple[str, ...] = ()

    def __init__(self, sums: Sums, parts: Sequence[str] = ()):
        self.sums = sums
        self.parts = tuple(parts)
        self.minimised = ("loss", *self.parts)
        self._total: Callable[[dict[str, Tensor]], Tensor] = sum_of

    def alone(self, name: str) -> LogitObjective:
        result = LogitObjective(self.sums, self.parts)
        result._total = itemgetter(name)
        return result

    def __call__(self, model: Model, tensors: Mapping[str, Tensor], see: See) -> Terms:
        logits, labels = logits_and_labels(model, tensors)
        see(logits)
        terms = self.sums(logits, labels)
        return Terms(self._total(terms), terms)

    def evaluate(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = logits_and_labels(model, tensors)
        right = (logits.argmax(dim=-1) == labels).sum()
        return {"loss": self.sums(logits, labels)["loss"], "accuracy": right}

    def sample_losses(self, model: Model, tensors: Mapping[str, Tensor]) -> Tensor:
        logits, labels = logits_and_labels(model, tensors)
        rows = (slice(row, row + 1) for row in range(len(labels)))
        return torch.stack([self.sums(logits[row], labels[row])["loss"] for row in rows])


def make_objective(config: ObjectiveConfig) -> LogitObjective:
    """The objective of `config`; next-token and masked runs differ in their labels only.

    Terms: `loss`, and with `z_loss` on also `z_loss`: its weight times Σ log²Z, as it enters the total.
    """
    weight = config.z_loss
    if not weight:
        return LogitObjective(_plain)

    def with_z_loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        cross_entropy, squared_partition = cross_entropy_and_squared_partition(logits, labels)
        return {"loss": cross_entropy, "z_loss": weight * squared_partition}

    return LogitObjective(with_z_loss, ("z_loss",))


def logits_and_labels(model: Model, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """([B, T, V], [B, T]); of a classifier ([B, C], [B])."""
    inputs = {name: tensor for name, tensor in tensors.items() if name != "labels"}
    return model(**inputs).logits, tensors["labels"]


def sum_of(terms: Mapping[str, Tensor]) -> Tensor:
    """The terms added up, in the order of their names' insertion."""
    values = iter(terms.values())
    total = next(values)
    for value in values:
        total = total + value
    return total


def _plain(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": cross_entropy_sum(logits, labels)}
