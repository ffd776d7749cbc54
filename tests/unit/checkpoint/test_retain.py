"""Which checkpoints go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.retain import Kept, doomed


def kept(text: str) -> list[Kept]:
    """`10h 20` → step 10, healthy, and step 20."""
    return [Kept(int(word.rstrip("h")), word.endswith("h")) for word in text.split()]


@pytest.mark.parametrize(
    ("there", "keep", "keep_every", "gone"),
    [
        ("1 2 3", 2, None, [1]),
        ("1h 2 3", 2, None, [2]),
        ("1h 2h 3", 2, None, [1]),
        ("1h 2h 3 4", 2, None, [1, 3]),
        ("1h 2 3", 1, None, [2]),
        ("1h 2h 3h", 1, None, [1, 2]),
        ("10h 20 30", 1, 20, []),
        ("10h 20h 30", 1, 20, [10]),
        ("20 40h 50 70", 1, 20, [50]),
        ("10 20 30 40", 1, 20, [10]),
        ("7", 1, None, []),
        ("", 1, None, []),
    ],
)
def test_examples(there: str, keep: int, keep_every: int | None, gone: list[int]) -> None:
    assert doomed(kept(there), keep, keep_every) == gone


checkpoints = st.dictionaries(st.integers(1, 60), st.booleans(), max_size=15).map(
    lambda steps: [Kept(step, healthy) for step, healthy in steps.items()]
)


@given(checkpoints, st.integers(1, 6), st.none() | st.integers(1, 10))
def test_what_never_goes(there: list[Kept], keep: int, keep_every: int | None) -> None:
    gone = doomed(there, keep, keep_every)
    left = [one for one in there if one.step not in gone]
    assert gone == sorted(set(gone))
    assert set(gone) <= {one.step for one in there}
    if there:
        assert max(one.step for one in there) not in gone
    if healthy := [one.step for one in there if one.healthy]:
        assert max(healthy) not in gone
    rolling = [one for one in left if not keep_every or one.step % keep_every]
    assert [one.step for one in left if one not in rolling] == [
        one.step for one in there if keep_every and one.step % keep_every == 0
    ]
    total = sum(1 for one in there if not keep_every or one.step % keep_every)
    # one more only where the newest healthy one would have had to go
    assert min(keep, total) <= len(rolling) <= keep + 1
    if len(rolling) > keep:
        assert sum(one.healthy for one in rolling) == 1
    # and what was decided is final: nothing more goes when asked again
    assert doomed(left, keep, keep_every) == []


@given(checkpoints, st.integers(1, 6))
def test_healthy_ones_stay_before_others(there: list[Kept], keep: int) -> None:
    gone = set(doomed(there, keep))
    newest = max((one.step for one in there), default=None)
    left_unhealthy = [one for one in there if one.step not in gone and not one.healthy and one.step != newest]
    gone_healthy = [one for one in there if one.step in gone and one.healthy]
    assert not (left_unhealthy and gone_healthy)
