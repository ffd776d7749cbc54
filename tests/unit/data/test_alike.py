"""Texts alike in length are computed together, and nothing else about a batch changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.objective import AdversarialConfig, ObjectiveConfig
from trainer.data.alike import alike_together
from trainer.data.order import Order
from trainer.data.stream import Stream
from trainer.records import DRAWS, PARTNER, SHARE


@settings(deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_no_order_has_less_padding(data, micro, ranks, steps, batch_index):
    size = micro * ranks * steps
    lengths = np.array(data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size)))
    places = alike_together(lengths, micro, ranks, batch_index)
    assert sorted(places.tolist()) == list(range(size))
    found = lengths[places].reshape(-1, micro).max(axis=1).sum()
    # the longest of every micro-batch, where each holds neighbours in length
    assert found == np.sort(lengths)[::-1][::micro].sum()


def test_ranks_take_turns_at_the_longer_end():
    lengths = np.arange(8)
    first, second = (lengths[alike_together(lengths, 2, 2, batch)].reshape(2, 2, 2) for batch in (0, 1))
    assert first.tolist() == [[[7, 6], [5, 4]], [[1, 0], [3, 2]]]
    assert second.tolist() == [[[5, 4], [7, 6]], [[3, 2], [1, 0]]]


def test_equal_lengths_stay_in_their_order():
    assert alike_together(np.full(6, 3), 3, 1, 0).tolist() == list(range(6))


BATCH = 12
LAYOUTS = [(1, 12), (1, 4), (2, 3), (2, 6), (3, 2), (4, 1), (4, 3)]
MOVED = ObjectiveConfig(kind="classification", mixup=0.4, adversarial=AdversarialConfig(kind="freelb"))


@pytest.fixture
def texts(prepare_rows, word_pieces):
    words = ["the", "film", "is", "a", "very", "good", "long", "bad", "dull", "story", "of", "two", "rivers"]
    generator = np.random.default_rng(2)
    rows = [
        {"text": f"{n} " + " ".join(generator.choice(words, generator.integers(1, 25))), "label": "ab"[n % 2]}
        for n in range(90)
    ]
    return prepare_rows("classification", word_pieces, rows, label="label").samples("train", 32, "join")


def read(samples, ranks, micro, *, alike, index):
    """[(sample, tokens, label, partner's tokens and label, share, draw)] of a batch in the order in which it is
    computed, with `batch.samples` and the number of places that are computed."""

    def annotate(ids, arrays):
        assert np.array_equal(samples.fetch(ids)["input_ids"], arrays["input_ids"])
        return {"sample": ids}

    options = {"batch": BATCH, "micro": micro, "ranks": ranks, "objective": MOVED, "seed": 5, "prefetch": 0}
    order = Order(5, samples.sizes, samples.weights)
    batches = [
        Stream(samples, order, rank=rank, alike=alike, annotate=annotate, **options).read(index)
        for rank in range(ranks)
    ]
    rows, columns = [], 0
    for step in zip(*(batch.micro_batches for batch in batches), strict=True):
        for arrays in step:
            columns += arrays["input_ids"].size
            for row in range(micro):

                def text(prefix, arrays=arrays, row=row):
                    mask = arrays[prefix + "attention_mask"][row].astype(bool)
                    return tuple(arrays[prefix + "input_ids"][row][mask].tolist())

                label, other = (int(arrays[prefix + "labels"][row]) for prefix in ("", PARTNER))
                numbers = (float(arrays[SHARE][row]), int(arrays[DRAWS][row]))
                rows.append((int(arrays["sample"][row]), text(""), label, text(PARTNER), other, *numbers))
    assert all(np.array_equal(batch.samples, batches[0].samples) for batch in batches)
    assert {batch.num_targets for batch in batches} == {BATCH}
    return rows, batches[0].samples.tolist(), columns


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_a_batch_is_the_same_texts_with_the_same_partners(texts, ranks, micro):
    order = Order(5, texts.sizes, texts.weights)
    saved = 0
    for index in (0, 1, 6):
        plain, as_they_come, _ = read(texts, 1, BATCH, alike=False, index=index)
        assert as_they_come == order.batch(index, BATCH).tolist() == [row[0] for row in plain]
        # without it, other layouts hold the samples in the order of the data
        others, samples, wide = read(texts, ranks, micro, alike=False, index=index)
        assert (others, samples) == (plain, as_they_come)
        rows, samples, narrow = read(texts, ranks, micro, alike=True, index=index)
        assert sorted(rows) == sorted(plain)
        # `samples` tells whose each computed row is
        assert samples == [row[0] for row in rows]
        assert [row[1] for row in rows] == [
            tuple(text[mask.astype(bool)].tolist())
            for text, mask in zip(*(texts.fetch(np.array(samples))[name] for name in ("input_ids", "attention_mask")),
                                  strict=True)
        ]  # fmt: skip
        lengths = texts.num_ordinary(np.array(samples)).reshape(-1, ranks * micro)
        assert (lengths[:-1].min(axis=1) >= lengths[1:].max(axis=1)).all()
        saved += wide - narrow
    assert saved >= 0


def test_texts_are_changed_by_their_place_in_the_data(texts):
    """What a sample becomes depends on its visit, which computing it elsewhere does not change."""

    def changed(arrays, ids, visits):
        return {**arrays, "labels": ids * 1000 + visits}

    def found(ranks, micro, alike):
        streams = [
            Stream(texts, Order(5, texts.sizes, texts.weights), batch=BATCH, micro=micro, rank=rank, ranks=ranks,
                   seed=5, objective=ObjectiveConfig(kind="classification"), prefetch=0, augment=changed, alike=alike)
            for rank in range(ranks)
        ]  # fmt: skip
        return sorted(label for each in streams for arrays in each.read(3).micro_batches for label in arrays["labels"])

    order = Order(5, texts.sizes, texts.weights)
    expected = sorted(order.batch(3, BATCH) * 1000 + np.arange(3 * BATCH, 4 * BATCH))
    for ranks, micro in LAYOUTS:
        assert found(ranks, micro, True) == found(ranks, micro, False) == expected


def test_packed_samples_stay_in_the_order_of_the_data(make_samples):
    samples = make_samples([100, 30, 77])
    order = Order(5, samples.sizes, samples.weights)
    stream = Stream(samples, order, batch=8, micro=2, rank=0, ranks=2, objective=ObjectiveConfig(), seed=5, prefetch=0)
    assert stream.read(1).samples.tolist() == order.batch(1, 8).tolist()
