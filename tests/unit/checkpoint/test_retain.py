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
        # nothing is proven yet: the oldest will be the first
        ("1 2 3", 2, None, []),
        ("1 2 3 4", 2, None, [2]),
        ("1h 2 3", 2, None, []),
        ("1h 2 3 4 5", 2, None, [3]),
        ("1h 2h 3", 2, None, [1]),
        ("1h 2h 3 4 5 6", 2, None, [1, 4]),
        ("1h 2 3", 1, None, []),
        ("1h 2h 3h", 1, None, [1, 2]),
        ("1h 2h 3h 4h", 3, None, [1]),
        ("10h 20 30 50", 1, 20, [30]),
        ("10h 20h 30 50", 1, 20, [10]),
        ("20 40h 50 70 90", 1, 20, [70]),
        ("20h 30 40h 50h 70", 1, 20, [30]),
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
    left.sort(key=lambda one: one.step)
    there = sorted(there, key=lambda one: one.step)
    rolling = [one for one in left if not keep_every or one.step % keep_every]
    assert [one.step for one in left if one not in rolling] == [
        one.step for one in there if keep_every and one.step % keep_every == 0
    ]
    total = sum(1 for one in there if not keep_every or one.step % keep_every)
    # one more where the newest healthy one would have had to go, and one that is to be proven
    assert min(keep, total) <= len(rolling) <= keep + 2
    assert [one.step for one in rolling][-keep:] == sorted(
        one.step for one in there if not keep_every or one.step % keep_every
    )[-keep:]
    # and what was decided is final: nothing more goes when asked again
    assert doomed(left, keep, keep_every) == []


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 30))
def test_the_newest_healthy_one_moves_on_however_often_is_saved(keep: int, every: int, clean: int) -> None:
    there: dict[int, bool] = {}
    for step in range(1, 200):
        there = {saved: healthy or step - saved >= clean for saved, healthy in there.items()}
        if step % every == 0:
            there[step] = False
            for gone in doomed([Kept(*one) for one in there.items()], keep):
                del there[gone]
    healthy = [step for step, proven in there.items() if proven]
    assert max(healthy, default=0) >= 200 - 2 * (clean + every)
