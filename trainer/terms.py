"""What an objective makes of a micro-batch: the record between the losses and the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Model = Callable[..., Any]
"""Called with the tensors of a micro-batch by name; what transformers' models return."""
See = Callable[[Tensor], None]
"""Shown output logits as they are made, any shape: for the largest of them."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Sums over the targets of a micro-batch, each 0-dim."""

    total: Tensor
    """All that is minimised, with its gradient."""
    sums: dict[str, Tensor]
    """`loss`, the main one, and the other parts: recorded and guarded, each in a channel of its own."""
    measures: dict[str, Tensor] = field(default_factory=dict)
    """Recorded only."""


class Objective(Protocol):
    """What is minimised."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of `Terms.sums` beside `loss`."""
        ...

    @property
    def minimised(self) -> tuple[str, ...]:
        """Names of what the total is made of."""
        ...

    def alone(self, name: str) -> Objective:
        """The same with the total of only this one of `minimised`, as it enters the whole."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of `Terms.measures`."""
        ...

    def __call__(self, model: Model, tensors: Mapping[str, Tensor], see: See) -> Terms:
        """
        Args:
            tensors: arrays of the micro-batch by name, `labels` among them.
        """
        ...

    def targets(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Number of targets of each sample, [B] int64; 0: nothing to learn, or an empty place of an evaluation."""
        ...

    def evaluate(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the targets, each 0-dim: `loss`, the task's own, and scores such as `accuracy`."""
        ...

    def predict(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What scores are made of, by name, each [B, …]: `logits` [B, C] and `labels` (classes of texts), `values` [B]
        and `labels` (regression), `predictions` and `labels` [B, L] (classes of words), `start_logits`, `end_logits`
        [B, L] and `labels` [B, 2] (answers); of language models `loss`, summed over the sample's targets, and
        `num_targets`, both [B]. Empty places are among them."""
        ...

    def sample_losses(self, model: Model, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of the main loss over the targets of each sample, [B], from one forward pass."""
        ...
