import threading
from itertools import islice

import numpy as np
import pytest

from trainer.config.objective import ObjectiveConfig
from trainer.data.order import Order, Quarantine
from trainer.data.samples import IGNORED
from trainer.data.stream import Stream, evaluation_batches, num_evaluation_batches
from trainer.errors import WorkerDiedError

CAUSAL, MASKED = ObjectiveConfig(), ObjectiveConfig(kind="masked")


@pytest.fixture
def open_stream():
    streams = []

    def make(samples, *, batch=8, micro=2, rank=0, ranks=1, objective=CAUSAL, seed=5, **options):
        order = Order(seed, samples.sizes, samples.weights)
        options = {"batch": batch, "micro": micro, "rank": rank, "ranks": ranks, "objective": objective} | options
        streams.append(Stream(samples, order, seed=seed, **options))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def global_arrays(streams, count):
    """The arrays of `count` global batches in the order of the data, gathered over ranks and micro-steps."""
    result = []
    for parts in islice(zip(*streams, strict=True), count):
        steps = zip(*(part.micro_batches for part in parts), strict=True)
        micros = [micro for step in steps for micro in step]
        result.append({name: np.concatenate([micro[name] for micro in micros]) for name in micros[0]})
        assert len({part.num_targets for part in parts}) == 1
        assert (result[-1]["labels"] != IGNORED).sum() == parts[0].num_targets
        assert all(np.array_equal(part.samples, parts[0].samples) for part in parts)
    return result


@pytest.mark.parametrize("objective", [CAUSAL, MASKED])
def test_ranks_and_micro_batches_do_not_change_the_data(make_samples, open_stream, objective):
    samples = make_samples([100, 30, 77], [200, 5], weights=[1.0, 0.5])

    def arrays(ranks, micro, prefetch):
        options = {"ranks": ranks, "micro": micro, "prefetch": prefetch, "objective": objective}
        return global_arrays([open_stream(samples, rank=rank, **options) for rank in range(ranks)], 9)

    expected = arrays(1, 8, 0)
    order = Order(5, samples.sizes, samples.weights)
    if objective is CAUSAL:
        assert all(
            np.array_equal(a["input_ids"], samples.fetch(order.batch(i, 8))["input_ids"])
            for i, a in enumerate(expected)
        )
    for ranks, micro, prefetch in [(1, 1, 2), (2, 1, 1), (2, 4, 2), (4, 2, 3), (4, 1, 2)]:
        for batch, other in zip(expected, arrays(ranks, micro, prefetch), strict=True):
            assert batch.keys() == other.keys()
            assert all(np.array_equal(batch[name], other[name]) for name in batch)


def test_a_stream_continues_from_its_position(make_samples, open_stream):
    samples = make_samples([300, 200])
    whole = [batch.samples for batch in islice(open_stream(samples), 8)]
    first = open_stream(samples)
    assert first.next_batch == 0
    list(islice(first, 3))
    assert first.next_batch == 3
    rest = list(islice(open_stream(samples, next_batch=first.next_batch), 5))
    assert [batch.batch_index for batch in rest] == [3, 4, 5, 6, 7]
    assert np.array_equal([batch.samples for batch in rest], whole[3:])
    assert rest[-1].epoch == (7 * 8) // len(samples)


def test_quarantined_batches_are_left_out(make_samples, open_stream):
    samples = make_samples([300])
    stream = open_stream(samples, quarantine=Quarantine([(0, 1), (4, 6)]))
    seen = list(islice(stream, 4))
    assert [batch.batch_index for batch in seen] == [2, 3, 7, 8]
    assert stream.next_batch == 9
    order = Order(5, samples.sizes, samples.weights)
    assert np.array_equal(seen[2].samples, order.batch(7, 8))


def test_a_batch_may_straddle_epochs(make_samples, open_stream):
    samples = make_samples([50])
    batches = list(islice(open_stream(samples, batch=20), 7))
    seen = np.concatenate([batch.samples for batch in batches])
    assert len(samples) == 7
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in range(0, 140, 7))


@pytest.mark.parametrize("error", [OSError("the disk is gone"), SystemExit(3)])
def test_a_dead_reader_is_an_error_not_a_hang(make_samples, open_stream, error):
    samples = make_samples([300])

    class Gone:
        """Token files that cannot be read any more."""

        def __len__(self):
            return 300

        def __getitem__(self, index):
            raise error

    object.__setattr__(samples.sources[0], "tokens", Gone())
    stream = open_stream(samples)
    for _ in range(2):
        with pytest.raises(WorkerDiedError, match="data-rank-0") as caught:
            next(stream)
        assert caught.value.__cause__ is error


def test_close_ends_the_thread(make_samples, open_stream):
    before = threading.active_count()
    stream = open_stream(make_samples([300]), prefetch=3)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("objective", [CAUSAL, MASKED])
@pytest.mark.parametrize(("ranks", "micro", "limit"), [(1, 1, None), (2, 3, None), (4, 2, 5), (3, 4, 1), (2, 2, 999)])
def test_evaluation_sees_each_sample_once(make_samples, objective, ranks, micro, limit):
    samples = make_samples([100, 21], [60])
    options = {"micro": micro, "ranks": ranks, "max_samples": limit}
    parts = [
        list(evaluation_batches(samples, rank=rank, objective=objective, seed=1, **options)) for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {num_evaluation_batches(samples, **options)}
    rows = [row for part in parts for arrays in part for row in zip(arrays["input_ids"], arrays["labels"], strict=True)]
    used = sorted(tuple(labels) for _, labels in rows if (labels != IGNORED).any())
    whole = list(evaluation_batches(samples, micro=1, rank=0, ranks=1, max_samples=limit, objective=objective, seed=1))
    assert used == sorted(tuple(arrays["labels"][0]) for arrays in whole)
    assert len(used) == min(len(samples), limit or len(samples))


def test_what_is_known_of_the_samples_travels_with_them(make_samples, open_stream):
    samples = make_samples([100, 30, 77])

    def annotate(ids, arrays):
        assert arrays.keys() == {"input_ids", "labels", "position_ids", "attention_mask"}
        assert np.array_equal(arrays["input_ids"], samples.fetch(ids)["input_ids"])
        return {"share": np.repeat(ids[:, None, None].astype(np.float32), 3, axis=2) / 2}

    for ranks, micro, prefetch in [(1, 8, 0), (2, 1, 2), (2, 2, 1)]:
        for rank in range(ranks):
            stream = open_stream(
                samples, ranks=ranks, rank=rank, micro=micro, prefetch=prefetch, annotate=annotate, batch=8
            )
            for batch in [*islice(stream, 4), stream.read(2)]:
                expected = batch.samples.reshape(-1, ranks, micro)[:, rank]
                found = [arrays["share"] for arrays in batch.micro_batches]
                assert all(array.dtype == np.float32 and array.shape == (micro, 1, 3) for array in found)
                assert np.array_equal(np.array(found)[:, :, 0, 0] * 2, expected)
                plain = samples.fetch(expected.ravel())
                for place, arrays in enumerate(batch.micro_batches):
                    rows = slice(place * micro, (place + 1) * micro)
                    assert np.array_equal(arrays["input_ids"], plain["input_ids"][rows])
