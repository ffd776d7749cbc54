"""Which texts of a batch are computed together: those alike in length, so that little is padding."""

from __future__ import annotations

import numpy as np

from trainer.records import IntArray


def alike_together(lengths: IntArray, micro: int, ranks: int, batch_index: int) -> IntArray:
    """The places of a batch in the order in which they are computed, [batch].

    The longest are computed first. In each micro-step the ranks have neighbours in length, and they change ends from
    one micro-step, and from one batch, to the next, so that none has more to do than the others for long.

    Args:
        lengths: tokens of each sample, [batch]; the batch is a multiple of micro · ranks.
    """
    # equal lengths keep their order
    places = np.argsort(-lengths, kind="stable").reshape(-1, ranks, micro)
    for step in range(len(places)):
        if (step + batch_index) % 2:
            places[step] = places[step, ::-1].copy()
    result: IntArray = places.reshape(-1)
    return result
