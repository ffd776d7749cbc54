"""Hashes of file contents, remembered between runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

_BLOCK = 1 << 22
_SECONDS_TO_SETTLE = 2.0
"""A file that was changed later than this may change again within the clock's resolution: not remembered."""


def content_hash(path: Path) -> str:
    """128-bit xxh3 of the file, as hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class ContentHashes:
    """Hashes by path. A file whose size, inode and times of change are as remembered is not read again.

    The time of the inode's change (ctime) cannot be set back by a program, so a restored mtime does not hide a change.
    """

    def __init__(self, cache: Path):
        self._cache = cache
        try:
            self._known: dict[str, list[object]] = json.loads(cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def of(self, path: Path, hash_file: Callable[[Path], str] = content_hash) -> str:
        """The hash of the file's content."""
        status = path.stat()
        known = self._known.get(str(path))
        if known and known[:-1] == _stamp(status):
            return str(known[-1])
        result = hash_file(path)
        if time.time() - max(status.st_mtime, status.st_ctime) > _SECONDS_TO_SETTLE:
            self.remember(path, status, result)
        return result

    def remember(self, path: Path, status: os.stat_result, result: str) -> None:
        """Keep the hash of a file that has settled; `status` was taken before it was read."""
        self._known[str(path)] = [*_stamp(status), result]
        self._changed = True

    def save(self) -> None:
        """Write what is remembered. Where that fails, or another process does so too, files are hashed again."""
        if self._changed:
            temporary = self._cache.with_name(f"{self._cache.name}.{os.getpid()}.tmp")
            with suppress(OSError):
                temporary.write_text(json.dumps(self._known), encoding="utf-8")
                temporary.replace(self._cache)
                self._changed = False


def _stamp(status: os.stat_result) -> list[object]:
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
