"""Masked-language-model samples: of the chosen tokens 80 % are masked, 10 % random and 10 % kept.

Devlin et al. 2018, https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data import keyed
from trainer.data.samples import IGNORED, Samples
from trainer.errors import DataError
from trainer.records import IntArray

_MASKING = 3


@dataclass(frozen=True)
class Masking:
    """Chooses what is masked: a pure function of (seed, sample, visit), the same on every rank."""

    samples: Samples
    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if self.samples.mask_id is None:
            raise DataError("the tokenizer has no mask token, which the masked objective needs: use another tokenizer")

    def num_chosen(self, num_ordinary: IntArray) -> IntArray:
        """Predicted tokens of samples that have so many tokens besides end-of-text and padding, [n] → [n]."""
        wanted: IntArray = np.rint(self.fraction * num_ordinary).astype(np.int64)
        return np.minimum(num_ordinary, np.maximum(1, wanted))

    def num_targets(self, ids: IntArray) -> int:
        """Tokens that `fetch(ids, …)` predicts, whatever the visits; found without reading a token."""
        return int(self.num_chosen(self.samples.num_ordinary(ids)).sum())

    def fetch(self, ids: IntArray, visits: IntArray) -> dict[str, IntArray]:
        """Inputs and labels, each [n, L]; labels are −100 but at the chosen tokens, which stand in their own place.

        Args:
            visits: [n]; another number gives the same sample another mask.
        """
        windows = self.samples.windows(ids)
        tokens = windows.tokens[:, :-1]
        # a token is its document's last, end-of-text, when the next one begins a document
        ordinary = windows.valid[:, :-1] & (windows.place[:, 1:] != 0)
        columns = np.arange(tokens.shape[1])
        keys = keyed.derive(keyed.derive(keyed.key(self.seed, _MASKING), ids), visits)
        scores = keyed.derive(keys[:, None], columns)
        ranking = np.argsort(np.where(ordinary, scores, np.uint64(2**64 - 1)), axis=1, kind="stable")
        chosen = np.zeros(tokens.shape, dtype=np.bool_)
        np.put_along_axis(chosen, ranking, columns < self.num_chosen(ordinary.sum(axis=1))[:, None], axis=1)

        dice = keyed.derive(scores, columns) >> np.uint64(8)
        of_ten, pick = dice % np.uint64(10), dice // np.uint64(10)
        replacements = self.samples.ordinary_ids[pick % np.uint64(len(self.samples.ordinary_ids))]
        inputs = np.where(chosen & (of_ten < 8), np.int64(self.samples.mask_id or 0), tokens)
        inputs = np.where(chosen & (of_ten == 8), replacements, inputs)
        return {
            "input_ids": inputs,
            "labels": np.where(chosen, tokens, IGNORED),
            **self.samples.context(windows, causal=False),
        }
