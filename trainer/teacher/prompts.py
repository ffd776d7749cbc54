"""Which stretches of packed samples a teacher has to read as texts of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.records import IntArray

IGNORED = -100
"""Label of a token that is not predicted."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens [begin, end) of sample `row`."""

    row: int
    begin: int
    end: int


def prompts_of(input_ids: IntArray, position_ids: IntArray | None, labels: IntArray | None) -> list[Prompt]:
    """One prompt a document where positions restart (attention stays inside documents), else one a sample.

    Each ends with its last predicted position; where nothing is predicted there is none.

    Args:
        input_ids: [n, L].
        position_ids: [n, L], 0 where a document begins; None: documents are read on.
        labels: [n, L], −100 where nothing is predicted; None: everything is.
    """
    result = []
    num_samples, length = input_ids.shape
    for row in range(num_samples):
        begins = np.array([0]) if position_ids is None else np.union1d([0], np.flatnonzero(position_ids[row] == 0))
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), length], strict=True):
            if labels is not None:
                predicted = np.flatnonzero(labels[row, begin:end] != IGNORED)
                end = begin + int(predicted[-1]) + 1 if len(predicted) else begin
            if end > begin:
                result.append(Prompt(row, begin, end))
    return result
