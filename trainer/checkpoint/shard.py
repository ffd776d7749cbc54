"""One rank's files: its tensors as safetensors, its numbers as JSON.

One pass: bytes are hashed while they are written or read, a few MiB at a time and without the interpreter's lock, so
that training goes on beside it.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from trainer.checkpoint.manifest import CHUNK_BYTES, FileEntry, read_checked, shard_names
from trainer.errors import CheckpointError, DamagedError

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and the plain numbers that go with them."""

Moment = Callable[[str, Path], None]
"""Called in the writing thread: ("begin", partial directory), ("chunk", file) several times within every file,
("written", file), and on rank 0 ("commit", partial directory) right before the rename, ("committed", directory)."""

_SYNC_BYTES = 1 << 28
"""Written at most before the disk must have it: a single sync at the end could take minutes without a sign of life."""
_MAX_HEADER = 100_000_000
"""Bytes of a header: the limit of the safetensors library."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_shard(
    directory: Path,
    rank: int,
    state: State,
    *,
    moment: Moment,
    count: Callable[[int], None],
    sync: bool = True,
) -> list[FileEntry]:
    """Write a rank's files, on disk when it returns.

    Args:
        state: contiguous or not, in host memory (pinned or not) or on a device; must not change meanwhile.
        count: told the bytes of each chunk.
        sync: False: memory is no disk.

    Raises:
        OSError: of the file system.
        CheckpointError: a tensor of a type that safetensors does not know.
    """
    tensors, numbers = state
    tensor_name, number_name = shard_names(rank)
    text = json.dumps(numbers).encode()
    return [
        write_file(directory / tensor_name, _serialized(tensors), moment=moment, count=count, sync=sync),
        write_file(directory / number_name, halves(text), moment=moment, count=count, sync=sync),
    ]


def write_file(
    path: Path,
    chunks: Iterable[memoryview],
    *,
    moment: Moment,
    count: Callable[[int], None],
    sync: bool = True,
) -> FileEntry:
    """Write a new file chunk by chunk; its entry."""
    state = xxhash.xxh3_128()
    written = synced = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            state.update(chunk)
            rest = chunk
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            written += len(chunk)
            count(len(chunk))
            if sync and written - synced >= _SYNC_BYTES:
                os.fdatasync(descriptor)
                synced = written
            moment("chunk", path)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    moment("written", path)
    # a name that is none of a shard's (the manifest's) has no entry of its own in a manifest
    return FileEntry.model_construct(name=path.name, num_bytes=written, xxh3=state.hexdigest())


def halves(content: bytes) -> list[memoryview]:
    """A small file in two chunks: something can be in its middle, too."""
    view, middle = memoryview(content), len(content) // 2
    return [view[:middle], view[middle:]]


def read_shard(
    directory: Path,
    entries: Iterable[FileEntry],
    rank: int,
    *,
    patience: float = 0.0,
    beat: Callable[[], None] = lambda: None,
) -> State:
    """A rank's part of a checkpoint, compared with its manifest while it is read. The tensors share memory.

    Raises:
        DamagedError: a file is not what the manifest says, or not what it should be.
        CheckpointError: a file may not be read.
    """
    listed = {entry.name: entry for entry in entries}
    tensor_entry, number_entry = (listed[name] for name in shard_names(rank))
    content = torch.from_numpy(read_checked(directory, tensor_entry, patience, beat))
    tensors = _parsed(content, directory / tensor_entry.name)
    path = directory / number_entry.name
    try:
        numbers = json.loads(read_checked(directory, number_entry, patience, beat).tobytes())
    except (ValueError, RecursionError):
        numbers = None
    if not isinstance(numbers, dict):
        raise DamagedError(f"{path} of rank {rank} is no JSON object, which is refused; use another checkpoint")
    return tensors, numbers


def sync_directory(directory: Path) -> None:
    """Have the entries of a directory on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _serialized(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} is of type {tensor.dtype}, which a checkpoint cannot hold")
    # wide types first: each then begins at a multiple of its size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        flat = tensor.detach().reshape(-1)
        step = CHUNK_BYTES // flat.element_size()
        for first in range(0, flat.numel(), step):
            yield flat[first : first + step].cpu().contiguous().view(torch.uint8).numpy().data


def _parsed(content: Tensor, path: Path) -> dict[str, Tensor]:
    """Views of a safetensors file's bytes, [bytes] uint8, by name."""
    try:
        length = int.from_bytes(content[:8].numpy().tobytes(), "little")
        if length > min(_MAX_HEADER, len(content) - 8):
            raise ValueError
        header = json.loads(content[8 : 8 + length].numpy().tobytes())
        data = content[8 + length :]
        return {name: _view(data, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise DamagedError(f"{path} is no safetensors file, which is refused; use another checkpoint") from None


def _view(data: Tensor, entry: dict[str, Any]) -> Tensor:
    """
    Raises:
        ValueError, TypeError, LookupError: the entry contradicts itself, or leads out of the file.
    """
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError
    if not begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    part = data[begin:end]
    if part.data_ptr() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).reshape(shape)
