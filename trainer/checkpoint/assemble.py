"""Whole parameters out of the shards of a checkpoint, one at a time: memory does not grow with the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.manifest import Manifest, check_file, read_manifest
from trainer.checkpoint.store import shard_files
from trainer.errors import CheckpointError


def whole_parameters(directory: Path, *, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor in its full shape) of every trainable parameter in the manifest's order, then the buffers.

    Args:
        directory: a committed checkpoint, written by any number of ranks in any ZeRO stage.
        verify: compare sizes and hashes of all files first.

    Raises:
        CheckpointError: a file is damaged, or the shards do not cover a parameter.
    """
    manifest: Manifest = read_manifest(directory)
    if verify:
        for entry in manifest.files:
            check_file(directory, entry)
    with ExitStack() as stack:
        pieces: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
        buffers: dict[str, Any] = {}
        for tensor_file, number_file in shard_files(directory, manifest):
            opened = stack.enter_context(safe_open(tensor_file, framework="pt"))
            for fragment in json.loads(number_file.read_text())["fragments"]:
                pieces.setdefault(fragment["name"], []).append((opened, fragment))
            for name in opened.keys():  # noqa: SIM118 - an opened file is no mapping
                if name.startswith("buffer."):
                    buffers.setdefault(name.removeprefix("buffer."), opened)
        for name in manifest.parameters:
            if name not in pieces:
                raise CheckpointError(f"{directory} holds nothing of the parameter {name}; use another checkpoint")
            yield name, _join(directory, name, pieces[name])
        for name, opened in buffers.items():
            yield name, opened.get_tensor(f"buffer.{name}")


def _join(directory: Path, name: str, pieces: list[tuple[Any, dict[str, Any]]]) -> Tensor:
    shape = pieces[0][1]["shape"]
    whole = torch.empty(shape, dtype=torch.float32)
    flat = whole.view(-1)
    covered = 0
    for opened, fragment in pieces:
        start, count, offset = fragment["start"], fragment["num_elements"], fragment["offset"]
        part = opened.get_slice(f"flat.{fragment['flat']}.master")[offset : offset + count]
        flat[start : start + count] = part
        covered += count
    if covered != flat.numel():
        raise CheckpointError(
            f"{directory} holds {covered} of {flat.numel()} elements of {name}; use another checkpoint"
        )
    return whole
