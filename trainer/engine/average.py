"""Exponential moving average of the weights: fp32, cut over the ranks as the master weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.engine.gradients import Shards

_CHUNK = 1 << 22
"""Elements that are exchanged at once: the memory that putting the average in takes."""


class Average:
    """mean ← mean + (1 − decay) · (weights − mean) after each update; it begins at the weights that the run begins
    with. The rule of `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`, first updated before training.

    Attributes:
        flats: aligned with `shards.flats()`.
    """

    def __init__(self, shards: Shards, decay: float):
        self._shards = shards
        self._decay = decay
        self.flats: list[Tensor] = [flat.clone() for flat in shards.flats()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step that was applied."""
        torch._foreach_lerp_(self.flats, self._shards.flats(), 1 - self._decay)

    @contextmanager
    def in_place(self, settle: Callable[[], object]) -> Iterator[None]:
        """Within it the model computes with the average; then the training state has the bits that it had. A
        collective.

        Args:
            settle: waits until nobody reads the training state.
        """
        settle()
        self._exchange()
        self._shards.publish()
        try:
            yield
        except BaseException:
            # other ranks may not be here: no collective
            self._exchange()
            raise
        self._exchange()
        self._shards.publish()

    @torch.no_grad()
    def _exchange(self) -> None:
        for flat, mean in zip(self._shards.flats(), self.flats, strict=True):
            for ours, theirs in zip(torch.split(flat, _CHUNK), torch.split(mean, _CHUNK), strict=True):
                held = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(held)
