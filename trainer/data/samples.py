"""Token files as fixed-length samples.

Each document is its tokens and an end-of-text token; the documents of a source follow each other without a gap.
Sample i of a source is the window of L tokens from i·L on, so no token is lost and each one but a source's very first
is predicted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.records import IntArray

Boundaries = Literal["join", "positions", "block"]
IGNORED = -100
"""Label of a token that is not predicted."""


@dataclass(frozen=True)
class SourceTokens:
    """The tokens of one source in one split."""

    name: str
    weight: float
    tokens: NDArray[Any]
    """[tokens], unsigned; usually memory-mapped."""
    offsets: IntArray
    """[documents + 1]: where each document begins, and the end."""
    names: Path
    """Text file with the name of each document, one a line."""

    def document_name(self, document: int) -> str:
        with self.names.open(encoding="utf-8", newline="\n") as lines:
            return next(islice(lines, document, None)).rstrip("\n")


@dataclass(frozen=True)
class Windows:
    """Samples as they lie in the token files, with one token more than a sample for the last label."""

    tokens: IntArray
    """[n, L + 1]; end-of-text where the source has ended."""
    valid: NDArray[np.bool_]
    """[n, L + 1]: False where the source has ended."""
    place: IntArray
    """[n, L + 1]: tokens since the beginning of the document; what follows the last document counts as one."""


class Samples:
    """The samples of one split, numbered through the sources in their order."""

    def __init__(
        self,
        sources: Sequence[SourceTokens],
        *,
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
            ordinary_ids: [n], the vocabulary without special tokens: what may replace a masked token.

        Raises:
            DataError: there is not one token to predict.
        """
        self.sources = tuple(sources)
        self.sequence_length = sequence_length
        self.boundaries = boundaries
        self.eos_id = eos_id
        self.mask_id = mask_id
        self.ordinary_ids = ordinary_ids
        self._decode = decode
        self.sizes = tuple(map(self._size, self.sources))
        """Samples of each source."""
        if not len(self):
            documents = sum(len(source.offsets) - 1 for source in self.sources)
            remedy = "add text, or raise data.held_out" if split == "held_out" else "add text, or lower data.held_out"
            raise DataError(f"the {split} split has no samples ({documents} documents): {remedy}")

    @property
    def weights(self) -> tuple[float, ...]:
        """Passes over each source in an epoch."""
        return tuple(source.weight for source in self.sources)

    def __len__(self) -> int:
        return sum(self.sizes)

    @cached_property
    def _ends(self) -> IntArray:
        return np.cumsum(self.sizes)

    def _size(self, source: SourceTokens) -> int:
        return -(-max(0, len(source.tokens) - 1) // self.sequence_length)

    def _places(self, ids: IntArray) -> list[tuple[int, IntArray, IntArray]]:
        """(index of a source, rows of `ids` that are its samples, number of each within the source)."""
        which = np.searchsorted(self._ends, ids, side="right")
        result = []
        for index in np.unique(which).tolist():
            rows = np.flatnonzero(which == index)
            result.append((index, rows, ids[rows] - (self._ends[index] - self.sizes[index])))
        return result

    def _by_source(self, ids: IntArray) -> list[tuple[SourceTokens, IntArray, IntArray]]:
        """(source, rows of `ids` that are its samples, first token of each)."""
        return [(self.sources[index], rows, local * self.sequence_length) for index, rows, local in self._places(ids)]

    def windows(self, ids: IntArray) -> Windows:
        """The samples `ids` as they lie in the files."""
        shape = (len(ids), self.sequence_length + 1)
        tokens, place = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        valid = np.empty(shape, dtype=np.bool_)
        for source, rows, first in self._by_source(ids):
            index = first[:, None] + np.arange(self.sequence_length + 1)
            inside = index < len(source.tokens)
            # a source ends with end-of-text, which fills up its last sample
            tokens[rows] = source.tokens[np.minimum(index, len(source.tokens) - 1)]
            valid[rows] = inside
            place[rows] = index - source.offsets[np.searchsorted(source.offsets, index, side="right") - 1]
        return Windows(tokens, valid, place)

    def context(self, windows: Windows, *, causal: bool) -> dict[str, IntArray]:
        """What the model is told about boundaries: `position_ids` and `attention_mask`, each [n, L], where needed.

        transformers derives a block-diagonal mask from restarting positions only where no attention mask is given.
        Without a causal mask, padding has to be hidden by the attention mask.
        """
        result: dict[str, IntArray] = {}
        if self.boundaries != "join":
            # a document that began in an earlier sample restarts with this one
            result["position_ids"] = np.minimum(windows.place[:, :-1], np.arange(self.sequence_length))
        if not causal:
            result["attention_mask"] = windows.valid[:, :-1].astype(np.int64)
        elif self.boundaries == "positions":
            result["attention_mask"] = np.ones_like(windows.tokens[:, :-1])
        return result

    def fetch(self, ids: IntArray) -> dict[str, IntArray]:
        """Inputs and labels for predicting the next token, each [n, L]."""
        windows = self.windows(ids)
        predicted = windows.valid[:, 1:]
        if self.boundaries == "block":
            predicted = predicted & (windows.place[:, 1:] != 0)
        return {
            "input_ids": np.ascontiguousarray(windows.tokens[:, :-1]),
            "labels": np.where(predicted, windows.tokens[:, 1:], IGNORED),
            **self.context(windows, causal=True),
        }

    def num_targets(self, ids: IntArray) -> int:
        """Tokens that `fetch(ids)` predicts; found without reading a token."""
        total = 0
        for source, _, first in self._by_source(ids):
            last = np.minimum(first + self.sequence_length, len(source.tokens) - 1)
            total += int((last - first).sum())
            if self.boundaries == "block":
                total -= int(_count(source.offsets, first, last).sum())
        return total

    def num_ordinary(self, ids: IntArray) -> IntArray:
        """Tokens of each sample that are neither end-of-text nor padding, [n]; found without reading a token."""
        result = np.empty(len(ids), dtype=np.int64)
        for source, rows, first in self._by_source(ids):
            end = np.minimum(first + self.sequence_length, len(source.tokens))
            result[rows] = end - first - _count(source.offsets, first, end)
        return result

    def describe(self, sample: int) -> list[tuple[str, str, str]]:
        """(source, document, text) of each document that the sample touches."""
        ((source, _, first),) = self._by_source(np.array([sample]))
        begin, end = int(first[0]), min(int(first[0]) + self.sequence_length, len(source.tokens))
        result = []
        document = int(np.searchsorted(source.offsets, begin, side="right")) - 1
        while document < len(source.offsets) - 1 and source.offsets[document] < end:
            span = slice(max(begin, int(source.offsets[document])), min(end, int(source.offsets[document + 1])))
            text = self._decode(source.tokens[span].tolist())
            result.append((source.name, source.document_name(document), text))
            document += 1
        return result


def _count(offsets: IntArray, after: IntArray, until: IntArray) -> IntArray:
    """How many offsets lie in each interval (after, until]."""
    result: IntArray = np.searchsorted(offsets, until, side="right") - np.searchsorted(offsets, after, side="right")
    return result
