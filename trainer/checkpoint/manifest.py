"""What a checkpoint directory says about itself: where the run stood, size and hash of every file. Free of torch."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from trainer.errors import CheckpointError, DamagedError
from trainer.exclusive import refresh

MANIFEST = "manifest.json"
HEALTHY = "healthy"
"""Marker file: the steps after this checkpoint were clean. Not part of the manifest, it comes later."""
BEST = "best"
"""Marker file: this checkpoint was better than all before; holds by which score, and its value."""
FORMAT: Literal[3] = 3
CHUNK_BYTES = 1 << 22
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-(\d{5,})\.(safetensors|json)")


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=rf"^{_FILE.pattern}$")]
    """`rank-NNNNN.safetensors` or `rank-NNNNN.json` and nothing else: it cannot leave the directory."""
    num_bytes: NonNegativeInt
    xxh3: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    """xxh3-128 of the content, hexadecimal."""

    @property
    def rank(self) -> int:
        """Whose part of the state it holds."""
        matched = _FILE.fullmatch(self.name)
        assert matched is not None
        return int(matched.group(1))


class Manifest(BaseModel):
    """Everything about a checkpoint but its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = FORMAT
    run: str = ""
    """Identity of the run (`trainer.starts`): a run made anew under the same name has another."""
    start: int = 0
    """Which start of the run wrote it."""
    step: NonNegativeInt
    attempt: int
    next_batch: int
    quarantine: tuple[tuple[int, int], ...]
    world_size: PositiveInt
    stage: int
    precision: str = ""
    """fp32, bf16 or fp16: what the model computes in. Empty: not known."""
    optimizer: str = ""
    """Kind of optimizer whose state it holds (`trainer.engine.state.optimizer_kind`). Empty: not known."""
    global_batch: int
    config_fingerprint: str
    data_fingerprint: str
    parameters: tuple[str, ...]
    """Trainable parameters in order."""
    files: tuple[FileEntry, ...]
    checksum: str = ""
    """xxh3-128 of all the rest; :func:`write_manifest` fills it in."""

    @property
    def num_shards(self) -> int:
        """Ranks that wrote files: ZeRO 0 holds the same state on all, and only the first writes it."""
        return 1 if self.stage == 0 else self.world_size

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(entry.num_bytes for entry in self.files)


def name_of(step: int) -> str:
    """Directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a committed checkpoint's directory name; None for anything else."""
    matched = _NAME.fullmatch(name)
    return int(matched.group(1)) if matched else None


def committed_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    steps = (step_of(path.name) for path in folder.iterdir() if (path / MANIFEST).is_file())
    return sorted(step for step in steps if step is not None)


def shard_names(rank: int) -> tuple[str, str]:
    """Names of a rank's files: tensors, numbers."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def shard_files(directory: Path, manifest: Manifest) -> list[tuple[Path, Path]]:
    """(tensors, numbers) of every rank's shard, in the order of the ranks."""
    names = map(shard_names, range(manifest.num_shards))
    return [(directory / tensors, directory / numbers) for tensors, numbers in names]


def is_healthy(directory: Path) -> bool:
    """Whether the steps after this checkpoint are known to have been clean."""
    return (directory / HEALTHY).is_file()


def best_score(directory: Path) -> str | None:
    """The score by which a checkpoint was better than all before; None: it was not, or that is not known."""
    try:
        return str(json.loads((directory / BEST).read_text())["score"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def encode_manifest(manifest: Manifest) -> bytes:
    """What `manifest.json` holds, with its checksum."""
    return manifest.model_copy(update={"checksum": _checksum(manifest)}).model_dump_json(indent=1).encode()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Put `manifest.json` into a directory, with its checksum."""
    (directory / MANIFEST).write_bytes(encode_manifest(manifest))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        DamagedError: there is none, it is not one, or it was changed after it was written.
        CheckpointError: another version wrote it, or it cannot be read.
    """
    path = directory / MANIFEST
    if directory.is_symlink():
        raise DamagedError(f"{directory} is a link, which is not followed; use another checkpoint")
    try:
        with regular_file(path) as descriptor:
            content = os.read(descriptor, os.fstat(descriptor).st_size)
    except FileNotFoundError:
        raise DamagedError(f"{directory} has no {MANIFEST}: it is not a whole checkpoint; use another") from None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if place == "format" and type(first["input"]) is int:
            raise CheckpointError(
                f"{path} has format {first['input']} and this version reads {FORMAT}; use the version that wrote it"
            ) from None
        found = f"{place or 'the content'} is {str(first['input'])[:60]!r}: {first['msg']}"
        raise DamagedError(f"{path} is not a checkpoint's manifest ({found}); use another checkpoint") from None
    if manifest.checksum != _checksum(manifest):
        raise DamagedError(
            f"{path} has checksum {_checksum(manifest)}, expected {manifest.checksum}; the checkpoint is damaged"
        )
    return manifest


def check_listing(directory: Path, manifest: Manifest) -> None:
    """
    Raises:
        DamagedError: the manifest is not of this step, or does not list exactly one shard of every rank.
    """
    path = directory / MANIFEST
    if name_of(manifest.step) != directory.name:
        raise DamagedError(f"{path} is that of step {manifest.step}, not of {directory.name}; use another checkpoint")
    listed = [entry.name for entry in manifest.files]
    if len(listed) != 2 * manifest.num_shards:
        raise DamagedError(
            f"{path} lists {len(listed)} files, expected {2 * manifest.num_shards}; the checkpoint is damaged"
        )
    for rank in range(manifest.num_shards):
        for name in shard_names(rank):
            if name not in listed:
                raise DamagedError(f"{path} does not list {name} of rank {rank}; the checkpoint is damaged")


def entry_of(path: Path) -> FileEntry:
    """Size and hash of a file as it lies on disk."""
    return FileEntry(name=path.name, num_bytes=path.stat().st_size, xxh3=hash_of(path))


def hash_of(path: Path) -> str:
    """xxh3-128 of a file's content."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def check_file(
    directory: Path, entry: FileEntry, patience: float = 0.0, beat: Callable[[], None] = lambda: None
) -> None:
    """Compare a file with its entry.

    Args:
        patience: seconds in which a missing file may still appear (attribute caches of network file systems).
        beat: called after every chunk.

    Raises:
        DamagedError: missing, not a regular file, unreadable or different; names file and rank, what was expected and
            what was found.
        CheckpointError: it may not be read.
    """
    scratch = np.empty(CHUNK_BYTES, dtype=np.uint8)
    for _ in _checked_chunks(directory, entry, lambda _: scratch, patience):
        beat()


def read_checked(
    directory: Path, entry: FileEntry, patience: float = 0.0, beat: Callable[[], None] = lambda: None
) -> NDArray[np.uint8]:
    """The content of a file that is what its entry says; arguments and errors are those of :func:`check_file`."""
    content = np.empty(0, dtype=np.uint8)

    def room(offset: int) -> NDArray[np.uint8]:
        nonlocal content
        if not content.size:
            # only now is it known that the file is as large as the manifest says
            content = np.empty(entry.num_bytes, dtype=np.uint8)
        return content[offset : offset + CHUNK_BYTES]

    for _ in _checked_chunks(directory, entry, room, patience):
        beat()
    return content


def _checked_chunks(
    directory: Path, entry: FileEntry, room: Callable[[int], NDArray[np.uint8]], patience: float
) -> Iterator[None]:
    """Reads into `room(offset)`, chunk by chunk, and compares at the end. Without the interpreter's lock."""
    path = directory / entry.name
    owner = f"this part of the checkpoint, of rank {entry.rank}, is damaged"
    try:
        with regular_file(path, patience) as descriptor:
            size = os.fstat(descriptor).st_size
            if size != entry.num_bytes:
                raise DamagedError(f"{path} has {size} bytes, expected {entry.num_bytes}; {owner}")
            state = xxhash.xxh3_128()
            done = 0
            while done < size:
                chunk = room(done)[: size - done].data
                count = os.readv(descriptor, [chunk])
                if count == 0:
                    raise DamagedError(f"{path} has {done} bytes, expected {entry.num_bytes}; {owner}")
                state.update(chunk[:count])
                done += count
                yield
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing, expected {entry.num_bytes} bytes; {owner}") from None
    if state.hexdigest() != entry.xxh3:
        raise DamagedError(f"{path} has hash {state.hexdigest()}, expected {entry.xxh3}; {owner}")


@contextmanager
def regular_file(path: Path, patience: float = 0.0) -> Iterator[int]:
    """The descriptor of a file opened for reading; links are not followed, and pipes or devices never opened.

    Raises:
        FileNotFoundError: there is none, also after `patience` seconds.
        DamagedError: something else than a regular file, or the disk has lost it.
        CheckpointError: it cannot be read now.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            # without O_NONBLOCK a pipe would wait for its writer
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DamagedError(f"{path} is a link, which is not followed; use another checkpoint") from None
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise _unreadable(path, error) from None
            if time.monotonic() >= deadline:
                raise FileNotFoundError(errno.ENOENT, "missing", str(path)) from None
            refresh(path.parent if path.parent.is_dir() else path.parent.parent)
            time.sleep(0.1)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedError(f"{path} is not a regular file, which is refused; use another checkpoint")
        yield descriptor
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """Only what the disk itself has lost is damage; rights and networks can come back."""
    if error.errno in (errno.EIO, errno.ENOTDIR, errno.EBADMSG, errno.EUCLEAN):
        return DamagedError(f"{path} cannot be read ({error.strerror}); the checkpoint is damaged")
    return CheckpointError(f"{path} cannot be read ({error.strerror}); see to its permissions and its file system")


def _checksum(manifest: Manifest) -> str:
    return str(xxhash.xxh3_128(manifest.model_copy(update={"checksum": ""}).model_dump_json().encode()).hexdigest())
