"""Blocks of records in files: a checksum beside each record, every file whole or not there.

A block holds the records of consecutive samples::

    record 0 … record n−1 | n × (end of the record, checksum of the record) | tally | checksum of the table and tally

Checksums are xxh3-64, seeded with what the block is: a file in another's place is damaged too. A record is checked each
time it is read, so that reading a sample touches its own bytes only.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import xxhash

from trainer.errors import DataError, RunDirectoryError
from trainer.teacher.forms import Bytes

MAX_BYTES = 1 << 26
MAX_TOKENS = 1 << 17
MIN_BLOCKS = 64
"""Limits of a block: what an interruption loses, and how evenly blocks divide among ranks."""

_BLOCKS_IN_FOLDER = 1000
_TABLE = np.dtype([("end", "<u8"), ("checksum", "<u8")])
_TALLY = np.dtype("<f8")
_CHECKSUM = np.dtype("<u8")


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over samples, for the report."""

    samples: float = 0.0
    tokens: float = 0.0
    """Positions."""
    targets: float = 0.0
    """Of these, positions at which something is predicted."""
    entries: float = 0.0
    """Tokens of which something is known, over the targets."""
    entropy: float = 0.0
    """Of the teacher, over the targets, in nats; NaN where it is not known."""
    mass: float = 0.0
    """Probability that the entries cover, over the targets."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


_TALLY_BYTES = len(astuple(Tally())) * _TALLY.itemsize


@dataclass(frozen=True, slots=True)
class Grid:
    """Which samples lie in which block: arithmetic on their ids."""

    samples: int
    per_block: int

    @property
    def blocks(self) -> int:
        return -(-self.samples // self.per_block)

    def place(self, sample: int) -> tuple[int, int]:
        """Block of a sample, and its place in it."""
        assert 0 <= sample < self.samples
        return divmod(sample, self.per_block)

    def within(self, block: int) -> range:
        """Ids of the samples of a block."""
        assert 0 <= block < self.blocks
        return range(block * self.per_block, min((block + 1) * self.per_block, self.samples))


def choose_per_block(samples: int, tokens: int, record_bytes: int) -> int:
    """Samples in a block: as many as the limits above allow, at least one.

    Args:
        tokens: of a sample.
        record_bytes: of a sample.
    """
    return max(1, min(MAX_BYTES // record_bytes, MAX_TOKENS // tokens, samples // MIN_BLOCKS))


def path_of(folder: Path, block: int) -> Path:
    return folder / f"{block // _BLOCKS_IN_FOLDER:04d}" / f"block-{block:07d}.bin"


def seed_of(key: str, block: int) -> int:
    """What tells the checksums of this block from those of any other."""
    return xxhash.xxh3_64_intdigest(f"{key}/{block}".encode())


def write_block(path: Path, records: Sequence[bytes], tally: Tally, seed: int) -> None:
    """Write a block so that it is there whole or not at all, also after a power failure.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    table = np.empty(len(records), dtype=_TABLE)
    table["end"] = np.cumsum([len(record) for record in records])
    table["checksum"] = [xxhash.xxh3_64_intdigest(record, seed) for record in records]
    tail = table.tobytes() + np.array(astuple(tally), dtype=_TALLY).tobytes()
    checksum = np.array(xxhash.xxh3_64_intdigest(tail, seed), dtype=_CHECKSUM)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for record in records:
                file.write(record)
            file.write(tail)
            file.write(checksum.tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        # what killed processes left of this block
        for left in path.parent.glob(f"{path.name}.*"):
            left.unlink(missing_ok=True)
    except OSError as error:
        partial.unlink(missing_ok=True)
        text = f"{path} cannot be written: {error.strerror}; make room or give rights, and the same command goes on"
        raise RunDirectoryError(text) from error


class DamagedBlockError(Exception):
    """A block is not what was written; the text says in what."""


class Block:
    """A block, mapped into memory."""

    def __init__(self, path: Path, samples: int, seed: int):
        """
        Raises:
            FileNotFoundError: there is none.
            DamagedBlockError: its table is damaged, or its size.
        """
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            tail = samples * _TABLE.itemsize + _TALLY_BYTES
            if size < tail + _CHECKSUM.itemsize:
                raise DamagedBlockError(f"it is cut off at {size} bytes")
            self._memory = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        end = size - _CHECKSUM.itemsize
        table = self._memory[end - tail : end].tobytes()
        if xxhash.xxh3_64_intdigest(table, seed) != int(self._memory[end:].view(_CHECKSUM)[0]):
            raise DamagedBlockError("its table is damaged, or it is cut off")
        self._table = np.frombuffer(table, dtype=_TABLE, count=samples)
        if int(self._table["end"][-1]) != end - tail:
            raise DamagedBlockError("its table does not fit its size")
        self.tally = Tally(*np.frombuffer(table, dtype=_TALLY, offset=samples * _TABLE.itemsize).tolist())
        self._seed = seed

    def record(self, place: int) -> Bytes:
        """
        Raises:
            DamagedBlockError: it is not what was written.
        """
        begin = int(self._table["end"][place - 1]) if place else 0
        record = self._memory[begin : int(self._table["end"][place])]
        if xxhash.xxh3_64_intdigest(record.data, self._seed) != int(self._table["checksum"][place]):
            raise DamagedBlockError(f"record {place} is not what was written")
        return record

    def check(self) -> None:
        """Read all of it.

        Raises:
            DamagedBlockError: a record is not what was written.
        """
        for place in range(len(self._table)):
            self.record(place)


def look_at(path: Path, samples: int, seed: int) -> Tally | None:
    """Read a whole block; what it says of itself, None where there is none or it is damaged."""
    try:
        block = Block(path, samples, seed)
        block.check()
    except (FileNotFoundError, DamagedBlockError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give rights, or delete it") from error
    return block.tally
