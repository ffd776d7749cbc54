"""The ledger: strict JSON, exact floats, torn lines, what stands, following, full disks, failing views."""

import errno
import json
import math
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import RunDirectoryError
from trainer.telemetry.ledger import (
    Record,
    decode,
    encode,
    follow,
    last_attempt,
    last_start,
    read_ledger,
    standing,
    surviving,
)
from trainer.telemetry.writer import Ledger

TEXTS = st.text() | st.sampled_from(["NaN", "Infinity", "-Infinity", "~NaN", "~~-Infinity", "~", "nan"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def bits(value: Any) -> Any:
    """Replaces floats by their bits (every NaN by one), so that == is exact and −0.0 differs from 0.0."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return value


def refuse_constant(text: str) -> float:
    raise AssertionError(f"{text} is not JSON")


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_any_record_comes_back_exactly_from_one_line_of_strict_json(fields: dict[str, Any]) -> None:
    record = {**fields, "kind": "test"}
    line = encode(record)
    assert line.index(b"\n") == len(line) - 1
    json.loads(line, parse_constant=refuse_constant)
    assert bits(decode(line)) == bits(record)


def attempt(number: int, step: int, applied: bool = True) -> Record:
    return {"kind": "attempt", "time": 0.0, "start": 1, "attempt": number, "step": step, "applied": applied}


def start(resumed_step: int, number: int = 1) -> Record:
    return {"kind": "start", "time": 0.0, "start": number, "resumed_step": resumed_step}


def test_what_stands_is_what_the_weights_went_through() -> None:
    records = [
        start(0),
        *(attempt(n, n) for n in (1, 2, 3, 4)),
        attempt(5, 5, applied=False),
        attempt(6, 5),
        attempt(7, 6),
        start(4, 2),
        attempt(8, 5),
        attempt(9, 6, applied=False),
    ]
    assert [(r["attempt"], r["step"]) for r in standing(records)] == [(1, 1), (2, 2), (3, 3), (4, 4), (8, 5)]
    assert standing([*records, start(0, 3)]) == []


def test_what_stands_of_evaluations_is_the_later_one_of_a_step() -> None:
    def evaluation(step: int, loss: float) -> Record:
        return {"kind": "evaluation", "time": 0.0, "start": 1, "step": step, "loss": loss}

    records = [start(0), evaluation(2, 5.0), evaluation(4, 4.0), start(2, 2), evaluation(2, 5.0), evaluation(4, 3.0)]
    assert [(r["step"], r["loss"]) for r in standing(records, "evaluation")] == [(2, 5.0), (4, 3.0)]


def test_records_written_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    records = [start(0), *(attempt(n, n) | {"loss": math.nan if n == 7 else 1 / n} for n in range(1, 500))]
    ledger = Ledger(path)
    for record in records:
        ledger.write(lambda record=record: record)
    assert ledger.flush()
    assert bits(list(read_ledger(path))) == bits(records)
    assert ledger.close() is None
    assert ledger.close() is None


def test_a_line_cut_off_by_a_kill_is_left_out_then_ended_then_said(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = encode(attempt(1, 1)) + encode(attempt(2, 2))
    path.write_bytes(whole[:-9])
    assert [r["attempt"] for r in read_ledger(path)] == [1]
    assert last_attempt(path) == 1
    ledger = Ledger(path)
    ledger.write(lambda: start(1, 2))
    ledger.close()
    assert path.read_bytes() == whole[:-9] + b"\n" + encode(start(1, 2))
    first, damaged, second = read_ledger(path)
    assert (first["attempt"], second) == (1, start(1, 2))
    assert (damaged["kind"], damaged["level"]) == ("message", "warning")
    assert "line 2" in damaged["text"]


def test_a_complete_line_without_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(encode(attempt(1, 1))[:-1])
    assert list(read_ledger(path)) == [attempt(1, 1)]
    Ledger(path).close()
    assert path.read_bytes() == encode(attempt(1, 1))


@pytest.mark.parametrize("num_after", [0, 1, 3, 2000])
def test_the_last_attempt_and_start_are_found_from_the_end(tmp_path: Path, num_after: int) -> None:
    path = tmp_path / "ledger.jsonl"
    # a line of 200 kB is longer than the blocks in which the file is read
    lines = [attempt(n, n) | {"norms": [0.1] * (50_000 if n == 41 else 3)} for n in range(1, 42)]
    after = [{"kind": "message", "time": 0.0, "start": 3, "text": "x" * 100}] * num_after
    path.write_bytes(b"".join(encode(record) for record in [*lines, *after]) + b'{"kind":"att')
    assert last_attempt(path) == 41
    assert last_start(path) == (3 if num_after else 1)


def test_a_ledger_without_attempts_or_none_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert (last_attempt(path), last_start(path)) == (0, 0)
    with pytest.raises(RunDirectoryError, match="no ledger"):
        list(read_ledger(path))
    path.write_bytes(encode(start(0)))
    assert (last_attempt(path), last_start(path)) == (0, 1)
    with pytest.raises(RunDirectoryError, match="cannot be opened"):
        Ledger(tmp_path / "missing" / "ledger.jsonl")


def test_following_yields_each_record_once_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    stop = threading.Event()
    seen: list[int] = []
    arrived = threading.Semaphore(0)

    def watch() -> None:
        for record in follow(path, stop, poll_seconds=0.01):
            seen.append(record["attempt"])
            arrived.release()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with path.open("wb", buffering=0) as file:
        file.write(encode(attempt(1, 1)))
        assert arrived.acquire(timeout=10)
        line = encode(attempt(2, 2))
        file.write(line[:20])
        file.write(line[20:] + encode(attempt(3, 3)))
        assert arrived.acquire(timeout=10)
        assert arrived.acquire(timeout=10)
        file.write(encode(attempt(4, 4)))
        stop.set()
    watcher.join(timeout=10)
    assert not watcher.is_alive()
    assert seen == [1, 2, 3, 4]


def test_following_what_never_comes_ends_when_asked(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert list(follow(tmp_path / "ledger.jsonl", stop)) == []


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    said: list[str] = []
    records = [attempt(n, n) for n in range(1, 101)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger = Ledger(path, complain=said.append)
    try:
        # the limit falls inside a line, so that a write is cut short and the next one fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(encode(records[0])) * 5 // 2, hard))
        for record in records[:50]:
            ledger.write(lambda record=record: record)
        assert not ledger.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1
    assert "cannot be written" in said[0]
    for record in records[50:]:
        ledger.write(lambda record=record: record)
    assert ledger.flush()
    assert ledger.close() is None
    assert len(said) == 2
    assert path.read_bytes() == b"".join(encode(record) for record in records)


def test_a_disk_that_stays_full_is_said_once_then_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.symlink_to("/dev/full")
    said: list[str] = []
    ledger = Ledger(path, complain=said.append)
    for number in range(1, 20):
        ledger.write(lambda number=number: attempt(number, number))
        assert not ledger.flush()
    assert ["cannot be written" in text for text in said] == [True]
    error = ledger.close()
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert ["is incomplete" in text for text in said] == [False, True]


def test_views_see_what_a_reader_gets_and_a_failing_one_is_left_out(tmp_path: Path) -> None:
    class Seen:
        def __init__(self) -> None:
            self.records: list[Record] = []
            self.closed = False

        def update(self, record: Record) -> None:
            self.records.append(record)

        def close(self) -> None:
            self.closed = True

    class Broken(Seen):
        def update(self, record: Record) -> None:
            super().update(record)
            raise RuntimeError("no pixels left")

    seen, broken, said = Seen(), Broken(), list[str]()
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, [lambda: broken, lambda: seen], complain=said.append)
    ledger.write(lambda: attempt(1, 1) | {"loss": math.inf, "pair": (1, 2)})
    ledger.write(lambda: attempt(2, 2) | {"loss": object()})
    ledger.write(lambda: attempt(3, 3))
    ledger.close()
    assert (
        seen.records == list(read_ledger(path)) == [attempt(1, 1) | {"loss": math.inf, "pair": [1, 2]}, attempt(3, 3)]
    )
    assert (len(broken.records), broken.closed, seen.closed) == (1, False, True)
    assert ["no pixels left" in said[0], "could not be made" in said[1], len(said)] == [True, True, 2]


def test_reading_a_ledger_imports_nothing_heavy() -> None:
    program = (
        "import sys, trainer.telemetry.ledger; print(sorted({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_what_survives_leaves_out_only_steps_done_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"

    def of(start_number: int, *steps: int) -> list[Record]:
        return [attempt(step, step) | {"start": start_number} for step in steps]

    message = {"kind": "message", "time": 0.0, "start": 1, "level": "info", "text": "said at step 6", "step": 6}
    skipped = attempt(9, 4, applied=False) | {"start": 2}
    lines = [
        *[start(0), *of(1, 1, 2, 3, 4, 5, 6), message],
        *[start(3, 2), skipped, *of(2, 4, 5, 6, 7)],
        # the third start goes back further than the second
        *[start(2, 3), *of(3, 3, 4)],
        *[start(4, 4), *of(4, 5)],
    ]
    path.write_bytes(b"".join(map(encode, lines)))
    assert list(surviving(path)) == [
        *[start(0), *of(1, 1, 2), message],
        start(3, 2),
        *[start(2, 3), *of(3, 3, 4)],
        *[start(4, 4), *of(4, 5)],
    ]
    with pytest.raises(RunDirectoryError, match="no ledger"):
        surviving(tmp_path / "none.jsonl")


def test_following_a_ledger_that_exists_gives_what_reading_it_gives(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(encode(start(0)) + b'{"kind":"at\n' + encode(attempt(1, 1)))
    stop = threading.Event()
    stop.set()
    assert list(follow(path, stop)) == list(read_ledger(path))
