"""Reads runs of elements out of safetensors files straight into memory that is there already.

Mapping a file, as the safetensors library does, leaves every page that was read in the process: reading all of a large
checkpoint piece by piece would still hold all of it.
"""

from __future__ import annotations

import json
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from trainer.errors import CheckpointError, DamagedError

MAX_HEADER = 100_000_000
"""Bytes of a header: the limit of the safetensors format."""
CHUNK = 1 << 24
"""Bytes of one read."""
_ITEM = 4


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    """Of the first byte, in the file."""
    num_elements: int


class Slices:
    """The fp32 tensors of one safetensors file, read in parts.

    Raises:
        DamagedError: it is missing, no regular file, or not what a safetensors file is.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedError(f"{path} cannot be opened ({error.strerror}); use another checkpoint") from None
        try:
            self._places = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    @property
    def names(self) -> list[str]:
        """Of all tensors, of any type."""
        return list(self._places)

    def num_elements(self, name: str) -> int:
        """Of an fp32 tensor.

        Raises:
            CheckpointError: there is none of this name.
        """
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"{self.path} holds no fp32 tensor {name}; use another checkpoint")
        return place.num_elements

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Elements from `start` on into all of `out`: fp32, 1-D, contiguous, in host memory."""
        if start < 0 or start + out.numel() > self.num_elements(name):
            raise CheckpointError(f"{self.path} holds only {self.num_elements(name)} elements of {name}")
        place = self._places[name]
        assert place is not None
        if out.numel():
            self._fill(out.numpy().data.cast("B"), place.offset + start * _ITEM)

    def _fill(self, room: memoryview, offset: int) -> None:
        done = 0
        while done < len(room):
            count = os.preadv(self._file, [room[done : done + CHUNK]], offset + done)
            if count == 0:
                raise DamagedError(f"{self.path} ends at byte {offset + done}: it is cut off; use another checkpoint")
            done += count

    def _read_header(self) -> dict[str, _Place | None]:
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{self.path} is not a regular file; use another checkpoint")
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if length > min(MAX_HEADER, status.st_size - 8):
            raise DamagedError(f"{self.path} is not a safetensors file, or is cut off; use another checkpoint")
        header = bytearray(length)
        self._fill(memoryview(header), 8)
        try:
            entries: dict[str, Any] = json.loads(header)
            places = {
                name: _place(entry, 8 + length, status.st_size)
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, LookupError, AttributeError):
            raise DamagedError(f"{self.path} has no valid safetensors header; use another checkpoint") from None
        return places


def _place(entry: dict[str, Any], first: int, size: int) -> _Place | None:
    """Where a tensor lies; None for one that is not fp32.

    Raises:
        ValueError: the entry contradicts itself, or leads out of the file.
    """
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= size - first:
        raise ValueError("out of the file")
    if entry["dtype"] != "F32":
        return None
    num_elements = 1
    for length in entry["shape"]:
        num_elements *= length
    if (end - begin) != num_elements * _ITEM:
        raise ValueError("its size is not that of its shape")
    return _Place(first + begin, num_elements)


class OpenFiles:
    """The newest few of many files, opened when asked for: their number does not grow with the ranks."""

    def __init__(self, paths: Sequence[Path], limit: int = 64):
        self._paths = paths
        self._limit = limit
        self._open: OrderedDict[int, Slices] = OrderedDict()

    def __getitem__(self, index: int) -> Slices:
        if index not in self._open:
            if len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            self._open[index] = Slices(self._paths[index])
        self._open.move_to_end(index)
        return self._open[index]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._open.popitem()[1].close()
