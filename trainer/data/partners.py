"""Whom a sample is mixed with, how much of it stays, and its own seed: functions of (seed, place in the data).

Nothing here knows ranks or micro-batches, so nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from trainer.data import keyed
from trainer.records import PARTNER, SHARE, IntArray

_SHIFT, _SHARE, _DRAW = 71, 72, 73

Arrays = dict[str, NDArray[Any]]
Fetch = Callable[[IntArray, IntArray], Arrays]
"""From ids [n] and positions [n] of samples to arrays [n, …] of them."""


class Partners:
    """Pairs for mixup (Zhang et al. 2018, https://arxiv.org/abs/1710.09412), within each global batch.

    The partner of a sample stands some places further on in its batch, the last ones' at its beginning: every sample
    is the partner of one, and none its own unless the batch is one sample. How far is drawn for each batch.

    Args:
        batch: samples in a global batch.
        alpha: of the Beta(α, α) distribution of λ.
    """

    def __init__(self, seed: int, batch: int, alpha: float):
        self._batch, self._alpha = batch, alpha
        self._shift_key, self._share_key = keyed.key(seed, _SHIFT), keyed.key(seed, _SHARE)

    def of(self, batch_index: int, places: IntArray) -> IntArray:
        """Places in the batch of the partners of `places`, [n]."""
        if self._batch == 1:
            return places
        drawn = keyed.derive(self._shift_key, np.array([batch_index]))[0]
        shift = 1 + int(drawn % np.uint64(self._batch - 1))
        return (places + shift) % self._batch

    def shares(self, positions: IntArray) -> NDArray[np.float32]:
        """λ of the samples at these positions of the data, [n]: quantiles of Beta(α, α)."""
        words = keyed.derive(self._share_key, positions)
        # the middle of one of 2⁵³ equal steps: neither 0 nor 1
        quantiles = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        shares: NDArray[np.float32] = betaincinv(self._alpha, self._alpha, quantiles).astype(np.float32)
        return shares

    def arrays(self, batch_index: int, ids: IntArray, positions: IntArray, places: IntArray, fetch: Fetch) -> Arrays:
        """What stands in a micro-batch beside the samples at `places`: `partner_…` and λ, each [n, …].

        Args:
            ids, positions: of the whole batch, [batch].
            fetch: arrays of samples; a partner is what it is at its own place, augmented alike.
        """
        partners = self.of(batch_index, places)
        found = fetch(ids[partners], positions[partners])
        return {**{PARTNER + name: array for name, array in found.items()}, SHARE: self.shares(positions[places])}


def draw_keys(seed: int, positions: IntArray) -> IntArray:
    """A seed of each sample, [n] in 0 … 2⁶³ − 1, for what is drawn for it while it is trained on."""
    return (keyed.derive(keyed.key(seed, _DRAW), positions) >> np.uint64(1)).astype(np.int64)


def trimmed_together(arrays: Arrays, trim: Callable[[Arrays], Arrays]) -> Arrays:
    """A micro-batch with partners, both cut to the longest sample of either.

    Args:
        arrays: as samples and partners were fetched, both of the same number of columns.
        trim: cuts arrays to the longest sample of their `attention_mask`; arrays of [n] stay.
    """
    groups: dict[str, Arrays] = {"": {}, PARTNER: {}}
    for name, array in arrays.items():
        prefix = PARTNER if name.startswith(PARTNER) else ""
        groups[prefix][name.removeprefix(prefix)] = array
    united = np.maximum(*(group["attention_mask"] for group in groups.values()))
    result: Arrays = {}
    for prefix, group in groups.items():
        cut = trim({**group, "attention_mask": united})
        cut["attention_mask"] = group["attention_mask"][:, : cut["attention_mask"].shape[1]]
        result |= {prefix + name: array for name, array in cut.items()}
    return result
