"""The objective of a run: named sums over the targets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainer.config.schema import ObjectiveConfig
from trainer.objectives.losses import cross_entropy_and_squared_partition, cross_entropy_sum

Objective = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(logits [B, T, V], labels [B, T] int64, already shifted, −100: no target) → terms by name, each a 0-dim fp32 sum over
the targets of the batch; `loss` is the cross-entropy in nats and always there."""


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of `config`; next-token and masked runs differ in their labels only.

    Terms: `loss`, and with `z_loss` on also `z_loss`: its weight times Σ log²Z, as it enters the total.
    """
    weight = config.z_loss
    if not weight:
        return _plain

    def with_z_loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        cross_entropy, squared_partition = cross_entropy_and_squared_partition(logits, labels)
        return {"loss": cross_entropy, "z_loss": weight * squared_partition}

    return with_z_loss


def _plain(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": cross_entropy_sum(logits, labels)}
