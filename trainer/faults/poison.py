"""Faults of the data: a stream whose batches are changed at chosen indices, the same however often they are read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.faults.sentence import OF_TOKENS, Fault, Kind, Strike
from trainer.records import Batch

_SEED = 20


def strikes_of_data(faults: Sequence[Fault]) -> tuple[Strike, ...]:
    """What of the faults lies in the tokens that the stream hands out."""
    return tuple(strike for fault in faults for strike in fault.strikes if strike.kind in OF_TOKENS)


def poisoned(stream: Any, faults: Sequence[Fault], vocabulary: int, num_classes: int = 0) -> Any:
    """`stream` with the faults of the data in it; the stream itself where there are none.

    Args:
        vocabulary: tokens are drawn from 0 … vocabulary − 1.
        num_classes: of labelled texts; their labels are drawn from 0 … num_classes − 1.
    """
    strikes = strikes_of_data(faults)
    return Poisoned(stream, strikes, vocabulary, num_classes) if strikes else stream


class Poisoned:
    """A stream that changes the micro-batches of some batches; in all else it is the stream that it wraps.

    What becomes of a sample depends on the batch index and on the sample alone: not on ranks, micro-batches, or how
    often it was read. The number of targets stays.
    """

    def __init__(self, stream: Any, strikes: Sequence[Strike], vocabulary: int, num_classes: int = 0):
        self._stream = stream
        self._strikes = tuple(strikes)
        self._vocabulary, self._num_classes = vocabulary, num_classes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._changed(next(self._stream))

    def read(self, batch_index: int) -> Batch:
        """One batch by its index, as the stream would hand it out."""
        return self._changed(self._stream.read(batch_index))

    def _changed(self, batch: Batch) -> Batch:
        for strike in self._strikes:
            if strike.covers(batch.batch_index):
                changed = tuple(
                    change_labelled(arrays, strike, batch.batch_index, self._vocabulary, self._num_classes)
                    if arrays["labels"].ndim == 1
                    else change(arrays, strike, batch.batch_index, self._vocabulary)
                    for arrays in batch.micro_batches
                )
                batch = replace(batch, micro_batches=changed)
        return batch


def change(
    arrays: dict[str, NDArray[np.int64]], strike: Strike, batch_index: int, vocabulary: int
) -> dict[str, NDArray[np.int64]]:
    """The arrays of one micro-batch, each [micro_batch, length], with the fault in them."""
    inputs, labels = arrays["input_ids"].copy(), arrays["labels"].copy()
    for row_inputs, row_labels in zip(inputs, labels, strict=True):
        generator = np.random.default_rng((_SEED, batch_index, zlib.crc32(row_inputs.tobytes())))
        targets = np.flatnonzero(row_labels >= 0)
        match strike.kind:
            case Kind.RANDOM_TOKENS:
                row_inputs[:] = generator.integers(0, vocabulary, len(row_inputs))
                row_labels[targets] = generator.integers(0, vocabulary, len(targets))
            case Kind.ONE_TOKEN:
                token = np.random.default_rng((_SEED, strike.first)).integers(0, vocabulary)
                row_inputs[:] = token
                row_labels[targets] = token
            case Kind.SHUFFLED_LABELS:
                row_labels[targets] = generator.permutation(row_labels[targets])
            case Kind.DRIFT:
                share = min(1.0, strike.factor * (batch_index - strike.first + 1))
                moved = targets[generator.random(len(targets)) < share]
                row_labels[moved] = generator.permutation(row_labels[moved])
    return {**arrays, "input_ids": inputs, "labels": labels}


def change_labelled(
    arrays: dict[str, NDArray[Any]], strike: Strike, batch_index: int, vocabulary: int, num_classes: int
) -> dict[str, NDArray[Any]]:
    """The arrays of one micro-batch of labelled texts, `labels` [micro_batch], with the fault in them: other tokens
    under the same label, or another label, drawn from all classes, over the same tokens."""
    inputs, labels = arrays["input_ids"].copy(), arrays["labels"].copy()
    for row, mask in enumerate(arrays["attention_mask"].astype(bool)):
        # how much padding follows depends on the other texts of the micro-batch
        text = inputs[row][mask]
        generator = np.random.default_rng((_SEED, batch_index, zlib.crc32(text.tobytes())))
        match strike.kind:
            case Kind.RANDOM_TOKENS:
                inputs[row][mask] = generator.integers(0, vocabulary, len(text))
            case Kind.ONE_TOKEN:
                inputs[row][mask] = np.random.default_rng((_SEED, strike.first)).integers(0, vocabulary)
            case Kind.SHUFFLED_LABELS:
                labels[row] = generator.integers(0, num_classes)
            case Kind.DRIFT:
                share = min(1.0, strike.factor * (batch_index - strike.first + 1))
                if generator.random() < share:
                    labels[row] = generator.integers(0, num_classes)
    return {**arrays, "input_ids": inputs, "labels": labels}
