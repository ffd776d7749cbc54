"""Whole parameters out of the shards of checkpoints, one at a time: memory does not grow with the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.elastic import BUFFER, read_buffers
from trainer.checkpoint.layout import AVERAGE, MASTER, Piece, covers, read_layout
from trainer.checkpoint.manifest import check_file, read_manifest, shard_files
from trainer.checkpoint.slices import OpenFiles
from trainer.errors import CheckpointError


def whole_parameters(directory: Path, *, key: str = MASTER, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor in its full shape) of every trainable parameter in the manifest's order, then the buffers.

    Args:
        directory: a committed checkpoint, written by any number of ranks in any ZeRO stage.
        key: `master`, their moving average (`ema`), or a moment (`exp_avg`, `exp_avg_sq`): then without buffers.
        verify: compare sizes and hashes of all files first.

    Raises:
        CheckpointError: a file is damaged, or the shards do not cover a parameter.
    """
    manifest = read_manifest(directory)
    if verify:
        for entry in manifest.files:
            check_file(directory, entry)
    files = shard_files(directory, manifest)
    pieces: dict[str, list[tuple[int, Piece]]] = {}
    for rank, (_, path) in enumerate(files):
        for piece in read_layout(path)[0].fragments:
            pieces.setdefault(piece.name, []).append((rank, piece))
    with OpenFiles([path for path, _ in files]) as opened:
        for name in manifest.parameters:
            if name not in pieces:
                raise CheckpointError(f"{directory} holds nothing of the parameter {name}; use another checkpoint")
            yield name, _join(directory, name, key, pieces[name], opened)
    if key in (MASTER, AVERAGE):
        for name, buffer in read_buffers(files[0][0]).items():
            yield name.removeprefix(BUFFER), buffer


def averaged_parameters(directories: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """As :func:`whole_parameters`: the mean over checkpoints, in fp64, rounded once. Buffers are the last one's.

    Args:
        directories: committed checkpoints of one model, in any shapes; at least one.

    Raises:
        CheckpointError: they are of different models, or one of them is damaged.
    """
    names = [read_manifest(directory).parameters for directory in directories]
    for directory, other in zip(directories, names, strict=True):
        if other != names[0]:
            raise CheckpointError(f"{directory} and {directories[0]} are of different models: they have no average")
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(whole_parameters(directory))) for directory in directories]  # type: ignore[type-var]
        for name in names[0]:
            total: Tensor | None = None
            for directory, stream in zip(directories, streams, strict=True):
                _, tensor = next(stream)
                if total is None:
                    total = torch.zeros(tensor.shape, dtype=torch.float64)
                if total.shape != tensor.shape:
                    raise CheckpointError(
                        f"{name} is {list(tensor.shape)} in {directory} and {list(total.shape)} before"
                    )
                total += tensor
            assert total is not None
            yield name, total.div_(len(streams)).float()
        yield from streams[-1]


def _join(directory: Path, name: str, key: str, pieces: list[tuple[int, Piece]], opened: OpenFiles) -> Tensor:
    shape = pieces[0][1].shape
    if any(piece.shape != shape for _, piece in pieces):
        raise CheckpointError(f"the ranks of {directory} disagree on the shape of {name}; use another checkpoint")
    if wrong := covers(((piece.start, piece.num_elements) for _, piece in pieces), 0, math.prod(shape)):
        raise CheckpointError(f"{directory} does not hold {name} whole and once ({wrong}); use another checkpoint")
    whole = torch.empty(shape, dtype=torch.float32)
    flat = whole.view(-1)
    for rank, piece in pieces:
        room = flat.narrow(0, piece.start, piece.num_elements)
        opened[rank].read(f"flat.{piece.flat}.{key}", piece.offset, room)
    return whole
