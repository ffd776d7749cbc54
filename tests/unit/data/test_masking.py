import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config.objective import ObjectiveConfig
from trainer.data.masking import Masking
from trainer.data.samples import IGNORED
from trainer.data.stream import Reader
from trainer.errors import ConfigError, DataError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    fraction=st.sampled_from([0.01, 0.15, 0.5, 0.99]),
    seed=st.integers(0, 2**40),
)
def test_exactly_k_tokens_are_chosen(make_samples, lengths, fraction, seed):
    samples = make_samples(lengths, sequence_length=16)
    masking = Masking(samples, fraction, seed)
    ids = np.arange(len(samples))
    arrays, windows = masking.fetch(ids, ids * 7), samples.windows(ids)
    chosen = arrays["labels"] != IGNORED
    ordinary = windows.valid[:, :-1] & (windows.tokens[:, :-1] != samples.eos_id)
    num_ordinary = ordinary.sum(axis=1)
    expected = np.where(num_ordinary == 0, 0, np.maximum(1, np.rint(fraction * num_ordinary)))
    assert np.array_equal(chosen.sum(axis=1), expected)
    assert not (chosen & ~ordinary).any()
    assert masking.num_targets(ids) == chosen.sum()
    assert np.array_equal(arrays["labels"][chosen], windows.tokens[:, :-1][chosen])
    assert np.array_equal(arrays["input_ids"][~chosen], windows.tokens[:, :-1][~chosen])
    assert np.array_equal(arrays["attention_mask"], windows.valid[:, :-1])


def test_eighty_ten_ten(make_samples):
    samples = make_samples([400_000], sequence_length=400)
    arrays = Masking(samples, 0.15, 3).fetch(np.arange(1000), np.zeros(1000, dtype=np.int64))
    chosen = arrays["labels"] != IGNORED
    inputs, labels = arrays["input_ids"][chosen], arrays["labels"][chosen]
    masked, kept = (inputs == samples.mask_id).mean(), (inputs == labels).mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    # one random token in 98 is the original by chance
    assert kept == pytest.approx(0.1 + 0.1 / 98, abs=0.01)
    others = inputs[(inputs != samples.mask_id) & (inputs != labels)]
    assert set(others) == set(range(2, 100))
    # every place is chosen equally often
    assert chosen.mean(axis=0) == pytest.approx(0.15, abs=0.06)


def test_masks_depend_on_seed_sample_and_visit_alone(make_samples):
    samples = make_samples([4000], sequence_length=100)
    masking = Masking(samples, 0.15, 3)
    ids, visits = np.array([4, 9, 4]), np.array([0, 0, 1])
    together = masking.fetch(ids, visits)
    for row in range(3):
        alone = masking.fetch(ids[row : row + 1], visits[row : row + 1])
        assert all(np.array_equal(alone[name][0], together[name][row]) for name in alone)
    places = [set(np.flatnonzero(row)) for row in together["labels"] != IGNORED]
    assert places[0] != places[1]
    assert places[0] != places[2]
    other = Masking(samples, 0.15, 4).fetch(ids, visits)["labels"] != IGNORED
    assert set(np.flatnonzero(other[0])) != places[0]


def test_what_cannot_be_masked_is_refused(make_samples):
    samples = make_samples([40], boundaries="block")
    with pytest.raises(ConfigError, match="`block` needs a causal model"):
        Reader(samples, ObjectiveConfig(kind="masked"), 0)
    samples = make_samples([40])
    samples.mask_id = None
    with pytest.raises(DataError, match="no mask token"):
        Reader(samples, ObjectiveConfig(kind="masked"), 0)
