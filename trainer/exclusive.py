"""Small JSON files of which there is one for all machines: made whole, by one process and by no other, on network file
systems too."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def read(path: Path) -> dict[str, Any] | None:
    """A record; None: it is not there. One that is unreadable is empty: the number is taken all the same."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def place(path: Path, record: Mapping[str, object]) -> bool:
    """Create a file with its whole content, on disk; False: another process did, and it is untouched."""
    text = json.dumps(record).encode() + b"\n"
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write(partial, text)
        try:
            # a link appears whole, and on a network file system for one of two only
            os.link(partial, path)
            placed = True
        except FileExistsError:
            # the answer to a link that was made can be lost, and asked for again
            placed = partial.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            placed = _create(path, text)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)
    return placed


def _create(path: Path, text: bytes) -> bool:
    try:
        _write(path, text)
    except FileExistsError:
        return False
    return True


def _write(path: Path, text: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refresh(folder: Path) -> None:
    """Have a network file system ask its server again: a change of ours in a folder ends what is remembered of it."""
    path = folder / f".look.{secrets.token_hex(8)}"
    # on a full or read-only disk the plain look must do
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        path.unlink()
