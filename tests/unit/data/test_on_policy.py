import numpy as np
import pytest
from test_stream import global_arrays

from trainer.config.objective import ObjectiveConfig
from trainer.data.on_policy import OnPolicy
from trainer.data.order import Order
from trainer.data.stream import Stream
from trainer.knowledge import DATA_SHARE, WRITTEN


def streams(samples, on_policy, ranks, micro):
    order = Order(5, samples.sizes, samples.weights)
    options = {"batch": 8, "micro": micro, "ranks": ranks, "objective": ObjectiveConfig(), "seed": 5, "prefetch": 0}
    return [Stream(samples, order, rank=rank, on_policy=on_policy, **options) for rank in range(ranks)]


def test_what_is_written_depends_on_neither_ranks_nor_micro_batches(make_samples) -> None:
    samples = make_samples([100, 30, 77], [200, 5])
    on_policy = OnPolicy(samples, 0.5, 3, seed=9)
    expected = global_arrays(streams(samples, on_policy, 1, 8), 12)
    for ranks, micro in [(1, 2), (2, 1), (2, 4), (4, 2)]:
        for batch, other in zip(expected, global_arrays(streams(samples, on_policy, ranks, micro), 12), strict=True):
            assert np.array_equal(batch[WRITTEN], other[WRITTEN])
            assert np.array_equal(batch[DATA_SHARE], other[DATA_SHARE])


def test_the_ends_of_full_samples_are_written_and_the_share_of_the_data_is_exact(make_samples) -> None:
    samples = make_samples([100, 30, 77], [200, 5])
    on_policy = OnPolicy(samples, 0.5, 3, seed=9)
    rows = 0
    for batch in global_arrays(streams(samples, on_policy, 2, 2), 40):
        written, labels = batch[WRITTEN], batch["labels"]
        chosen = written.any(axis=1)
        rows += int(chosen.sum())
        assert (written[chosen].sum(axis=1) == 4).all(), "three tokens, and the label before the first of them"
        assert written[chosen][:, -4:].all()
        assert (labels[chosen] >= 0).all(), "a sample that is not full has no end to be written"
        share = (labels[~written] >= 0).sum() / (labels >= 0).sum()
        assert batch[DATA_SHARE] == pytest.approx(np.full((8, 1), share), rel=1e-6)
    assert 0.35 < rows / (40 * 8) < 0.55


def test_a_sample_is_chosen_anew_at_each_visit(make_samples) -> None:
    samples = make_samples([2000])
    on_policy = OnPolicy(samples, 0.5, 3, seed=9)
    ids = np.zeros(400, dtype=np.int64)
    chosen = on_policy.chosen(ids, np.arange(400))
    assert 140 < chosen.sum() < 260
    assert np.array_equal(chosen[100:], on_policy.chosen(ids[100:], np.arange(100, 400)))
    assert not np.array_equal(chosen, OnPolicy(samples, 0.5, 3, seed=8).chosen(ids, np.arange(400)))
    assert OnPolicy(samples, 1.0, 3, seed=9).chosen(ids, np.arange(400)).all()
