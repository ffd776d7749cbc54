"""Penalties on weights, added to the reduced gradient: element by element, so exact in every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.engine.gradients import Shards

Penalty = Callable[[Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]]
"""1-D fp32 weights, and what they began as where that is kept → (gradient of the penalties, their values by name)."""


class Penalties:
    """The penalties of one run on this rank's shards.

    Args:
        acts: of each parameter, whether the penalty acts on it.
        keeps_starts: keep a copy of the weights as they are now.
    """

    def __init__(self, shards: Shards, penalty: Penalty, acts: Sequence[bool], *, keeps_starts: bool):
        self._shards = shards
        self._penalty = penalty
        self._acts = acts
        self._starts: list[Tensor | None] = [
            master.clone() if keeps_starts and acts[fragment.parameter] else None
            for fragment, master in zip(shards.fragments, shards.masters(), strict=True)
        ]

    @torch.no_grad()
    def add(self, loss_scale: float, num_targets: int) -> dict[str, Tensor]:
        """Add their gradient to this rank's shards. Returns their values, each times `num_targets`."""
        shards = self._shards
        sums: dict[str, Tensor] = {}
        for fragment, gradient, weight, start in zip(
            shards.fragments, shards.gradients(), shards.masters(), self._starts, strict=True
        ):
            if not self._acts[fragment.parameter]:
                continue
            slope, values = self._penalty(weight, start)
            gradient.add_(slope.to(gradient.dtype), alpha=loss_scale)
            if fragment.counted:
                for name, value in values.items():
                    # the terms are divided by the number of targets later on; a penalty is not a mean over them
                    value = value.double() * max(num_targets, 1)
                    sums[name] = sums[name] + value if name in sums else value
        return sums
