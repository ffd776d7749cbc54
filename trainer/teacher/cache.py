"""A teacher's knowledge on disk: written by `trimtab teach`, read by the sample's id and position.

A cache is a folder of `header.json`, blocks of samples, and a file `complete` once all blocks are there. It never knows
of steps: whatever order, rollback, quarantine or number of ranks a run has, a sample finds its own targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import DataError, RunDirectoryError
from trainer.knowledge import TEACHER_IDS, TEACHER_LOG_PROBABILITIES, Knowledge, LogitTargets, SparseTargets
from trainer.records import IntArray
from trainer.teacher.blocks import Block, DamagedBlockError, Tally, look_at, path_of, seed_of, write_block
from trainer.teacher.forms import Floats
from trainer.teacher.header import COMPLETE, Header, Wanted, find, require_complete, why_none, write_header

_OPEN_BLOCKS = 4096
"""Files mapped at once: the kernel allows a process about 65,000."""


class CacheWriter:
    """Writes the blocks of a cache, in any order, by any number of processes."""

    def __init__(self, folder: Path, header: Header):
        """
        Args:
            folder: of caches.
        """
        self.header = header
        self.folder = folder / header.key

    def create(self) -> None:
        """Make the folder, with the header in it, whatever is in it already.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_header(self.folder, self.header)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.folder} cannot be written: {error.strerror}; set distill.cache.folder"
            ) from error

    def look_at(self, block: int) -> Tally | None:
        """Read a block; None: it is not there, or damaged."""
        size = len(self.header.grid.within(block))
        return look_at(path_of(self.folder, block), size, seed_of(self.header.key, block))

    def records(self, ids: IntArray | None, values: NDArray[Any]) -> list[bytes]:
        """Records of samples from what is kept of their positions.

        Args:
            ids: [n · positions, width]; None where all are kept.
            values: [n · positions, width].
        """
        form = self.header.form
        cut = values.reshape(-1, form.positions, form.width)
        tokens = [None] * len(cut) if ids is None else list(ids.reshape(cut.shape))
        return [form.encode(*pair) for pair in zip(tokens, cut, strict=True)]

    def write(self, block: int, records: Sequence[bytes], tally: Tally) -> None:
        """
        Args:
            records: of its samples, from :meth:`records`.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        assert len(records) == len(self.header.grid.within(block))
        write_block(path_of(self.folder, block), records, tally, seed_of(self.header.key, block))

    def num_bytes(self) -> int:
        """Of all blocks that are there."""
        paths = (path_of(self.folder, block) for block in range(self.header.grid.blocks))
        return sum(path.stat().st_size for path in paths if path.exists())

    def open_again(self) -> None:
        """Say that blocks are missing."""
        (self.folder / COMPLETE).unlink(missing_ok=True)

    def finish(self) -> None:
        """Say that all blocks are there."""
        (self.folder / COMPLETE).touch()


class CacheReader:
    """Reads a complete cache. For any thread."""

    def __init__(self, folder: Path, header: Header):
        """
        Args:
            folder: of this cache.

        Raises:
            DataError: it is not complete.
        """
        self.folder, self.header = folder, header
        self._form, self._grid = header.form, header.grid
        require_complete(folder)
        self._block = lru_cache(_OPEN_BLOCKS)(self._open)

    def _open(self, number: int) -> Block:
        return Block(path_of(self.folder, number), len(self._grid.within(number)), seed_of(self.header.key, number))

    def read(self, ids: IntArray) -> tuple[IntArray | None, Floats]:
        """Ids and log-probabilities of samples, each [n, positions, width] (:meth:`Form.decode`).

        Raises:
            DataError: a block is missing or damaged.
        """
        records = []
        for sample in ids.tolist():
            block, place = self._grid.place(sample)
            try:
                records.append(self._block(block).record(place))
            except (OSError, DamagedBlockError) as error:
                said = error.strerror if isinstance(error, OSError) else error
                text = f"{path_of(self.folder, block)}, with sample {sample}: {said}; `trimtab teach` with this config "
                raise DataError(text + "writes what is missing or damaged again, and nothing else") from error
        return self._form.decode(records)


class CacheTeacher:
    """The teacher behind `teacher.place: cache`."""

    def __init__(self, reader: CacheReader):
        self._reader = reader
        self._form = reader.header.form

    def annotate(self, ids: IntArray, arrays: Mapping[str, IntArray]) -> dict[str, NDArray[Any]]:  # noqa: ARG002
        """`TEACHER_IDS` and `TEACHER_LOG_PROBABILITIES` of samples, each [n, L, K]. Where nothing was left out the
        latter alone: [n, L, V] in the order of the tokens' ids; of a classifier its logits, [n, 1, C].

        Raises:
            DataError: a block is missing or damaged.
        """
        tokens, values = self._reader.read(ids)
        result: dict[str, NDArray[Any]] = {TEACHER_LOG_PROBABILITIES: values}
        if tokens is not None:
            result[TEACHER_IDS] = tokens
        return result

    def knowledge(self, tensors: Mapping[str, Tensor]) -> Knowledge:
        """What :meth:`annotate` found, on the device."""
        values = tensors[TEACHER_LOG_PROBABILITIES]
        if self._form.kind in ("top", "sampled"):
            return Knowledge(SparseTargets(tensors[TEACHER_IDS], values, self._form.kind))
        return Knowledge(LogitTargets(values[:, 0] if self._form.kind == "logits" else values))

    def mend(self) -> None:
        """Every record is checked each time it is read."""

    def close(self) -> None:
        pass


def open_cache(folder: Path, wanted: Wanted) -> CacheTeacher:
    """The knowledge that a run needs, from a folder of caches.

    Raises:
        DataError: there is none, for another teacher, tokenizer, data or form only, or not all of it; the text says
            what to do.
    """
    found = find(folder, wanted)
    if found is None:
        raise DataError(why_none(folder, wanted))
    return CacheTeacher(CacheReader(*found))
