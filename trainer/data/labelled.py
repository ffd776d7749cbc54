"""Labelled texts as samples: one a document, cut or in windows where it is too long, filled up where it is shorter.

A sample is what the tokenizer makes of a single text, or of two: its special tokens around tokens of the document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config.objective import Kind
from trainer.data.samples import Boundaries, Samples, SourceTokens
from trainer.data.tokenize import Frame, PairFrame
from trainer.data.windows import Reading, cut_pair
from trainer.errors import DataError
from trainer.records import IntArray

_MULTIPLE = 8
"""Columns of a micro-batch: what kernels like, and few different shapes."""


@dataclass(frozen=True)
class Labels:
    """What belongs to the documents of one source beside their tokens; None where there is none."""

    labels: NDArray[Any] | None = None
    """[documents]: numbers of classes, or what is to be predicted; [documents, C] of 0 and 1."""
    second: NDArray[Any] | None = None
    """Tokens of the second texts."""
    second_offsets: IntArray | None = None
    """[documents + 1]"""
    marks: NDArray[Any] | None = None
    """[tokens]: class of a word at its first token, −100 elsewhere; whether a token is learned."""
    spans: IntArray | None = None
    """[documents, 2]: first and last token of the answer; −1: none."""
    places: NDArray[Any] | None = None
    """[tokens, 2]: first character of a token, and the one after its last."""

    def second_of(self, document: int) -> NDArray[Any]:
        if self.second is None or self.second_offsets is None:
            return np.empty(0, dtype=np.int64)
        return self.second[int(self.second_offsets[document]) : int(self.second_offsets[document + 1])]

    def second_lengths(self, documents: int) -> IntArray:
        return np.zeros(documents, np.int64) if self.second_offsets is None else np.diff(self.second_offsets)


class Place(NamedTuple):
    """Where the tokens of a sample come from."""

    source: int
    document: int
    start: int
    """Where the document begins in the tokens of its source."""
    begin: int
    """First token of the document that the sample holds."""
    end: int
    """The one after the last."""
    second_end: int = 0
    """Tokens of the second text that it holds, from the first."""


class LabelledSamples(Samples):
    """The labelled documents of one split, numbered through the sources in their order (balanced: by class, and by
    source within a class): of classification, of several labels, of a number."""

    second_first = False
    """Whether the second text stands before the text."""

    def __init__(
        self,
        sources: Sequence[SourceTokens],
        labels: Sequence[Labels],
        *,
        kind: Kind,
        classes: Sequence[str],
        frame: Frame,
        pair: PairFrame | None = None,
        reading: Reading | None = None,
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
            labels: of each source.
            frame: special tokens around each text, and the one that fills it up.
            pair: the same of two texts.
            reading: what is done with long texts, and which are seen how often.

        Raises:
            DataError: there is no document, no room for text, or the reading is not for such texts.
        """
        self.kind: Kind = kind
        self.classes = tuple(classes)
        self.reading = reading or Reading()
        self.sequence_length = sequence_length
        self._of = tuple(labels)
        self._pad_id = frame.pad_id
        own = (frame.prefix, (), frame.suffix) if pair is None else (pair.prefix, pair.middle, pair.suffix)
        self._prefix, self._middle, self._suffix = (np.array(ids, dtype=np.int64) for ids in own)
        self._is_pair = pair is not None
        self._types = pair.types if pair is not None else None
        self._room = sequence_length - sum(map(len, own))
        if self._room < 1 + self._is_pair:
            raise DataError(
                f"data.sequence_length is {sequence_length}, all of which the tokenizer's own tokens take: raise it"
            )
        self._firsts = {id(source): self._plan(source, own) for source, own in zip(sources, labels, strict=True)}
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
        self._numbered = self.sizes
        self._weights = super().weights
        self._index: IntArray | None = None
        if self.reading.balance == "classes" and split == "train":
            self._balance()

    # ------------------------------------------------------------------------------------------------ numbers

    @property
    def weights(self) -> tuple[float, ...]:
        """Passes over each of `sizes` in an epoch."""
        return self._weights

    def _rooms(self, source: SourceTokens, own: Labels) -> IntArray:
        """Tokens that a sample has for each text, [documents]."""
        documents = len(source.offsets) - 1
        if not self._is_pair:
            return np.full(documents, self._room, dtype=np.int64)
        return self._room - np.minimum(own.second_lengths(documents), self._room - 1)

    def _plan(self, source: SourceTokens, own: Labels) -> IntArray | None:
        """Number of the first sample of each document, and the number of all, [documents + 1]; None: one each."""
        if self.reading.too_long == "cut":
            return None
        if self.reading.too_long == "window" and self._is_pair and not self.second_first:
            raise DataError("data.too_long: windows are not for pairs of texts; use cut or leave_out")
        counts = self.reading.counts(self._lengths(source, own), self._rooms(source, own))
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

    def _lengths(self, source: SourceTokens, own: Labels) -> IntArray:
        """Tokens of each text, [documents], beside what `_rooms` takes as given."""
        lengths: IntArray = np.diff(source.offsets)
        if self._is_pair and self.reading.too_long == "leave_out":
            # what the second text is cut by is missing too
            second = own.second_lengths(len(lengths))
            lengths = lengths + np.maximum(0, second - (self._room - 1))
        return lengths

    def _size(self, source: SourceTokens) -> int:
        firsts = self._firsts[id(source)]
        return len(source.offsets) - 1 if firsts is None else int(firsts[-1])

    def _balance(self) -> None:
        """Number the samples by class, each class a source of its own that fills an equal part of an epoch."""
        if self.kind != "classification":
            raise DataError(f"data.balance: classes is for objective.kind classification, not {self.kind}")
        groups, masses = [], []
        first = 0
        for number, (source, own, weight) in enumerate(zip(self.sources, self._of, self._weights, strict=True)):
            ids = np.arange(first, first + self._numbered[number])
            first += self._numbered[number]
            assert own.labels is not None
            classes = own.labels[self._documents(source, ids - ids[:1])] if len(ids) else np.empty(0, dtype=np.int64)
            for name in range(len(self.classes)):
                groups.append((name, number, ids[classes == name]))
                masses.append(weight * len(groups[-1][2]))
        of_class = np.zeros(len(self.classes))
        for (name, _, _), mass in zip(groups, masses, strict=True):
            of_class[name] += mass
        share = of_class.sum() / max(1, np.count_nonzero(of_class))
        chosen = sorted((group for group in groups if len(group[2])), key=lambda group: group[:2])
        sizes = tuple(len(ids) for _, _, ids in chosen)
        self._index = np.concatenate([ids for _, _, ids in chosen])
        self._weights = tuple(float(self._weights[source] * share / of_class[name]) for name, source, _ in chosen)
        self.sizes = sizes

    def _documents(self, source: SourceTokens, local: IntArray) -> IntArray:
        firsts = self._firsts[id(source)]
        return local if firsts is None else np.searchsorted(firsts, local, side="right") - 1

    def _places(self, ids: IntArray) -> list[tuple[int, IntArray, IntArray]]:
        """(index of a source, rows of `ids` that are its samples, number of each within the source)."""
        if self._index is not None:
            ids = self._index[ids]
        ends = np.cumsum(self._numbered)
        which = np.searchsorted(ends, ids, side="right")
        result = []
        for index in np.unique(which).tolist():
            rows = np.flatnonzero(which == index)
            result.append((index, rows, ids[rows] - (ends[index] - self._numbered[index])))
        return result

    def _documents_of(self, ids: IntArray) -> Iterator[tuple[int, IntArray, IntArray, IntArray]]:
        """(index of a source, rows of `ids` that are its samples, document of each, window of each)."""
        for index, rows, local in self._places(ids):
            source = self.sources[index]
            firsts = self._firsts[id(source)]
            documents = self._documents(source, local)
            yield index, rows, documents, local * 0 if firsts is None else local - firsts[documents]

    def document_of(self, ids: IntArray) -> IntArray:
        """The text that each sample is of, [n]: numbered through the sources in their order, whatever is left out."""
        firsts = np.cumsum([0, *(len(source.offsets) - 1 for source in self.sources)])
        result = np.empty(len(ids), dtype=np.int64)
        for index, rows, documents, _ in self._documents_of(ids):
            result[rows] = firsts[index] + documents
        return result

    @property
    def num_cut(self) -> int:
        """Documents that are longer than a sample."""
        total = 0
        for source, own in zip(self.sources, self._of, strict=True):
            lengths = np.diff(source.offsets)
            total += int((lengths + own.second_lengths(len(lengths)) > self._room).sum())
        return total

    # ------------------------------------------------------------------------------------------------ samples

    def places(self, ids: IntArray) -> list[Place]:
        """Where the tokens of each sample come from, [n]."""
        result: list[Any] = [None] * len(ids)
        for index, rows, documents, windows in self._documents_of(ids):
            source, own = self.sources[index], self._of[index]
            starts = source.offsets[documents]
            lengths = source.offsets[documents + 1] - starts
            if not self._is_pair:
                begins = windows * (self._room - self.reading.stride)
                columns = (rows, documents, starts, begins, np.minimum(lengths, begins + self._room))
                for row, *where in zip(*(each.tolist() for each in columns), strict=True):
                    result[row] = Place(index, *where)
                continue
            columns = (rows, documents, starts, lengths, windows)
            for row, document, start, length, window in zip(*(each.tolist() for each in columns), strict=True):
                second = len(own.second_of(document))
                result[row] = Place(index, document, start, *self._cut(length, second, window))
        return result

    def _cut(self, length: int, second: int, _window: int) -> tuple[int, int, int]:
        """Of two texts: first token of the text, the one after its last, and the number of tokens of the second one."""
        return 0, *cut_pair(length, second, self._room)

    def text_tokens(self, place: Place) -> NDArray[Any]:
        """The tokens of the text that a sample holds."""
        return self.sources[place.source].tokens[place.start + place.begin : place.start + place.end]

    def _fill(self, places: Sequence[Place]) -> tuple[dict[str, IntArray], IntArray]:
        """`input_ids`, `attention_mask`, `token_type_ids` [n, L], and the column where each text begins, [n]."""
        shape = (len(places), self.sequence_length)
        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        types = np.zeros(shape if self._types is not None else 0, dtype=np.int64)
        lengths = np.empty(len(places), dtype=np.int64)
        begins = np.full(len(places), len(self._prefix), dtype=np.int64)
        for row, place in enumerate(places):
            text = self.text_tokens(place)
            if self._is_pair:
                second = self._of[place.source].second_of(place.document)[: place.second_end]
                one, other = (second, text) if self.second_first else (text, second)
                pieces = [self._prefix, one, self._middle, other, self._suffix]
                if self.second_first:
                    begins[row] += len(one) + len(self._middle)
                if self._types is not None:
                    of = np.repeat(self._types, [len(piece) for piece in pieces])
                    types[row, : len(of)] = of
            else:
                pieces = [self._prefix, text, self._suffix]
            sample = np.concatenate(pieces)
            tokens[row, : len(sample)] = sample
            lengths[row] = len(sample)
        # a model cannot look at nothing: a text without any token is one of padding
        mask = np.arange(self.sequence_length) < np.maximum(lengths, 1)[:, None]
        arrays = {"input_ids": tokens, "attention_mask": mask.astype(np.int64)}
        return arrays | ({"token_type_ids": types} if self._types is not None else {}), begins

    def fetch(self, ids: IntArray) -> dict[str, NDArray[Any]]:
        """`input_ids` and `attention_mask`, each [n, L], of pairs `token_type_ids` [n, L] where the model is told, and
        `labels`: int64 [n], of several labels float32 [n, C], of a number float32 [n]."""
        places = self.places(ids)
        arrays, _ = self._fill(places)
        return {**arrays, "labels": self._labels(places)}

    def _labels(self, places: Sequence[Place]) -> NDArray[Any]:
        shape = (len(places), len(self.classes)) if self.kind == "multi_label" else (len(places),)
        result = np.empty(shape, dtype=np.int64 if self.kind == "classification" else np.float32)
        of = np.array([place.source for place in places])
        documents = np.array([place.document for place in places])
        for source in np.unique(of):
            labels = self._of[source].labels
            assert labels is not None
            result[of == source] = labels[documents[of == source]]
        return result

    def num_targets(self, ids: IntArray) -> int:
        """One a sample."""
        return len(ids)

    def num_ordinary(self, ids: IntArray) -> IntArray:
        """Tokens of each sample that are text, [n]."""
        return np.array([place.end - place.begin + place.second_end for place in self.places(ids)], dtype=np.int64)

    def class_counts(self) -> IntArray:
        """Samples of each class, [classes], of classification; documents of each, of several labels."""
        total = np.zeros(len(self.classes), dtype=np.int64)
        for source, own in zip(self.sources, self._of, strict=True):
            assert own.labels is not None
            if self.kind == "multi_label":
                total += own.labels.sum(axis=0, dtype=np.int64)
            else:
                documents = self._documents(source, np.arange(self._size(source)))
                total += np.bincount(own.labels[documents], minlength=len(self.classes))
        return total

    def describe(self, sample: int) -> list[tuple[str, str, str]]:
        """(source, document and what is to be predicted, text as far as the sample holds it), of its one document."""
        (place,) = self.places(np.array([sample]))
        source = self.sources[place.source]
        text = self._decode(self.text_tokens(place).tolist())
        if place.second_end:
            second = self._decode(self._of[place.source].second_of(place.document)[: place.second_end].tolist())
            text = f"{second}\n{text}" if self.second_first else f"{text}\n{second}"
        return [(source.name, f"{source.document_name(place.document)} ({self._shown(place)})", text)]

    def _shown(self, place: Place) -> str:
        """What is to be predicted of a sample, for people."""
        label = self._labels([place])[0]
        if self.kind == "classification":
            return f"class {self.classes[label]}"
        if self.kind == "regression":
            return f"value {float(label):g}"
        names = [name for name, is_of in zip(self.classes, label, strict=True) if is_of]
        return f"classes {', '.join(names)}" if names else "no class"


def trimmed(arrays: dict[str, NDArray[Any]], kind: Kind = "classification") -> dict[str, NDArray[Any]]:
    """The arrays of a micro-batch without the columns behind its longest sample, that one rounded up to 8.

    Args:
        arrays: `attention_mask` [n, L] among them, and others of [n] or [n, L, …]; of `seq2seq` `decoder_input_ids`
            and `labels` [n, Lt], which end with the longest target.
    """
    mask = arrays["attention_mask"]
    columns = dict.fromkeys(arrays, (mask.shape[1], _columns(mask != 0)))
    if kind in {"multi_label", "several"}:
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
