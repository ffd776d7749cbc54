"""Faults of the data: which batches change, how, and that it never depends on who reads them or how often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from trainer.faults import Fault, all_of, at, batches, from_batch, poisoned
from trainer.records import Batch

VOCABULARY, SAMPLES, LENGTH = 50, 8, 32


class Plain:
    """A stream of the numbers of its batches; two targets of each sample are left out."""

    def __init__(self, rows: Sequence[slice]):
        self._rows = rows
        self.next_batch = 0
        self.left_out: list[tuple[int, int]] = []

    def __next__(self) -> Batch:
        self.next_batch += 1
        return self.read(self.next_batch - 1)

    def read(self, batch_index: int) -> Batch:
        tokens = np.random.default_rng(batch_index).integers(0, VOCABULARY, (SAMPLES, LENGTH + 1))
        labels = tokens[:, 1:].copy()
        labels[:, :2] = -100
        arrays = {"input_ids": tokens[:, :-1], "labels": labels, "position_ids": tokens[:, 1:]}
        micro = tuple({name: array[rows] for name, array in arrays.items()} for rows in self._rows)
        return Batch(batch_index, 0, np.arange(SAMPLES), SAMPLES * (LENGTH - 2), micro)

    def leave_out(self, first: int, last: int) -> None:
        self.left_out.append((first, last))


def whole(stream: object, index: int, name: str) -> np.ndarray:
    batch = stream.read(index)  # type: ignore[attr-defined]
    return np.concatenate([arrays[name] for arrays in batch.micro_batches])


ONE = [slice(0, 8)]
CUT = [slice(0, 2), slice(2, 4), slice(4, 8)]
TOKENS = {
    "random": batches(3, 4).random_tokens(),
    "one": batches(3, 4).one_token(),
    "shuffled": batches(3, 4).shuffled_labels(),
    "drift": batches(3, 4).drift(0.3),
    "both": all_of(batches(3, 4).random_tokens(), batches(4, 4).shuffled_labels()),
}


@pytest.mark.parametrize("fault", TOKENS.values(), ids=TOKENS)
def test_only_its_batches_change_and_the_same_way_for_everyone(fault: Fault) -> None:
    plain, stream = Plain(ONE), poisoned(Plain(ONE), [fault], VOCABULARY)
    cut = poisoned(Plain(CUT), [fault], VOCABULARY)
    for index in range(7):
        handed_out = next(stream)
        for name in ("input_ids", "labels", "position_ids"):
            found = whole(stream, index, name)
            np.testing.assert_array_equal(found, handed_out.micro_batches[0][name], "read and next")
            np.testing.assert_array_equal(found, whole(cut, index, name), "cut into micro-batches")
            before = whole(plain, index, name)
            changes = 3 <= index <= 4 and name != "position_ids" and not (name == "input_ids" and fault in SPARE_INPUTS)
            assert np.array_equal(found, before) != changes
            if name == "labels":
                np.testing.assert_array_equal(found < 0, before < 0, "targets stay targets")
            assert (found < VOCABULARY).all()


SPARE_INPUTS = (TOKENS["shuffled"], TOKENS["drift"])


def test_what_each_does() -> None:
    def labels_and_inputs(fault: Fault, index: int) -> tuple[np.ndarray, np.ndarray]:
        stream = poisoned(Plain(ONE), [fault], VOCABULARY)
        return whole(stream, index, "labels")[:, 2:], whole(stream, index, "input_ids")

    labels, inputs = labels_and_inputs(batches(3, 4).one_token(), 3)
    assert len(np.unique(labels)) == len(np.unique(inputs)) == 1
    assert labels[0, 0] == inputs[0, 0] == labels_and_inputs(batches(3, 4).one_token(), 4)[0][0, 0]
    _, inputs = labels_and_inputs(batches(3, 4).random_tokens(), 3)
    assert len(np.unique(inputs, axis=0)) == SAMPLES, "each sample has tokens of its own"
    labels, _ = labels_and_inputs(batches(3, 4).shuffled_labels(), 3)
    clean = whole(Plain(ONE), 3, "labels")[:, 2:]
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.sort(clean, axis=1))
    moved = [
        float(
            np.mean(labels_and_inputs(from_batch(2).drift(0.1), index)[0] != whole(Plain(ONE), index, "labels")[:, 2:])
        )
        for index in (1, 2, 6, 11, 40)
    ]
    assert moved[0] == 0 < moved[1] < moved[2] < moved[3]
    assert 0.1 < moved[2] < 0.6 < 0.9 < moved[3]


def test_all_else_is_the_stream_itself() -> None:
    plain = Plain(ONE)
    stream: Iterator[Batch] = poisoned(plain, [batches(0, 9).one_token()], VOCABULARY)
    next(stream)
    stream.leave_out(0, 0)  # type: ignore[attr-defined]
    assert plain.left_out == [(0, 0)]
    assert stream.next_batch == 1  # type: ignore[attr-defined]
    assert iter(stream) is stream
    assert poisoned(plain, [at(step=3).gradient_is_nan(), at(batch=3).data_is_nan()], VOCABULARY) is plain


CLASSES = 4


class Labelled(Plain):
    """Texts of 1 … 32 tokens with a class; each micro-batch ends with its longest text."""

    def read(self, batch_index: int) -> Batch:
        generator = np.random.default_rng(batch_index)
        mask = np.arange(LENGTH) < generator.integers(1, LENGTH + 1, SAMPLES)[:, None]
        tokens = generator.integers(1, VOCABULARY, mask.shape) * mask
        labels = generator.integers(0, CLASSES, SAMPLES)
        micro = []
        for rows in self._rows:
            longest = int(mask[rows].sum(axis=1).max())
            arrays = {"input_ids": tokens[rows, :longest], "attention_mask": mask[rows, :longest].astype(np.int64)}
            micro.append({**arrays, "labels": labels[rows]})
        return Batch(batch_index, 0, np.arange(SAMPLES), SAMPLES, tuple(micro))


def texts(stream: object, index: int) -> list[tuple[list[int], int]]:
    """(tokens, class) of each sample; padding stays padding."""
    result = []
    for arrays in stream.read(index).micro_batches:  # type: ignore[attr-defined]
        for tokens, mask, label in zip(
            arrays["input_ids"], arrays["attention_mask"].astype(bool), arrays["labels"], strict=True
        ):
            assert not tokens[~mask].any()
            result.append((tokens[mask].tolist(), int(label)))
    return result


@pytest.mark.parametrize("fault", TOKENS.values(), ids=TOKENS)
def test_labelled_texts_change_the_same_way_for_everyone(fault: Fault) -> None:
    whole_batch, cut = (poisoned(Labelled(rows), [fault], VOCABULARY, CLASSES) for rows in (ONE, CUT))
    for index in range(7):
        found, before = texts(whole_batch, index), texts(Labelled(ONE), index)
        assert found == texts(cut, index)
        changed_texts = [a[0] != b[0] for a, b in zip(found, before, strict=True)]
        changed_labels = [a[1] != b[1] for a, b in zip(found, before, strict=True)]
        assert any(changed_texts) == (3 <= index <= 4 and fault not in SPARE_INPUTS)
        labels_may_change = fault in SPARE_INPUTS or (fault is TOKENS["both"] and index == 4)
        assert not any(changed_labels) or (labels_may_change and 3 <= index <= 4)
        assert all(0 <= label < CLASSES for _, label in found)
        assert [len(a[0]) for a in found] == [len(b[0]) for b in before]


def test_labels_of_texts_are_drawn_anew() -> None:
    def share_changed(fault: Fault, index: int) -> float:
        found = texts(poisoned(Labelled(ONE), [fault], VOCABULARY, CLASSES), index)
        return float(np.mean([a[1] != b[1] for a, b in zip(found, texts(Labelled(ONE), index), strict=True)]))

    everywhere = [share_changed(batches(0, 99).shuffled_labels(), index) for index in range(100)]
    assert np.mean(everywhere) == pytest.approx(1 - 1 / CLASSES, abs=0.06)
    drifting = [share_changed(from_batch(0).drift(0.01), index) for index in range(100)]
    assert np.mean(drifting[:30]) < 0.2 < 0.5 < np.mean(drifting[70:])
