"""The ledger of a run: append-only `RUN/ledger.jsonl`, one JSON line an attempt and one an event.

Standard library only: the launcher reads ledgers too. `writer.py` writes them.

Every record has `kind`, `time` (Unix seconds) and `start` (which start of the run wrote it, from 1). TensorBoard, the
console and the report are views of these records; `docs/telemetry.md` lists the fields of each kind.

The lines are strict JSON. A float that JSON does not have is written as the string "NaN", "Infinity" or "-Infinity" and
read back as the float; a text that happens to be one of these is written with a leading "~", so nothing is ambiguous.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.errors import RunDirectoryError

Record = dict[str, Any]

FILE_NAME = "ledger.jsonl"

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ESCAPE = "~"
_BLOCK_BYTES = 1 << 16
_POLL_SECONDS = 0.2


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


def read_ledger(path: Path) -> Iterator[Record]:
    """The records of a ledger in order.

    A last line without an end is being written, or was cut off when its process died: it is left out. A damaged line
    before that gives a `message` record of level "warning" in its place, so that every view shows it.

    Raises:
        RunDirectoryError: there is no ledger at `path`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = _record_of(line, number)
                if record is not None:
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
    with path.open("rb") as file:
        while True:
            last_look = stop.is_set()
            for piece in file:
                unfinished += piece
                if unfinished.endswith(b"\n"):
                    number += 1
                    record = _record_of(unfinished, number)
                    unfinished = b""
                    if record is not None:
                        yield record
            if last_look:
                return
            stop.wait(poll_seconds)


def _record_of(line: bytes, number: int) -> Record | None:
    """The record of a line; None for a cut-off last line or an empty one."""
    try:
        return decode(line)
    except ValueError:
        if not line.strip() or not line.endswith(b"\n"):
            return None
        text = f"line {number} of the ledger is damaged (cut off when its process died?) and was left out"
        return {"kind": "message", "time": 0.0, "start": 0, "level": "warning", "text": text, "step": None}


def standing(records: Iterable[Record], kind: str = "attempt") -> list[Record]:
    """The records of one kind that stand in the present weights, by step.

    A `start` that resumed from step N supersedes what earlier starts recorded for steps > N. Attempts whose update was
    not applied (skipped, overflowed) do not stand. Of two records of one step the later stands.
    """
    kept: dict[int, Record] = {}
    for record in records:
        if record["kind"] == "start":
            kept = {step: earlier for step, earlier in kept.items() if step <= record["resumed_step"]}
        elif record["kind"] == kind and record.get("applied", True):
            kept[record["step"]] = record
    return [kept[step] for step in sorted(kept)]


def surviving(path: Path) -> Iterator[Record]:
    """The records of a ledger without those of steps that a later start did again; attempts not applied are kept.

    Reads the file twice rather than hold it in memory.

    Raises:
        RunDirectoryError: there is no ledger at `path`.
    """
    resumed = {record["start"]: record["resumed_step"] for record in read_ledger(path) if record["kind"] == "start"}
    limits: dict[int, float] = {}
    limit = math.inf
    for start in sorted(resumed, reverse=True):
        limits[start] = limit
        limit = min(limit, resumed[start])

    def stands(record: Record) -> bool:
        of_a_step = record["kind"] in ("attempt", "weights", "evaluation")
        return not of_a_step or record["step"] <= limits.get(record["start"], math.inf)

    return filter(stands, read_ledger(path))


def notice(record: Record) -> tuple[str, str] | None:
    """(level, text) where a record is something that a person must hear: every view shows the same notices."""
    match record["kind"]:
        case "message":
            return record["level"], record["text"]
        case "attempt" if not record["applied"]:
            reason = record["reason"] or f"the update overflowed at loss scale {record['loss_scale']:g}"
            verb = "halted at" if record["verdict"] == "halt" else "skipped"
            return "warning", f"{verb} batch {record['batch']} (attempt {record['attempt']}): {reason}"
        case "attempt" if not record["agree"]:
            return "error", f"the ranks disagree about the decision before attempt {record['attempt']}"
        case "outcome":
            level = "info" if record["reason"] in ("completed", "stopped") else "error"
            return level, f"{record['reason']}: {record['message']}"
    return None


def last_record(path: Path, wanted: Callable[[Record], bool]) -> Record | None:
    """The newest record for which `wanted` holds, from the end of the file; None: none, or no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
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
            head = [whole.pop(0)] if start else []
            for line in reversed(whole):
                try:
                    record = decode(line)
                except ValueError:
                    continue
                if wanted(record):
                    return record
            end = start
    return None


def last_attempt(path: Path) -> int:
    """The newest attempt in the ledger; 0 where there is none."""
    record = last_record(path, lambda record: record["kind"] == "attempt")
    return 0 if record is None else int(record["attempt"])


def last_start(path: Path) -> int:
    """How many times the run was started so far; 0 where it never was."""
    record = last_record(path, lambda record: record["start"] > 0)
    return 0 if record is None else int(record["start"])
