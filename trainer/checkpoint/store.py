"""Write, commit, find and read checkpoints. Sharded: each rank writes and reads its own files, rank 0 commits.

A checkpoint is written under a temporary name and renamed when every rank's files are on disk, so a directory
`step-NNNNNNNN` is whole or does not exist. Only tensors (safetensors) and plain JSON: loading runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.checkpoint.manifest import MANIFEST, Manifest, check_file, entry_of, name_of, read_manifest, step_of
from trainer.errors import CheckpointError

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and the plain numbers that go with them."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint."""

    name: str
    num_bytes: int


class CheckpointStore:
    """The `checkpoints` folder of a run, seen by one rank.

    Args:
        folder: the run's `checkpoints` directory, on a file system that all ranks share.
        keep: newest checkpoints that stay.
        replicated: every rank holds the same state (ZeRO 0): rank 0 writes it, all read it.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, keep: int, replicated: bool):
        self.folder = folder
        self._rank = rank
        self._world_size = world_size
        self._keep = keep
        self._shard = 0 if replicated else rank

    def save(self, state: State, describe: Callable[[], Manifest]) -> Saved:
        """Write this rank's state and commit it with all others'. A collective.

        Args:
            state: what `engine.state.read_state` gives.
            describe: the manifest without its files; called on rank 0 only.

        Raises:
            CheckpointError: on all ranks when one of them could not write; nothing is left behind.
        """
        manifest = describe() if self._rank == 0 else None
        name = _from_first(name_of(manifest.step) if manifest else "")
        partial = self.folder / f"{name}.partial"
        error: str | None = None
        if self._rank == 0:
            error = _attempt(lambda: _fresh(partial))
        self._raise_together(error, partial)
        entries = []
        if self._shard == self._rank:
            error = _attempt(lambda: entries.extend(self._write(partial, state)))
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, (error, entries))
        self._raise_together(next((text for text, _ in gathered if text), None), partial)
        files = tuple(entry for _, listed in gathered for entry in listed)
        if manifest is not None:
            complete = manifest.model_copy(update={"files": files})
            error = _attempt(lambda: self._commit(partial, name, complete))
        self._raise_together(error, partial)
        return Saved(name, sum(entry.num_bytes for entry in files))

    def newest(self) -> Path | None:
        """The newest committed checkpoint: chosen by rank 0, the same on all ranks. A collective."""
        found = None
        if self._rank == 0:
            steps = committed_steps(self.folder)
            found = name_of(steps[-1]) if steps else None
        name = _from_first(found)
        return self.folder / name if name else None

    def load(self, directory: Path) -> tuple[Manifest, State]:
        """Verify and read this rank's part. A collective: an error of one rank is raised on all.

        Raises:
            CheckpointError: damaged, or from another number of ranks.
        """
        result: list[tuple[Manifest, State]] = []
        error = _attempt(lambda: result.append(self._read(directory)))
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, error)
        for text in gathered:
            if text:
                raise CheckpointError(text)
        return result[0]

    def _write(self, partial: Path, state: State) -> list[Any]:
        tensors, numbers = state
        tensor_file, number_file = (partial / name for name in _names(self._shard))
        # safetensors refuses tensors that share memory or are not contiguous; flat partitions are neither
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, tensor_file)
        number_file.write_text(json.dumps(numbers))
        for path in (tensor_file, number_file):
            _sync(path)
        return [entry_of(tensor_file), entry_of(number_file)]

    def _commit(self, partial: Path, name: str, manifest: Manifest) -> None:
        path = partial / MANIFEST
        path.write_text(manifest.model_dump_json(indent=1))
        _sync(path)
        _sync(partial)
        target = self.folder / name
        replaced = self.folder / f"{name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            # the same step again, after a resume from an earlier one
            target.rename(replaced)
        partial.rename(target)
        _sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        for step in committed_steps(self.folder)[: -self._keep]:
            shutil.rmtree(self.folder / name_of(step))

    def _read(self, directory: Path) -> tuple[Manifest, State]:
        manifest = read_manifest(directory)
        if manifest.world_size != self._world_size:
            raise CheckpointError(
                f"{directory} was written by {manifest.world_size} ranks and this start has {self._world_size}; "
                f"start {manifest.world_size} ranks"
            )
        entries = {entry.name: entry for entry in manifest.files}
        for name in _names(self._shard):
            if name not in entries:
                raise CheckpointError(f"{directory / MANIFEST} does not list {name}; the checkpoint is damaged")
            check_file(directory, entries[name])
        tensor_file, number_file = (directory / name for name in _names(self._shard))
        return manifest, (load_file(tensor_file), json.loads(number_file.read_text()))

    def _raise_together(self, error: str | None, partial: Path) -> None:
        """Raise rank 0's verdict on all ranks, after removing what was begun."""
        text = _from_first(error)
        if text:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(text)


def committed_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    steps = (step_of(path.name) for path in folder.iterdir() if (path / MANIFEST).is_file())
    return sorted(step for step in steps if step is not None)


def shard_files(directory: Path, manifest: Manifest) -> list[tuple[Path, Path]]:
    """(tensors, numbers) of every rank's shard, in the order of the ranks."""
    num_shards = 1 if manifest.stage == 0 else manifest.world_size
    return [(directory / tensors, directory / numbers) for tensors, numbers in map(_names, range(num_shards))]


def _names(rank: int) -> tuple[str, str]:
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def _fresh(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _attempt(action: Callable[[], Any]) -> str | None:
    """The sentence of what went wrong, so that it can be told to all ranks."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"the checkpoint could not be written or read: {error}"
    return None


def _from_first(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
