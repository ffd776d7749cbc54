"""Which samples of a batch the student writes the end of itself: a pure function of (seed, place in the data)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data import keyed
from trainer.data.samples import Samples
from trainer.knowledge import DATA_SHARE, WRITTEN
from trainer.records import IntArray

_WRITING = 7


@dataclass(frozen=True)
class OnPolicy:
    """Chooses samples; independent of world size and micro-batch.

    Args:
        fraction: of the samples, on average.
        tokens: written at the end of a chosen sample.
    """

    samples: Samples
    fraction: float
    tokens: int
    seed: int

    def chosen(self, ids: IntArray, visits: IntArray) -> NDArray[np.bool_]:
        """[n]: whether the end of a sample is written by the student. Those that are not full are not: there is no end
        to be written."""
        dice = keyed.derive(keyed.derive(keyed.key(self.seed, _WRITING), ids), visits)
        is_full = [self.samples.num_targets(ids[i : i + 1]) == self.samples.sequence_length for i in range(len(ids))]
        return (dice.astype(np.float64) / 2.0**64 < self.fraction) & np.array(is_full, dtype=np.bool_)

    def arrays(self, ids: IntArray, visits: IntArray, own: IntArray) -> dict[str, NDArray[Any]]:
        """What tells the objective of it, for the rows `own` of a global batch.

        Args:
            ids, visits: of the *global* batch, [global_batch].
            own: [n], places in it.

        Returns:
            `WRITTEN` [n, L] and `DATA_SHARE` [n, 1], see there.
        """
        chosen = self.chosen(ids, visits)
        length = self.samples.sequence_length
        targets = self.samples.num_targets(ids)
        # the token before the first written one has it as its label
        from_data = targets - int(chosen.sum()) * (self.tokens + 1)
        labels = np.arange(length) >= length - self.tokens - 1
        share = np.full((len(own), 1), from_data / max(targets, 1), dtype=np.float32)
        return {WRITTEN: chosen[own][:, None] & labels[None, :], DATA_SHARE: share}
