"""A sample's knowledge as bytes and back, and the arithmetic of blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.teacher.blocks import MAX_BYTES, MAX_TOKENS, Grid, choose_per_block, path_of
from trainer.teacher.forms import Form, log_shares


def as_record(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


@st.composite
def sparse_forms(draw):
    vocabulary = draw(st.sampled_from([3, 300, 1 << 16, (1 << 16) + 1, 200_000]))
    width = draw(st.integers(1, min(vocabulary, 300)))
    kind = draw(st.sampled_from(["top", "sampled"]))
    return Form(kind, draw(st.integers(1, 5)), width, vocabulary, draw(st.sampled_from(["fp16", "fp32"])))


@given(sparse_forms(), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_sparse_records_come_back(form, seed, samples):
    generator = np.random.default_rng(seed)
    ids = np.full((samples, form.positions, form.width), -1, dtype=np.int64)
    counts = generator.integers(0, form.width + 1, (samples, form.positions))
    for row in np.ndindex(counts.shape):
        ids[row][: counts[row]] = generator.choice(form.vocabulary, counts[row], replace=False)
    if form.kind == "sampled":
        values = np.where(ids >= 0, generator.integers(1, form.width + 1, ids.shape), 0)
        expected = log_shares(form.width)[values]
    else:
        values = generator.normal(-9, 1, ids.shape).astype(np.float32)
        expected = np.where(ids >= 0, values, -np.inf).astype(form.value_type).astype(np.float32)
    records = [as_record(form.encode(*pair)) for pair in zip(ids, values, strict=True)]
    assert all(record.size <= form.record_bytes for record in records)
    if form.kind == "top":
        assert {record.size for record in records} == {form.record_bytes}
    found_ids, found = form.decode(records)
    assert np.array_equal(found_ids, ids)
    assert found.dtype == np.float32
    if form.kind == "sampled" or form.precision == "fp32":
        assert np.array_equal(found, expected)
    else:
        # where rounding made them more probable than 1 they are scaled down
        assert (found <= expected).all()
        np.testing.assert_allclose(np.exp(found), np.exp(expected), rtol=2e-3)


@pytest.mark.parametrize("kind", ["complete", "logits"])
def test_complete_records_come_back(kind):
    form = Form(kind, 2, 5, 5, "fp32")
    values = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    ids, found = form.decode([as_record(form.encode(None, one)) for one in values])
    assert ids is None
    assert np.array_equal(found, values)
    assert form.record_bytes == 2 * 5 * 4


def test_bytes_of_a_token():
    length = 128
    assert Form("top", length, 64, 49_152, "fp16").record_bytes == length * 64 * 4
    assert Form("top", length, 64, 128_000, "fp16").record_bytes == length * 64 * 6
    assert Form("top", length, 64, 128_000, "fp32").record_bytes == length * 64 * 8
    assert Form("complete", length, 49_152, 49_152, "fp16").record_bytes == length * 49_152 * 2
    form = Form("sampled", 1, 50, 49_152, "fp16")
    ids = np.full((1, 50), -1)
    ids[0, :12] = range(12)
    assert len(form.encode(ids, np.where(ids >= 0, 4, 0))) == 1 + 12 * 3


def test_rounding_never_makes_more_than_certain():
    form = Form("top", 1, 5, 9, "fp16")
    exact = np.log(np.full((1, 5), 0.2, dtype=np.float32))
    _, found = form.decode([as_record(form.encode(np.arange(5)[None], exact))])
    assert np.exp(exact.astype(np.float16).astype(np.float64)).sum() > 1
    assert np.exp(found.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.data())
def test_every_sample_has_one_place(samples, per_block, data):
    grid = Grid(samples, per_block)
    sample = data.draw(st.integers(0, samples - 1))
    block, place = grid.place(sample)
    assert 0 <= block < grid.blocks
    assert grid.within(block)[place] == sample
    assert len(grid.within(block)) == per_block or block == grid.blocks - 1
    assert grid.within(grid.blocks - 1)[-1] == samples - 1
    neighbour = data.draw(st.integers(0, samples - 1))
    assert (grid.place(neighbour) == (block, place)) == (neighbour == sample)


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.integers(1, 10**9))
def test_blocks_keep_their_limits(samples, tokens, record_bytes):
    per_block = choose_per_block(samples, tokens, record_bytes)
    assert 1 <= per_block <= samples
    assert per_block == 1 or (per_block * record_bytes <= MAX_BYTES and per_block * tokens <= MAX_TOKENS)


@given(st.integers(0, 10**7 - 1), st.integers(0, 10**7 - 1))
def test_blocks_have_files_of_their_own(tmp_path_factory, one, other):
    folder = tmp_path_factory.getbasetemp()
    assert (path_of(folder, one) == path_of(folder, other)) == (one == other)
    assert path_of(folder, one).parent.parent == folder
