import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.samples import IGNORED
from trainer.errors import DataError

documents = st.lists(st.integers(1, 30), max_size=8)
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared_folder
@given(lengths=st.lists(documents, min_size=1, max_size=3), length=st.integers(2, 12))
def test_no_token_is_lost(make_samples, lengths, length):
    """Inputs, in order, are the files; every token but a source's first is predicted exactly once."""
    if not any(sum(one) > 1 for one in lengths):
        return
    samples = make_samples(*lengths, sequence_length=length, boundaries="join")
    start = 0
    for source, size in zip(samples.sources, samples.sizes, strict=True):
        if size:
            arrays = samples.fetch(np.arange(start, start + size))
            flat_inputs, flat_labels = arrays["input_ids"].ravel(), arrays["labels"].ravel()
            targets = len(source.tokens) - 1
            assert np.array_equal(flat_inputs[:targets], source.tokens[:-1])
            assert np.array_equal(flat_labels[:targets], source.tokens[1:])
            assert (flat_labels[targets:] == IGNORED).all()
            assert (flat_inputs[targets + 1 :] == samples.eos_id).all()
        else:
            assert len(source.tokens) < 2
        start += size


@shared_folder
@given(
    lengths=st.lists(documents, min_size=1, max_size=3),
    boundaries=st.sampled_from(["join", "positions", "block"]),
    seed=st.integers(0, 99),
)
def test_targets_are_counted_without_reading(make_samples, lengths, boundaries, seed):
    if not any(sum(one) > 1 for one in lengths):
        return
    samples = make_samples(*lengths, boundaries=boundaries)
    ids = np.random.default_rng(seed).integers(0, len(samples), 7)
    assert samples.num_targets(ids) == (samples.fetch(ids)["labels"] != IGNORED).sum()
    windows = samples.windows(ids)
    ordinary = windows.valid[:, :-1] & (windows.tokens[:, :-1] != samples.eos_id)
    assert np.array_equal(samples.num_ordinary(ids), ordinary.sum(axis=1))


def test_positions_restart_at_documents(make_samples):
    samples = make_samples([3, 10, 1, 4], sequence_length=6, boundaries="positions")
    arrays = samples.fetch(np.arange(3))
    assert arrays["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]
    assert (arrays["attention_mask"] == 1).all()
    assert (arrays["labels"] != IGNORED).sum() == 17


def test_block_predicts_nothing_across_documents(make_samples):
    samples = make_samples([3, 10, 1, 4], sequence_length=6, boundaries="block")
    arrays = samples.fetch(np.arange(3))
    assert set(arrays) == {"input_ids", "labels", "position_ids"}
    # the document of one token at 13 and the beginnings at 3 and 14 are not predicted; nothing follows the last token
    ignored = (arrays["labels"] == IGNORED).astype(int)
    assert ignored.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]]
    assert arrays["labels"][0, 3] == samples.sources[0].tokens[4]


def test_join_says_nothing_about_documents(make_samples):
    assert set(make_samples([9, 9], boundaries="join").fetch(np.array([0]))) == {"input_ids", "labels"}


def test_large_vocabularies_and_several_sources_keep_their_values(make_samples):
    samples = make_samples([40], [0 + 40], dtype=np.uint32)
    samples.sources[1].tokens[1] = 4_000_000_000
    arrays = samples.fetch(np.array([5, 0]))
    assert arrays["input_ids"].dtype == np.int64
    assert arrays["input_ids"][0, 1] == arrays["labels"][0, 0] == 4_000_000_000
    assert np.array_equal(arrays["input_ids"][1], samples.sources[0].tokens[:8])


def test_describe_names_what_a_sample_touches(make_samples):
    samples = make_samples([20], [3, 10, 5], sequence_length=8)
    described = samples.describe(samples.sizes[0] + 1)
    assert [(source, name) for source, name, _ in described] == [
        ("source 1", "document 1.1"),
        ("source 1", "document 1.2"),
    ]
    text = " ".join(part for _, _, part in described)
    assert text == " ".join(map(str, samples.sources[1].tokens[8:16]))


def test_a_split_without_samples_is_one_sentence(make_samples):
    with pytest.raises(DataError, match=r"the train split has no samples \(1 documents\): add text"):
        make_samples([1])
