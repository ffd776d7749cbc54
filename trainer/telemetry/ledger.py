"""The ledger of a run: append-only `RUN/ledger.jsonl`, one JSON line an attempt and one an event.

Standard library only: the launcher reads ledgers too. `writer.py` writes them.

Every record has `kind`, `time` (Unix seconds) and `start` (which start of the run wrote it, from 1). TensorBoard, the
console and the report are views of these records; `docs/telemetry.md` lists the fields of each kind.

The lines are strict JSON. A float that JSON does not have is written as the string "NaN", "Infinity" or "-Infinity" and
read back as the float; a text that happens to be one of these is written with a leading "~", so nothing is ambiguous.

What an older start appended after a newer one had begun (it was cut off, and did not know) is of no history: every
reader leaves it out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.starts import newest as newest_start

Record = dict[str, Any]

FILE_NAME = "ledger.jsonl"

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ESCAPE = "~"
_BLOCK_BYTES = 1 << 16
_POLL_SECONDS = 0.2
_OF_A_STEP = ("attempt", "weights", "part_norms", "evaluation", "predictions")
_LEVELS = {"examined": "info", "recovered": "info", "halted": "error"}


def encode(record: Record) -> bytes:
    """One line of strict JSON with its newline; finite floats round-trip exactly."""
    return json.dumps(_escaped(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Record:
    """The record of one line.

    Raises:
        ValueError: the line is not a JSON object with a kind.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("a record is a JSON object with a kind")
    # most lines hold no such string, and walking each costs more than parsing it
    return _unescaped(record) if b'NaN"' in line or b'Infinity"' in line else record


def _escaped(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if isinstance(value, str) and value.lstrip(_ESCAPE) in _NONFINITE:
        return _ESCAPE + value
    return value


def _unescaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unescaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unescaped(item) for item in value]
    if isinstance(value, str) and value.lstrip(_ESCAPE) in _NONFINITE:
        return value[1:] if value.startswith(_ESCAPE) else _NONFINITE[value]
    return value


def read_ledger(path: Path, first: int = 0, end: float = math.inf, start: int = 0) -> Iterator[Record]:
    """The records of a ledger in order; or of the lines that begin at the bytes from `first` to `end`, the newest start
    before which was `start`.

    A last line without an end is being written, or was cut off when its process died: it is left out. A damaged line
    before that gives a `message` record of level "warning" in its place, so that every view shows it; so does what an
    older start appended after a newer one had begun, once for each older start.

    Raises:
        RunDirectoryError: there is no ledger at `path`.
    """
    admitted = _Succession(start).admitted
    try:
        with path.open("rb") as file:
            file.seek(first)
            for number, line in enumerate(file, 1):
                if first >= end:
                    return
                first += len(line)
                record = _record_of(line, number)
                if record is not None and (record := admitted(record)) is not None:
                    yield record
    except FileNotFoundError:
        raise RunDirectoryError(f"there is no ledger at {path}; is {path.parent} a run that has started?") from None


def follow(path: Path, stop: threading.Event, poll_seconds: float = _POLL_SECONDS) -> Iterator[Record]:
    """The records of a ledger that is being written, from its first, each as soon as it is there.

    Waits for the file if it does not exist yet. Ends when `stop` is set and everything written before that was yielded.
    """
    while not path.exists():
        if stop.wait(poll_seconds):
            return
    number, unfinished = 0, b""
    admitted = _Succession().admitted
    with path.open("rb") as file:
        while True:
            last_look = stop.is_set()
            for piece in file:
                unfinished += piece
                if unfinished.endswith(b"\n"):
                    number += 1
                    record = _record_of(unfinished, number)
                    unfinished = b""
                    if record is not None and (record := admitted(record)) is not None:
                        yield record
            if last_look:
                return
            stop.wait(poll_seconds)


class _Succession:
    """Tells what belongs into a ledger from what a start wrote that was superseded by then."""

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._told: set[int] = set()

    def admitted(self, record: Record) -> Record | None:
        """The next record, in the order of the file; in the place of the first that an older start wrote too late a
        warning, None in the place of the others."""
        start = record.get("start", 0)
        if record["kind"] == "start":
            self._start = max(self._start, start)
        if start >= self._start or start == 0:
            return record
        if start in self._told:
            return None
        self._told.add(start)
        text = f"what start {start} wrote after start {self._start} had taken over was left out"
        return _warning(text)


def _warning(text: str) -> Record:
    return {"kind": "message", "time": 0.0, "start": 0, "level": "warning", "text": text, "step": None}


def _record_of(line: bytes, number: int) -> Record | None:
    """The record of a line; None for a cut-off last line or an empty one."""
    try:
        return decode(line)
    except ValueError:
        if not line.strip() or not line.endswith(b"\n"):
            return None
        return _warning(f"line {number} of the ledger is damaged (cut off when its process died?) and was left out")


def standing(records: Iterable[Record], kind: str = "attempt") -> list[Record]:
    """The records of one kind that stand in the present weights, by step.

    A `start` that resumed undoes all that came after the attempt of its checkpoint, rollbacks included. A `rewind`
    takes back the steps after the one that it went to. Attempts whose update was not applied (skipped, overflowed) do
    not stand. Of two records of one step the later stands.
    """
    history: list[tuple[int, Record]] = []
    attempt = 0
    for record in records:
        attempt = record.get("attempt", attempt)
        if record["kind"] == "start":
            step, limit = record["resumed_step"], record.get("resumed_attempt", math.inf)
            history = [
                (at, earlier)
                for at, earlier in history
                if at <= limit and (earlier["kind"] == "rewind" or earlier["step"] <= step)
            ]
        elif record["kind"] == "rewind" or (record["kind"] == kind and record.get("applied", True)):
            history.append((attempt, record))
    kept: dict[int, Record] = {}
    for _, record in history:
        if record["kind"] == "rewind":
            kept = {step: earlier for step, earlier in kept.items() if step <= record["to_step"]}
        else:
            kept[record["step"]] = record
    return [kept[step] for step in sorted(kept)]


def surviving(path: Path) -> Iterator[Record]:
    """The records of a ledger without those of steps that were done again, after a resume or a rollback. Attempts that
    were not applied are kept where the step that they tried stands; the rollbacks of the run's history are kept.

    Raises:
        RunDirectoryError: there is no ledger at `path`.
    """
    return (record for record, survives in history(path) if survives)


def history(path: Path) -> Iterator[tuple[Record, bool]]:
    """Every record of a ledger, and whether it survives: see `surviving`.

    Reads the file twice rather than hold it in memory.

    Raises:
        RunDirectoryError: there is no ledger at `path`.
    """
    resumed: dict[int, Record] = {}
    rewinds: list[tuple[int, Record]] = []
    for number, record in enumerate(read_ledger(path)):
        if record["kind"] == "start":
            resumed[record["start"]] = record
        elif record["kind"] == "rewind":
            rewinds.append((number, record))
    limits: dict[int, tuple[float, float]] = {}
    last_step = last_attempt = math.inf
    for start in sorted(resumed, reverse=True):
        limits[start] = last_step, last_attempt
        last_step = min(last_step, resumed[start]["resumed_step"])
        last_attempt = min(last_attempt, resumed[start].get("resumed_attempt", math.inf))

    def in_history(record: Record, attempt: int) -> bool:
        return attempt <= limits.get(record["start"], (math.inf, math.inf))[1]

    # the lowest step that a later rollback went to, by how many of the rollbacks were passed
    rewinds = [(number, record) for number, record in rewinds if in_history(record, record["attempt"])]
    floors = [math.inf]
    for _, record in reversed(rewinds):
        floors.insert(0, min(floors[0], record["to_step"]))

    def told() -> Iterator[tuple[Record, bool]]:
        attempt = passed = 0
        for number, record in enumerate(read_ledger(path)):
            attempt = record.get("attempt", attempt)
            while passed < len(rewinds) and rewinds[passed][0] <= number:
                passed += 1
            survives = True
            if record["kind"] in _OF_A_STEP:
                highest = min(limits.get(record["start"], (math.inf, math.inf))[0], floors[passed])
                survives = record["step"] <= highest and in_history(record, attempt)
            elif record["kind"] == "rewind":
                survives = in_history(record, attempt)
            yield record, survives

    return told()


def lived(path: Path) -> Iterator[Record]:
    """The records of a ledger without what a resume took back. What a rollback took back is kept: it happened.

    Raises:
        RunDirectoryError: there is no ledger at `path`.
    """
    starts = [record for record in read_ledger(path) if record["kind"] == "start"]
    limits: dict[int, float] = {}
    limit = math.inf
    for record in reversed(starts):
        limits[record["start"]] = limit
        limit = min(limit, record.get("resumed_attempt", math.inf))
    return (record for record in read_ledger(path) if record.get("attempt", 0) <= limits.get(record["start"], math.inf))


def notice(record: Record) -> tuple[str, str] | None:
    """(level, text) where a record is something that a person must hear: every view shows the same notices."""
    match record["kind"]:
        case "message":
            return record["level"], record["text"]
        case "incident":
            whose = f"incident {record['incident']} {record['phase']}" if record["incident"] else "guard"
            return _LEVELS.get(record["phase"], "warning"), f"{whose}: {record['text']}"
        case "attempt" if not record["applied"]:
            return _not_applied(record)
        case "attempt" if not record["agree"]:
            return "error", f"the ranks disagree about the decision before attempt {record['attempt']}"
        case "outcome":
            level = "info" if record["reason"] in ("completed", "stopped") else "error"
            return level, f"{record['reason']}: {record['message']}"
    return None


def batches(first: int, last: int) -> str:
    """A range of batches in words."""
    return f"batch {first}" if first == last else f"batches {first}–{last}"


def _not_applied(record: Record) -> tuple[str, str] | None:
    if record.get("incident"):
        return None  # the incident's own lines tell it
    reason = record["reason"] or f"the update overflowed at loss scale {record['loss_scale']:g}"
    verb = {"halt": "halted at", "replay": "computes once more", "rollback": "rolls back at"}.get(
        record["verdict"], "skipped"
    )
    return "warning", f"{verb} batch {record['batch']} (attempt {record['attempt']}): {reason}"


def newest_first(path: Path) -> Iterator[Record]:
    """The records from the end of the file; none where there is no file. Damaged lines, and what an older start
    appended after a newer one had begun, are left out."""
    begun: list[tuple[int, int]] | None = None
    # from here back nothing newer than this start is known to have begun
    expected = newest_start(RunFiles(path.parent))
    for offset, record in _backwards(path):
        start = record.get("start", 0)
        if 0 < start < expected:
            # whether it came too late only the lines before it tell: the one case in which the whole file is read
            begun = _begun(path) if begun is None else begun
            expected = max((number for where, number in begun if where < offset), default=0)
            if start < expected:
                continue
        yield record
        expected = start - 1 if record["kind"] == "start" else max(expected, start)


def _begun(path: Path) -> list[tuple[int, int]]:
    """(offset, number) of each `start` record."""
    found, offset = [], 0
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, LookupError):
                if b"start" in line[:40] and (record := decode(line))["kind"] == "start":
                    found.append((offset, int(record["start"])))
            offset += len(line)
    return found


def _backwards(path: Path) -> Iterator[tuple[int, Record]]:
    """(offset, record) from the end of the file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        head: list[bytes] = []
        while end:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            first, *lines = file.read(end - start).split(b"\n")
            if not lines and start:  # a line longer than a block
                head.insert(0, first)
                end = start
                continue
            whole = [first, *lines]
            whole[-1] += b"".join(head)
            placed = list(zip(accumulate((len(line) + 1 for line in whole), initial=start), whole, strict=False))
            head = [placed.pop(0)[1]] if start else []
            for offset, line in reversed(placed):
                try:
                    record = decode(line)
                except ValueError:
                    continue
                yield offset, record
            end = start


def last_record(path: Path, wanted: Callable[[Record], bool]) -> Record | None:
    """The newest record for which `wanted` holds, from the end of the file; None: none, or no file."""
    return next(filter(wanted, newest_first(path)), None)


def last_attempt(path: Path) -> int:
    """The newest attempt in the ledger; 0 where there is none."""
    record = last_record(path, lambda record: record["kind"] == "attempt")
    return 0 if record is None else int(record["attempt"])


def last_start(path: Path) -> int:
    """How many times the run was started so far; 0 where it never was."""
    record = last_record(path, lambda record: record["start"] > 0)
    return 0 if record is None else int(record["start"])


def last_incident(path: Path) -> int:
    """Number of the newest incident in the ledger, also of one that a resume took back; 0: none."""
    record = last_record(path, lambda record: record.get("incident", 0) > 0)
    return 0 if record is None else int(record["incident"])
