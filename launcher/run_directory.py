"""The directory of a run: where everything about it lies, who may write in it, and whether it holds the same run.

A run directory is created, locked, compared and written here; files appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.starts import newest

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig

LOCK_FILE = ".lock"

HARMLESS = (
    "telemetry",
    "evaluation",
    "checkpoint",
    "guard",
    "snapshots",
    "supervision",
    "zero",
    "batch.micro",
    "cluster.nodes",
    "cluster.ranks_per_node",
    "cluster.threads_per_rank",
    "data.workers",
    "data.prefetch",
    "data.prepared",
    "data.accept_changed",
    "runs",
)
"""Options and sections that may change when a run goes on: none of them changes what is trained on what.

Ranks, ZeRO stage, offload and micro-batch are here because checkpoints are converted when they are loaded: the same
samples in the same order, the loss within floating-point noise. Threads and the layout of folders are here because only
the place changes; another number of threads can change the last bits of a sum. The guard is here because it changes
nothing until something goes wrong, and then one may want another.
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """An option that a run directory and a config give different values."""

    path: str
    old: Any
    new: Any

    @property
    def harmless(self) -> bool:
        return any(self.path == name or self.path.startswith(f"{name}.") for name in HARMLESS)

    def __str__(self) -> str:
        return f"{self.path}: {_value(self.old)} → {_value(self.new)}"


_ABSENT = object()


def _value(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)


def run_path(config: RunConfig) -> Path:
    """`runs/NAME`, absolute.

    Raises:
        RunDirectoryError: the name leads out of the folder of runs.
    """
    folder = Path(config.runs).absolute()
    path = folder / config.name
    if Path(os.path.normpath(path)).parent != Path(os.path.normpath(folder)):
        raise RunDirectoryError(
            f"name: {config.name!r} is not the name of a folder inside {folder}; use a name without slashes"
        )
    return path


def differences(old: RunConfig, new: RunConfig) -> list[Difference]:
    """The options whose values differ, by dotted path, in the order of the schema; elements of lists by index."""
    return list(_differences("", old.model_dump(mode="json"), new.model_dump(mode="json")))


def _differences(path: str, old: Any, new: Any) -> Iterator[Difference]:
    items: Iterator[tuple[Any, Any, Any]]
    if isinstance(old, dict) and isinstance(new, dict):
        items = ((key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in {**old, **new})
    elif isinstance(old, list) and isinstance(new, list):
        length = max(len(old), len(new))
        pad = [_ABSENT] * length
        items = iter(list(zip(range(length), (old + pad)[:length], (new + pad)[:length], strict=True)))
    else:
        if old != new or type(old) is not type(new):
            yield Difference(path, old, new)
        return
    for key, was, becomes in items:
        yield from _differences(f"{path}.{key}" if path else str(key), was, becomes)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old content or the new one and nothing between.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror}") from error


def read_outcome(root: Path) -> dict[str, Any] | None:
    """The content of `outcome.json`; None where there is none yet, or none that can be read, or one that an older start
    noted after a newer one had taken over."""
    files = RunFiles(root)
    try:
        outcome = json.loads(files.outcome.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(outcome, dict) or not isinstance(outcome.get("reason"), str):
        return None
    # 0: of a start that was refused before it took a number
    return None if 0 < outcome.get("start", 0) < newest(files) else outcome


def has_trained(root: Path) -> bool:
    """Whether there is anything of a training run in the directory that another config would contradict."""
    files = RunFiles(root)
    return files.ledger.exists() or (files.checkpoints.is_dir() and any(files.checkpoints.iterdir()))


def move_aside(root: Path) -> Path:
    """Rename a run directory to the first free NAME.old-N, and say which. Nothing is deleted."""
    number = 1
    while (target := root.with_name(f"{root.name}.old-{number}")).exists():
        number += 1
    try:
        return root.rename(target)
    except OSError as error:
        raise RunDirectoryError(f"{root} cannot be moved to {target}: {error.strerror}") from error


def create(root: Path) -> None:
    """Make the directory, or accept one that is empty or a run's.

    Raises:
        RunDirectoryError: it cannot be created or written, or holds something else.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        # a real write: permission bits say little for root, on network file systems and on full disks
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"x")
            file.flush()
    except FileExistsError:
        raise RunDirectoryError(f"{root} is a file; use another name, or move it away") from None
    except OSError as error:
        raise RunDirectoryError(
            f"the run directory {root} is not writable ({error.strerror}); change `runs` or `name`, or its permissions"
        ) from error
    if not RunFiles(root).config.exists() and any(entry.name != LOCK_FILE for entry in root.iterdir()):
        raise RunDirectoryError(f"{root} exists and is not a run directory (it holds no config.yaml); use another name")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[int | None]:
    """Hold the run for this process and for those that inherit the yielded descriptor; None: no locks here.

    Raises:
        RunDirectoryError: another process on this machine holds it; the text names the process.
    """
    path = root / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise RunDirectoryError(
                f"{root} is being run by process {holder} on this machine; wait for it, stop it (kill -TERM {holder}), "
                "or use another name"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            yield None
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        # the lock itself ends when the last process that inherited the descriptor closes it
        os.close(descriptor)
