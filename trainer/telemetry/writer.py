"""Writes a ledger off the hot path: one queue, one thread, one file, and the views that show it."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from trainer.errors import RunDirectoryError
from trainer.starts import NO_FENCE, Fence
from trainer.telemetry.ledger import Record, decode, encode

_MAX_PENDING_BYTES = 64 << 20


def now() -> float:
    """Unix seconds, to the microsecond: the `time` of a record."""
    return round(time.time(), 6)


class View(Protocol):
    """Something that shows a ledger. Both methods are called on the ledger's thread."""

    def update(self, record: Record) -> None:
        """Take in the next record, as a reader of the file gets it. It is shared: do not change it."""

    def close(self) -> None:
        """No record follows."""


def say(text: str) -> None:
    """The plainest way to be loud: a line on standard error."""
    print(text, file=sys.stderr, flush=True)


class Ledger:
    """Appends records to a ledger and hands them to views, all in one thread of its own: `write` only queues.

    What a full or failing disk refuses is kept in memory (64 MiB at most) and tried again with every record; the first
    failure is said through `complain`, training goes on, and `close` returns the error if lines are still missing then.
    A killed process loses what the thread had not yet taken up (milliseconds); `flush` after what must not be lost.

    Once a newer start of the run has taken over, nothing more is written or shown, and that is said through `complain`.
    """

    def __init__(
        self,
        path: Path,
        make_views: Sequence[Callable[[], View]] = (),
        complain: Callable[[str], None] = say,
        fence: Fence = NO_FENCE,
    ):
        """Opens or creates the ledger; a line that a killed process left unfinished is ended first.

        Each of `make_views` is called in the ledger's thread once the file is open.

        Raises:
            RunDirectoryError: the file cannot be opened for writing.
        """
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunDirectoryError(
                f"the ledger {path} cannot be opened for writing ({error.strerror}); check its directory's permissions"
            ) from error
        size = os.fstat(self._file).st_size
        self._pending = bytearray(b"\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else b"")
        self._num_dropped = 0
        self._lost = False
        self._problem: OSError | None = None
        self._views: list[View] = []
        self._make_views = make_views
        self._complain = complain
        self._fence = fence
        self._ended = False
        self._queue: queue.SimpleQueue[Callable[[], Record | None] | threading.Event | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    def write(self, make: Callable[[], Record | None]) -> None:
        """Queues one record. `make` is called later, in the ledger's thread: what it holds must not change. None from
        it: there is nothing to write after all."""
        self._queue.put(make)

    def flush(self) -> bool:
        """Waits until all that was written before is on disk and shown; False where lines are missing on disk."""
        if not self._closed:
            done = threading.Event()
            self._queue.put(done)
            done.wait()
        return self._problem is None and not self._ended

    def close(self) -> OSError | None:
        """Waits for the last record and the views; the error where lines are missing on disk, unless they would not
        belong there any more. Idempotent."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            os.close(self._file)
        return None if self._ended else self._problem

    def _work(self) -> None:
        for make_view in self._make_views:
            try:
                self._views.append(make_view())
            except Exception as error:  # noqa: BLE001
                self._complain(f"a view of {self.path.name} could not be opened and is off: {error!r}")
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                self._sync()
                item.set()
            elif not self._superseded():
                self._add(item)
                if self._queue.empty():
                    self._drain()
        self._sync()
        if self._problem is not None and not self._ended:
            self._complain(
                f"{self.path} is incomplete: the disk refused records until the end ({self._problem.strerror})"
            )
        for view in list(self._views):
            self._guarded(view, view.close)

    def _superseded(self) -> bool:
        """Whether the ledger is a newer start's by now; what was not written yet is dropped then."""
        if not self._ended and self._fence.superseded:
            self._ended = True
            self._pending.clear()
            self._complain(f"{self.path} is a newer start's by now: the records of this one end here")
        return self._ended

    def _add(self, make: Callable[[], Record | None]) -> None:
        try:
            if (made := make()) is None:
                return
            line = encode(made)
        except Exception as error:  # noqa: BLE001 - a record that cannot be made must not end the thread
            self._complain(f"a record of {self.path.name} could not be made and is missing: {error!r}")
            return
        if len(self._pending) + len(line) > _MAX_PENDING_BYTES:
            self._num_dropped += 1
        else:
            self._pending += line
        record = decode(line)
        for view in list(self._views):
            self._guarded(view, lambda view=view: view.update(record))  # type: ignore[misc]

    def _guarded(self, view: View, action: Callable[[], None]) -> None:
        """A view that fails is said once and left out from then on: showing must never stop training."""
        try:
            action()
        except Exception as error:  # noqa: BLE001
            self._views.remove(view)
            self._complain(f"{type(view).__name__} failed and is off from now on: {error!r}")

    def _drain(self) -> bool:
        """Writes what is pending; whether all of it was taken."""
        if self._superseded():
            return False
        try:
            while self._pending:
                del self._pending[: os.write(self._file, self._pending)]
        except OSError as error:
            self._fail(error)
            return False
        if self._problem is not None and not self._lost:
            self._lost = self._num_dropped > 0
            if self._lost:
                self._complain(f"{self.path} is being written again, but lacks {self._num_dropped} records")
            else:
                self._complain(f"{self.path} is being written again; nothing was lost")
                self._problem = None
        return True

    def _sync(self) -> None:
        if not self._drain():
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            # the kernel may have thrown away what it had accepted
            self._lost = True
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._problem is None:
            self._complain(
                f"the ledger {self.path} cannot be written ({error.strerror}); training goes on and its records wait "
                f"in memory: free some space"
            )
        self._problem = error
