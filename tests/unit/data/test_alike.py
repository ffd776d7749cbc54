"""Texts alike in length are computed together, and nothing else about a batch changes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.alike import alike_together


@settings(deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_no_order_has_less_padding(data, micro, ranks, steps, batch_index):
    size = micro * ranks * steps
    lengths = np.array(data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size)))
    places = alike_together(lengths, micro, ranks, batch_index)
    assert sorted(places.tolist()) == list(range(size))
    found = lengths[places].reshape(-1, micro).max(axis=1).sum()
    # the longest of every micro-batch, where each holds neighbours in length
    assert found == np.sort(lengths)[::-1][::micro].sum()


def test_ranks_take_turns_at_the_longer_end():
    lengths = np.arange(8)
    first, second = (lengths[alike_together(lengths, 2, 2, batch)].reshape(2, 2, 2) for batch in (0, 1))
    assert first.tolist() == [[[7, 6], [5, 4]], [[1, 0], [3, 2]]]
    assert second.tolist() == [[[5, 4], [7, 6]], [[3, 2], [1, 0]]]


def test_equal_lengths_stay_in_their_order():
    assert alike_together(np.full(6, 3), 3, 1, 0).tolist() == list(range(6))
