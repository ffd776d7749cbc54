"""Conversations as packed samples: like any text, but only the answers are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.samples import IGNORED, Samples, SourceTokens
from trainer.records import IntArray


class AnswerSamples(Samples):
    """The samples of one split; the first token of a document is never predicted."""

    def __init__(self, sources: Sequence[SourceTokens], marks: Sequence[NDArray[Any]], **options: Any):
        """
        Args:
            marks: [tokens] of each source, 0 or 1: whether the token is learned.
        """
        self._marks = tuple(marks)
        super().__init__(sources, **options)

    def fetch(self, ids: IntArray) -> dict[str, IntArray]:
        """Inputs and labels for predicting the next token, each [n, L]; −100 where that is not of an answer."""
        arrays = super().fetch(ids)
        learned = np.zeros(arrays["labels"].shape, dtype=np.bool_)
        for index, rows, local in self._places(ids):
            places = local[:, None] * self.sequence_length + np.arange(1, self.sequence_length + 1)
            marks = self._marks[index]
            learned[rows] = (places < len(marks)) & (marks[np.minimum(places, len(marks) - 1)] != 0)
        return {**arrays, "labels": np.where(learned, arrays["labels"], IGNORED)}

    def num_targets(self, ids: IntArray) -> int:
        """Tokens that `fetch(ids)` predicts; reads a byte a token."""
        total = 0
        for index, _, local in self._places(ids):
            for first in (local * self.sequence_length + 1).tolist():
                total += int(np.count_nonzero(self._marks[index][first : first + self.sequence_length]))
        return total
