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
