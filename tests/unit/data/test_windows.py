"""Long texts: windows cover every token, pairs are cut as transformers does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trainer.data.windows import Reading, cut_pair
from trainer.errors import DataError


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_cover_every_token_and_overlap_by_the_stride(length: int, room: int, data: st.DataObject) -> None:
    reading = Reading("window", data.draw(st.integers(0, room - 1)))
    (count,) = reading.counts(np.array([length]), np.array([room]))
    windows = [reading.place(length, room, number) for number in range(count)]
    assert {token for begin, end in windows for token in range(begin, end)} == set(range(length))
    assert all(0 < end - begin <= room for begin, end in windows) or (length == 0 and windows == [(0, 0)])
    for (_, end), (begin, _) in pairwise(windows):
        assert end - begin == reading.stride
    # no window but the last ends at the end: none is in vain
    assert all(end < length for _, end in windows[:-1])


@given(st.integers(0, 60), st.integers(1, 40))
def test_cut_and_leave_out(length: int, room: int) -> None:
    lengths, rooms = np.array([length]), np.array([room])
    assert Reading("cut").counts(lengths, rooms).tolist() == [1]
    assert Reading("cut").place(length, room, 0) == (0, min(length, room))
    assert Reading("leave_out").counts(lengths, rooms).tolist() == [int(length <= room)]


def test_windows_must_move_on() -> None:
    with pytest.raises(DataError, match=r"data\.stride is 6, and a sample holds 6 tokens of a text: lower it"):
        Reading("window", 6).counts(np.array([3, 50]), np.array([9, 6]))


def test_pairs_are_cut_as_transformers_does(word_pieces: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(word_pieces)
    for first in range(1, 12):
        for second in range(1, 12):
            texts = " ".join(["film"] * first), " ".join(["house"] * second)
            for room in range(2, 11):
                found = tokenizer(*texts, truncation="longest_first", max_length=room + 3).sequence_ids()
                assert (found.count(0), found.count(1)) == cut_pair(first, second, room)
