"""In which form a teacher's knowledge of a sample is kept, and how that becomes bytes and arrays again. Without torch.

Little-endian throughout. `top` and `complete` take the same bytes for every sample; `sampled` keeps as many tokens at
each position as were drawn there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.records import IntArray

Kind = Literal["top", "sampled", "complete", "logits"]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Form:
    """What is kept of a sample."""

    kind: Kind
    """`top`: the most probable tokens. `sampled`: drawn tokens and how often each came. `complete`: all tokens in the
    order of their ids. `logits`: those of all classes, as they are."""
    positions: int
    """Of a sample; 1 for a classifier."""
    width: int
    """Entries at each position, `sampled`: at most."""
    vocabulary: int
    """Tokens, or classes, of which something can be known."""
    precision: Literal["fp16", "fp32"]
    """Of log-probabilities and logits."""

    @property
    def has_ids(self) -> bool:
        return self.kind in ("top", "sampled")

    @property
    def id_type(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<u4")

    @property
    def value_type(self) -> np.dtype[Any]:
        if self.kind == "sampled":
            return np.dtype("u1" if self.width < 1 << 8 else "<u4")
        return np.dtype("<f2" if self.precision == "fp16" else "<f4")

    @property
    def record_bytes(self) -> int:
        """Of a sample; `sampled`: at most."""
        entry = self.value_type.itemsize + (self.id_type.itemsize if self.has_ids else 0)
        count = self.value_type.itemsize if self.kind == "sampled" else 0
        return self.positions * (count + self.width * entry)

    def encode(self, ids: IntArray | None, values: NDArray[Any]) -> bytes:
        """The record of a sample.

        Args:
            ids: [positions, width], −1: no token, and none after it; None where all are kept.
            values: [positions, width] float32: log-probabilities or logits; `sampled`: int64, how often each was drawn.
        """
        assert values.shape == (self.positions, self.width)
        if not self.has_ids:
            assert ids is None
            return values.astype(self.value_type).tobytes()
        assert ids is not None
        assert ids.shape == values.shape
        if self.kind == "sampled":
            known = ids >= 0
            counts = known.sum(axis=1).astype(self.value_type)
            parts = (counts, ids[known].astype(self.id_type), values[known].astype(self.value_type))
            return b"".join(part.tobytes() for part in parts)
        # where there is no token, its log-probability says so
        values = np.where(ids >= 0, values, -np.inf)
        return np.maximum(ids, 0).astype(self.id_type).tobytes() + values.astype(self.value_type).tobytes()

    def decode(self, records: list[Bytes]) -> tuple[IntArray | None, Floats]:
        """Ids [n, positions, width] int64 and log-probabilities, float32, of samples; ids are None where all are
        kept.

        Raises:
            ValueError: a record is not of this form.
        """
        if self.kind == "sampled":
            return self._decode_sampled(records)
        if any(record.size != self.record_bytes for record in records):
            raise ValueError(f"a record of {self.record_bytes} bytes has another size")
        shape = (len(records), self.positions, self.width)
        if not self.has_ids:
            return None, _stacked(records, self.value_type).astype(np.float32).reshape(shape)
        at = self.positions * self.width * self.id_type.itemsize
        ids = _stacked([record[:at] for record in records], self.id_type).astype(np.int64).reshape(shape)
        values = _stacked([record[at:] for record in records], self.value_type).astype(np.float32).reshape(shape)
        ids[np.isneginf(values)] = -1
        return ids, values if self.precision == "fp32" else _at_most_certain(values)

    def _decode_sampled(self, records: list[Bytes]) -> tuple[IntArray, Floats]:
        shape = (len(records), self.positions, self.width)
        ids = np.full(shape, -1, dtype=np.int64)
        values = np.zeros(shape, dtype=np.int64)
        columns = np.arange(self.width)
        head = self.positions * self.value_type.itemsize
        for row, record in enumerate(records):
            counts = record[:head].view(self.value_type).astype(np.int64)
            total = int(counts.sum())
            middle = head + total * self.id_type.itemsize
            if record.size != middle + total * self.value_type.itemsize or int(counts.max()) > self.width:
                raise ValueError("a record contradicts itself")
            known = columns < counts[:, None]
            ids[row][known] = record[head:middle].view(self.id_type)
            values[row][known] = record[middle:].view(self.value_type)
        return ids, log_shares(self.width)[values]


def _stacked(parts: list[Bytes], kind: np.dtype[Any]) -> NDArray[Any]:
    return np.concatenate(parts).view(kind)


def _at_most_certain(values: Floats) -> Floats:
    """Rounding to fp16 can make the tokens of a position more probable together than 1: then they are scaled to it."""
    excess: Floats = np.maximum(np.exp(values).sum(axis=-1, keepdims=True), np.float32(1))
    return values - np.log(excess)


def log_shares(draws: int) -> Floats:
    """Log of the share n / draws for n = 0 … draws, [draws + 1]."""
    with np.errstate(divide="ignore"):
        return np.log(np.arange(draws + 1) / draws).astype(np.float32)
