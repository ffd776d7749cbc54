"""Texts with a class as samples: one a document, cut where it is too long, filled up where it is shorter than others.

A sample is what the tokenizer makes of a single text: its special tokens around the first tokens of the document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.objective import Kind
from trainer.data.samples import Boundaries, Samples, SourceTokens
from trainer.data.tokenize import Frame
from trainer.errors import DataError
from trainer.records import IntArray

_MULTIPLE = 8
"""Columns of a micro-batch: what kernels like, and few different shapes."""


class LabelledSamples(Samples):
    """The labelled documents of one split, numbered through the sources in their order."""

    kind: Kind = "classification"

    def __init__(
        self,
        sources: Sequence[SourceTokens],
        labels: Sequence[IntArray],
        *,
        classes: Sequence[str],
        frame: Frame,
        sequence_length: int,
        boundaries: Boundaries,
        eos_id: int,
        mask_id: int | None,
        ordinary_ids: IntArray,
        decode: Callable[[list[int]], str],
        split: str = "train",
    ):
        """
        Args:
            labels: [documents] of each source: numbers in `classes`.
            frame: special tokens around each text, and the one that fills it up.

        Raises:
            DataError: there is no document, or no room for text.
        """
        super().__init__(
            sources,
            sequence_length=sequence_length,
            boundaries=boundaries,
            eos_id=eos_id,
            mask_id=mask_id,
            ordinary_ids=ordinary_ids,
            decode=decode,
            split=split,
        )
        self.classes = tuple(classes)
        self._labels = tuple(labels)
        self._prefix, self._suffix = (np.array(ids, dtype=np.int64) for ids in (frame.prefix, frame.suffix))
        self._pad_id = frame.pad_id
        self._room = sequence_length - len(frame.prefix) - len(frame.suffix)
        if self._room < 1:
            raise DataError(
                f"data.sequence_length is {sequence_length}, all of which the tokenizer's own tokens take: raise it"
            )

    @property
    def num_cut(self) -> int:
        """Documents that are longer than a sample."""
        return sum(int((np.diff(source.offsets) > self._room).sum()) for source in self.sources)

    def fetch(self, ids: IntArray) -> dict[str, IntArray]:
        """`input_ids` and `attention_mask`, each [n, L], and `labels`, [n]."""
        tokens = np.full((len(ids), self.sequence_length), self._pad_id, dtype=np.int64)
        labels = np.empty(len(ids), dtype=np.int64)
        lengths = np.empty(len(ids), dtype=np.int64)
        for index, rows, documents in self._places(ids):
            source = self.sources[index]
            labels[rows] = self._labels[index][documents]
            begins, ends = source.offsets[documents], source.offsets[documents + 1]
            for row, begin, end in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
                text = source.tokens[begin : min(end, begin + self._room)]
                sample = np.concatenate([self._prefix, text, self._suffix])
                tokens[row, : len(sample)] = sample
                lengths[row] = len(sample)
        # a model cannot look at nothing: a text without any token is one of padding
        mask = np.arange(self.sequence_length) < np.maximum(lengths, 1)[:, None]
        return {"input_ids": tokens, "attention_mask": mask.astype(np.int64), "labels": labels}

    def num_targets(self, ids: IntArray) -> int:
        """One a sample."""
        return len(ids)

    def num_ordinary(self, ids: IntArray) -> IntArray:
        """Tokens of each sample that are text, [n]."""
        result = np.empty(len(ids), dtype=np.int64)
        for index, rows, documents in self._places(ids):
            offsets = self.sources[index].offsets
            result[rows] = np.minimum(offsets[documents + 1] - offsets[documents], self._room)
        return result

    def describe(self, sample: int) -> list[tuple[str, str, str]]:
        """(source, document and class, text as far as the sample holds it), of its one document."""
        ((index, _, (document,)),) = self._places(np.array([sample]))
        source = self.sources[index]
        begin, end = int(source.offsets[document]), int(source.offsets[document + 1])
        text = self._decode(source.tokens[begin : min(end, begin + self._room)].tolist())
        name = self.classes[self._labels[index][document]]
        return [(source.name, f"{source.document_name(document)} (class {name})", text)]

    def _size(self, source: SourceTokens) -> int:
        return len(source.offsets) - 1


def trimmed(arrays: dict[str, NDArray[Any]], kind: Kind = "classification") -> dict[str, NDArray[Any]]:
    """The arrays of a micro-batch without the columns behind its longest sample, that one rounded up to 8.

    Args:
        arrays: `attention_mask` [n, L] among them, and others of [n] or [n, L, …]; of `seq2seq` `decoder_input_ids`
            and `labels` [n, Lt], which end with the longest target.
    """
    mask = arrays["attention_mask"]
    columns = dict.fromkeys(arrays, (mask.shape[1], _columns(mask != 0)))
    if kind == "multi_label":
        # their columns are classes
        del columns["labels"]
    elif kind == "seq2seq":
        target = (arrays["labels"].shape[1], _columns(arrays["labels"] >= 0))
        columns |= {"labels": target, "decoder_input_ids": target}
    result = {}
    for name, array in arrays.items():
        length, used = columns.get(name, (-1, -1))
        is_cut = array.ndim > 1 and array.shape[1] == length
        result[name] = np.ascontiguousarray(array[:, :used]) if is_cut else array
    return result


def _columns(used: NDArray[np.bool_]) -> int:
    """Columns up to the last used one, rounded up, [n, L] → at most L."""
    longest = int(np.flatnonzero(used.any(axis=0))[-1]) + 1 if used.any() else 1
    return min(int(used.shape[1]), -(-longest // _MULTIPLE) * _MULTIPLE)
