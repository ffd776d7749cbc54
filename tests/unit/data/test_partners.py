"""Partners and shares of mixup: arithmetic on places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.labelled import trimmed
from trainer.data.partners import Partners, draw_keys, trimmed_together
from trainer.records import PARTNER, SHARE


@given(seed=st.integers(0, 2**70), batch=st.integers(2, 300), index=st.integers(0, 2**40))
def test_every_sample_is_the_partner_of_another(seed: int, batch: int, index: int) -> None:
    places = np.arange(batch)
    found = Partners(seed, batch, 0.4).of(index, places)
    assert sorted(found) == places.tolist()
    assert (found != places).all()
    # whichever places a rank asks for
    some = np.array([batch - 1, 0])
    assert Partners(seed, batch, 0.4).of(index, some).tolist() == found[some].tolist()


def test_partners_change_from_batch_to_batch() -> None:
    partners = Partners(3, 16, 0.4)
    firsts = [int(partners.of(index, np.array([0]))[0]) for index in range(300)]
    assert set(firsts) == set(range(1, 16))
    assert [Partners(4, 16, 0.4).of(index, np.array([0]))[0] for index in range(300)] != firsts


def test_a_batch_of_one_is_its_own_partner() -> None:
    assert Partners(3, 1, 0.4).of(7, np.array([0])).tolist() == [0]


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 8.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    positions = np.arange(40_000)
    shares = Partners(3, 8, alpha).shares(positions)
    assert shares.dtype == np.float32
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    some = np.array([31_000, 7])
    assert Partners(3, 8, alpha).shares(some).tolist() == shares[some].tolist()
    assert (Partners(4, 8, alpha).shares(some) != shares[some]).all()


def test_arrays_are_those_of_the_partners_at_their_own_places() -> None:
    partners, ids, positions = Partners(3, 6, 0.4), np.arange(50, 56), np.arange(12, 18)

    def fetch(chosen: np.ndarray, visits: np.ndarray) -> dict[str, np.ndarray]:
        return {"input_ids": np.stack([chosen, visits], 1), "labels": chosen}

    places = np.array([4, 5])
    found = partners.arrays(2, ids, positions, places, fetch)
    whom = partners.of(2, places)
    assert found.keys() == {PARTNER + "input_ids", PARTNER + "labels", SHARE}
    assert found[PARTNER + "input_ids"].tolist() == [[50 + place, 12 + place] for place in whom]
    assert found[SHARE].tolist() == partners.shares(positions[places]).tolist()


def test_draw_keys() -> None:
    keys = draw_keys(3, np.arange(1000))
    assert keys.dtype == np.int64
    assert (keys >= 0).all()
    assert len(set(keys.tolist())) == 1000
    assert draw_keys(3, np.array([7, 900])).tolist() == keys[[7, 900]].tolist()
    assert draw_keys(4, np.array([7]))[0] != keys[7]


@pytest.mark.parametrize("lengths", [((2, 9), (3, 1)), ((2, 3), (1, 17))])
def test_both_texts_are_cut_to_the_longest(lengths: tuple[tuple[int, int], tuple[int, int]]) -> None:
    arrays = {}
    for prefix, each in zip(("", PARTNER), lengths, strict=True):
        mask = np.arange(32) < np.array(each)[:, None]
        arrays |= {prefix + "attention_mask": mask.astype(np.int64), prefix + "input_ids": 5 * mask}
        arrays[prefix + "labels"] = np.array([0, 1])
    arrays[SHARE] = np.array([0.5, 0.25], dtype=np.float32)
    found = trimmed_together(arrays, trimmed)
    width = -(-max(max(each) for each in lengths) // 8) * 8
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array[:, :width] if array.ndim == 2 else array), name
