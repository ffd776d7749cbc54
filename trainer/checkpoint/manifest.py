"""What a checkpoint directory says about itself: where the run stood, and size and hash of every file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from trainer.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT: Literal[3] = 3
_NAME = re.compile(r"step-(\d{8,})")


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """A plain name: it cannot leave the directory."""
    num_bytes: int
    xxh3: str
    """xxh3-128 of the content, hexadecimal."""


class Manifest(BaseModel):
    """Everything about a checkpoint but its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = FORMAT
    run: str = ""
    """Identity of the run (`trainer.starts`): a run made anew under the same name has another."""
    start: int = 0
    """Which start of the run wrote it."""
    step: int
    attempt: int
    next_batch: int
    quarantine: tuple[tuple[int, int], ...]
    world_size: int
    stage: int
    global_batch: int
    config_fingerprint: str
    data_fingerprint: str
    precision: str = ""
    """fp32, bf16 or fp16: what the model computes in. Empty: not known."""
    optimizer: str = ""
    """Kind of optimizer whose state it holds (`trainer.engine.state.optimizer_kind`). Empty: not known."""
    parameters: tuple[str, ...]
    """Trainable parameters in order."""
    files: tuple[FileEntry, ...]


def name_of(step: int) -> str:
    """Directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a committed checkpoint's directory name; None for anything else."""
    matched = _NAME.fullmatch(name)
    return int(matched.group(1)) if matched else None


def hash_of(path: Path) -> str:
    """xxh3-128 of a file's content."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def entry_of(path: Path) -> FileEntry:
    """Size and hash of a file as it lies on disk."""
    return FileEntry(name=path.name, num_bytes=path.stat().st_size, xxh3=hash_of(path))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = directory / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST}: it is not a whole checkpoint; use another") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a checkpoint's manifest ({error}); use another checkpoint") from None


def check_file(directory: Path, entry: FileEntry) -> None:
    """Compare a file with its entry.

    Raises:
        CheckpointError: missing or different; says what was expected and what was found.
    """
    path = directory / entry.name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is damaged, use another")
    size = path.stat().st_size
    if size != entry.num_bytes:
        raise CheckpointError(f"{path} has {size} bytes, expected {entry.num_bytes}; the checkpoint is damaged")
    found = hash_of(path)
    if found != entry.xxh3:
        raise CheckpointError(f"{path} has hash {found}, expected {entry.xxh3}; the checkpoint is damaged")
