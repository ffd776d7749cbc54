"""Several tasks over one model: each has columns of its logits, and the texts of a batch are of any of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.config.objective import ObjectiveConfig, Outputs
from trainer.objectives.losses import (
    binary_cross_entropy_sum,
    cross_entropy_and_squared_partition,
    squared_error_sum,
)
from trainer.objectives.tasks import Sums, Task


class Several(Task):
    """A target a text: logits [B, C] and labels [B, C] float, NaN outside of the columns of a text's own task; an empty
    place: all NaN.

    The loss is Σ over texts of (weight of its task) · (loss of its task), as of multi-task networks (Liu et al. 2019,
    https://arxiv.org/abs/1901.11504). Every text goes through every column, so all ranks compute the same graph
    whatever texts they hold.
    """

    def __init__(self, tasks: Sequence[Outputs]):
        self._tasks = tuple(tasks)

    def targets(self, labels: Tensor) -> Tensor:
        return (~labels.isnan()).any(-1).long()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted; 0-dim fp32."""
        return self._sum(logits, labels, 0.0)

    def sums(self, config: ObjectiveConfig, class_weights: Tensor | None = None) -> Sums:  # noqa: ARG002
        smoothing = config.label_smoothing
        return lambda logits, labels: {"loss": self._sum(logits, labels, smoothing)}

    def _sum(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        # an empty sum: nothing of a task in the batch leaves zeros in its columns' gradient
        total = logits.float().sum() * 0.0
        for task in self._tasks:
            own_labels = labels[:, task.columns]
            rows = ~own_labels.isnan().any(-1)
            own, own_labels = logits[rows][:, task.columns], own_labels[rows]
            if not len(own):
                continue
            match task.kind:
                case "classification":
                    loss, _ = cross_entropy_and_squared_partition(own, own_labels.argmax(-1), smoothing=smoothing)
                case "multi_label":
                    loss = binary_cross_entropy_sum(own, own_labels, smoothing=smoothing)
                case _:
                    loss = squared_error_sum(own[:, 0], own_labels[:, 0])
            total = total + task.weight * loss
        return total

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """None: those of each task need its own number of texts."""
        return {}

    def predict(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`logits` [B, C] fp32 and `labels` [B, C]."""
        return {"logits": logits.float(), "labels": labels}

    def divergence(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError("R-Drop is refused for several tasks")
