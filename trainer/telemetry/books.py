"""The accounts of a run, kept from its ledger. Standard library only: the launcher reads them too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.starts import newest as newest_start
from trainer.telemetry.goodput import Accountant
from trainer.telemetry.ledger import Record, decode, read_ledger

JOB_VARIABLE = "TRIMTAB_JOB"
"""Environment variable of ranks that a job of a scheduler started, JSON: `job` (its id), `restart` (how often it was
requeued), `nodes`, `allocated` (Unix seconds from which the time of this start counts), `parts` (what came before the
ranks → its seconds), and if there were any `earlier` (began and ended, in Unix seconds, of each job of the run before
this one)."""

_BLOCK_BYTES = 1 << 20
_START = b'{"kind":"start",'


class Books:
    """The accounts that a start of a run keeps: for the ledger's thread. Failing, they end, and no record is lost."""

    def __init__(self, path: Path, start: int, complain: Callable[[str], None]):
        """`start`: number of the start that writes from now on into the ledger at `path`."""
        self._path = path
        self._before = start - 1
        self._complain = complain
        self._accountant: Accountant | None = None
        self._failed = False

    def feed(self, record: Record) -> None:
        """Take in the next record; the first is a `start`. With it the ledger is read as far back as it takes."""
        if self._failed:
            return
        try:
            if self._accountant is None:
                self._accountant = account(self._path, newest=self._before)
            self._accountant.feed(record)
        except Exception as error:  # noqa: BLE001 - accounts must not cost a record
            self._failed = True
            self._complain(f"the accounts of {self._path} end here, goodput is not recorded any more: {error!r}")

    def record(self, then: Record | None = None) -> Record | None:
        """A `goodput` record, of the time after `then` where that is given; None: the accounts have failed."""
        if then is not None:
            self.feed(then)
        if self._failed or self._accountant is None:
            return None
        return {"kind": "goodput", **self._accountant.record()}


def account(
    path: Path,
    step: float = math.inf,
    attempt: float = math.inf,
    *,
    end: int | None = None,
    newest: int | None = None,
    whole: bool = True,
) -> Accountant:
    """The accounts of the ledger at `path` at its end, or where its byte `end` is; empty where there is no ledger.

    They are gone on with from the newest `goodput` record, so that little is read. What a later resume or rollback
    needs of the time before is read then.

    Args:
        step, attempt: the rows begin there or earlier.
        newest: number of the newest start that may have written into it; None: as the run's starts say.
        whole: read all of a ledger without such a record; else its accounts are empty.
    """
    newest = newest_start(RunFiles(path.parent)) if newest is None else newest
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for place, record in _records(file, "goodput", end, newest):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                if record["step"] <= step and record["attempt"] <= attempt:
                    earlier = partial(account, path, end=place, newest=newest)
                    accountant = Accountant.restored(record, earlier)
                    return _fed(accountant, path, place, end, record["start"])
    return _fed(Accountant(), path, 0, end, 0) if whole else Accountant()


def newest_of(path: Path, kind: str) -> Record | None:
    """The newest record of a kind, found without a look at the others; None: none, or no ledger."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for _, record in _records(file, kind, None, newest_start(RunFiles(path.parent))):
            return record
    return None


def first_attempt(path: Path) -> tuple[Record | None, Record | None]:
    """The newest `start` record, and the first attempt of that start; None where there is none yet."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for place, start in _records(file, "start", None, newest_start(RunFiles(path.parent))):
            following = read_ledger(path, place, start=start["start"])
            return start, next((record for record in following if record["kind"] == "attempt"), None)
    return None, None


def _fed(accountant: Accountant, path: Path, first: int, end: int | None, start: int) -> Accountant:
    with contextlib.suppress(RunDirectoryError):
        for record in read_ledger(path, first, math.inf if end is None else end, start):
            accountant.feed(record)
    return accountant


def _records(file: BinaryIO, kind: str, end: int | None, newest: int) -> Iterator[tuple[int, Record]]:
    """(offset, record) of a kind from the end back, without what a start wrote after a newer one had begun."""
    for place in _places(file, b'{"kind":"%s",' % kind.encode(), end):
        with contextlib.suppress(ValueError, KeyError):
            record = _line(file, place)
            # only in the shadow of a newer start it takes a look at what was written before it
            if record["start"] >= newest or record["start"] >= _start_before(file, place):
                yield place, record


def _start_before(file: BinaryIO, end: int) -> int:
    """Number of the newest start that has begun before a place."""
    for place in _places(file, _START, end):
        with contextlib.suppress(ValueError, KeyError):
            return int(_line(file, place)["start"])
    return 0


def _line(file: BinaryIO, place: int) -> Record:
    file.seek(place)
    return decode(file.readline())


def _places(file: BinaryIO, prefix: bytes, end: int | None = None) -> Iterator[int]:
    """Offsets of the lines with this beginning, from byte `end` or that of the file back. They are found without a look
    at what else the lines say."""
    mark = b"\n" + prefix
    stop = file.seek(0, 2) if end is None else max(0, end - 1)
    while stop > 0:
        first = max(0, stop - _BLOCK_BYTES)
        file.seek(first)
        # the end of a mark may lie in the block that was read before
        block = file.read(stop - first + len(mark) - 1)
        at = len(block)
        while (at := block.rfind(mark, 0, at)) >= 0:
            yield first + at + 1
            at += len(mark) - 1
        stop = first
    file.seek(0)
    if (end is None or end > 0) and file.read(len(prefix)) == prefix:
        yield 0
