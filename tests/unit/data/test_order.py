import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import keyed
from trainer.data.order import Order, Quarantine

seeds = st.integers(0, 2**70)
ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)
mixtures = st.lists(
    st.tuples(st.integers(0, 700), st.sampled_from([0.1, 0.5, 1.0, 1.7, 2.0, 3.0])), min_size=1, max_size=4
)


@st.composite
def orders(draw):
    mixture = draw(mixtures.filter(lambda parts: sum(size for size, _ in parts) > 0))
    return Order(draw(seeds), tuple(s for s, _ in mixture), tuple(w for _, w in mixture), draw(st.booleans()))


@given(seeds, st.integers(1, 3000))
def test_permute_is_a_permutation(seed, size):
    keys = np.full(size, keyed.key(seed, 1))
    assert sorted(keyed.permute(np.arange(size), size, keys)) == list(range(size))


@pytest.mark.parametrize("size", [7, 256, 257, 1000, 4097])
def test_permute_mixes(size):
    """Over many keys each index lands on each place equally often, and neighbours do not stay together."""
    trials = 400
    keys = np.repeat(keyed.derive(keyed.key(5, 1), np.arange(trials)), size)
    images = keyed.permute(np.tile(np.arange(size), trials), size, keys).reshape(trials, size)
    # the mean image of an index is uniform on the places: standard error size/√(12·trials)
    assert np.abs(images.mean(axis=0) - (size - 1) / 2).max() < 5 * size / np.sqrt(12 * trials)
    together = (np.abs(np.diff(images, axis=1)) == 1).mean()
    assert together == pytest.approx(2 / size, rel=0.25)
    fixed = (images == np.arange(size)).mean() * size
    assert fixed == pytest.approx(1, abs=0.25)


@given(orders())
def test_weight_one_sees_each_sample_once_an_epoch(order):
    order = Order(order.seed, order.sizes, tuple(1.0 for _ in order.sizes), order.shuffle)
    for epoch in range(3):
        seen = order.samples(epoch * order.epoch_length, order.epoch_length)
        assert sorted(seen) == list(range(sum(order.sizes)))


@given(orders(), st.integers(0, 5))
def test_every_epoch_honours_the_weights(order, epoch):
    seen = order.samples(epoch * order.epoch_length, order.epoch_length)
    start = 0
    for size, weight in zip(order.sizes, order.weights, strict=True):
        mine = seen[(seen >= start) & (seen < start + size)]
        assert len(mine) == (max(1, round(size * weight)) if size else 0)
        start += size


@given(orders())
def test_each_pass_over_a_source_is_a_permutation(order):
    """However the weights fall, no sample is seen k + 2 times before another was seen k + 1 times."""
    seen = order.samples(0, 4 * order.epoch_length)
    counts = np.bincount(seen, minlength=sum(order.sizes))
    start = 0
    for size in order.sizes:
        if size:
            assert counts[start : start + size].max() - counts[start : start + size].min() <= 1
        start += size


def test_half_weight_sees_the_other_half_in_the_next_epoch():
    order = Order(3, (600,), (0.5,), True)
    first, second = set(order.samples(0, 300)), set(order.samples(300, 300))
    assert len(first) == len(second) == 300
    assert not first & second


@given(orders(), st.integers(0, 5000), st.integers(1, 200))
def test_random_access_equals_sequential(order, first, count):
    sequential = np.concatenate([order.samples(position, 1) for position in range(first, first + min(count, 20))])
    assert np.array_equal(order.samples(first, count)[:20], sequential)


@given(orders(), st.integers(0, 50), st.integers(1, 64))
def test_batches_follow_each_other(order, index, size):
    both = np.concatenate([order.batch(index, size), order.batch(index + 1, size)])
    assert np.array_equal(both, order.samples(index * size, 2 * size))


def test_epochs_seeds_and_shuffle():
    order = Order(1, (1000,), (1.0,), True)
    assert not np.array_equal(order.samples(0, 1000), order.samples(1000, 1000))
    assert not np.array_equal(order.samples(0, 1000), Order(2, (1000,), (1.0,), True).samples(0, 1000))
    assert np.array_equal(Order(1, (3, 2), (1.0, 2.0), False).samples(0, 8), [0, 1, 2, 3, 4, 3, 4, 0])
    assert order.epoch_of(999) == 0
    assert order.epoch_of(1000) == 1


def test_the_order_never_changes():
    """Runs resume across versions: these numbers are a promise."""
    assert Order(1234, (1000, 50), (1.0, 2.0), True).samples(990, 8).tolist() == [
        743,
        396,
        135,
        622,
        791,
        1013,
        209,
        598,
    ]
    assert Order(1, (10**12,), (1.0,), True).samples(7 * 10**12 + 3, 3).tolist() == [
        275168054656,
        622281451702,
        463574894895,
    ]


@given(ranges, st.integers(0, 100))
def test_quarantine_agrees_with_brute_force(spans, index):
    quarantine = Quarantine(spans)
    left_out = {b for first, last in spans for b in range(first, last + 1)}
    allowed = [b for b in range(400) if b not in left_out]
    assert quarantine.excluded(index) == (index in left_out)
    assert quarantine.next_allowed(index) == next(b for b in allowed if b >= index)
    assert quarantine.nth(index) == allowed[index]
    assert all(
        later[0] > earlier[1] + 1 for earlier, later in zip(quarantine.ranges, quarantine.ranges[1:], strict=False)
    )


@given(ranges, st.integers(0, 60), st.integers(0, 20))
def test_quarantine_grows(spans, first, length):
    grown = Quarantine(spans).with_range(first, first + length)
    assert grown == Quarantine([*spans, (first, first + length)])
    assert all(grown.excluded(b) for b in range(first, first + length + 1))


def test_what_is_no_range_or_no_order_is_refused():
    with pytest.raises(ValueError, match="no range"):
        Quarantine([(3, 2)])
    with pytest.raises(ValueError, match="no order"):
        Order(0, (0, 0), (1.0, 1.0))
