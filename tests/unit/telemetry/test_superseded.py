"""Two starts write into one ledger: the older one ends, and what came too late is read by nobody."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.files import RunFiles
from trainer.config.schema import TelemetryConfig
from trainer.records import Outcome
from trainer.starts import begin
from trainer.telemetry import ledger as ledgers
from trainer.telemetry.ledger import (
    FILE_NAME,
    Record,
    encode,
    follow,
    last_attempt,
    lived,
    newest_first,
    read_ledger,
    standing,
    surviving,
)
from trainer.telemetry.recorder import RunFacts, Telemetry
from trainer.telemetry.writer import Ledger

FACTS = RunFacts("small", 2, "cpu", "fp32", ("a",), 10, 100, {}, "", {})
QUIET = TelemetryConfig(console="quiet", tensorboard=False)


def attempt(start: int, number: int) -> Record:
    return {"kind": "attempt", "start": start, "time": 0.0, "attempt": number, "step": number, "applied": True}


def begun(start: int, step: int = 0) -> Record:
    return {"kind": "start", "start": start, "time": 0.0, "resumed_step": step, "resumed_attempt": step}


def write(path: Path, records: list[Record]) -> None:
    path.write_bytes(b"".join(map(encode, records)))


def test_what_came_too_late_is_left_out_and_said_once(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    good = [begun(1), attempt(1, 1), attempt(1, 2), begun(2, 1), attempt(2, 3)]
    late = [attempt(1, 3), attempt(1, 4)]
    write(path, [*good, *late, attempt(2, 4)])
    records = list(read_ledger(path))
    assert records[:5] == good
    assert records[6:] == [attempt(2, 4)]
    assert records[5]["level"] == "warning"
    assert records[5]["text"] == "what start 1 wrote after start 2 had taken over was left out"
    stop = threading.Event()
    stop.set()
    assert list(follow(path, stop)) == records
    assert [(found["start"], found["attempt"]) for found in standing(read_ledger(path))] == [(1, 1), (2, 3), (2, 4)]
    for reader in (lived, surviving):
        assert [found for found in reader(path) if found.get("attempt") == 4] == [attempt(2, 4)]
    assert last_attempt(path) == 4


def test_the_newest_record_is_not_one_that_came_too_late(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    for _ in range(4):
        begin(RunFiles(tmp_path))
    good = [begun(1), attempt(1, 1), begun(2, 1), attempt(2, 2)]
    write(path, [*good, attempt(1, 9), begun(4, 2), attempt(4, 10), attempt(1, 77), attempt(2, 78)])
    assert last_attempt(path) == 10
    assert list(newest_first(path)) == [attempt(4, 10), begun(4, 2), *reversed(good)]


@st.composite
def interleaved(draw: st.DrawFn) -> list[Record]:
    """Starts 1 … n, some of which never wrote; each goes on writing, or not, after newer ones have begun."""
    records: list[Record] = []
    numbers = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5, unique=True).map(sorted))
    for index, number in enumerate(numbers):
        records.append(begun(number))
        for writer in draw(st.lists(st.sampled_from(numbers[: index + 1]), max_size=5)):
            records.append(attempt(writer, len(records)))
    return records


@settings(max_examples=200, deadline=None)
@given(records=interleaved(), taken=st.integers(0, 7), block=st.sampled_from([64, 1 << 16]))
def test_reading_backwards_gives_what_reading_forwards_gives(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], taken: int, block: int
) -> None:
    """`taken`: what `RUN/starts/` knows, which may be behind (none: an old ledger) or ahead (one that died early)."""
    folder = tmp_path_factory.mktemp("ledger")
    path = folder / FILE_NAME
    write(path, records)
    highest = max(record["start"] for record in records)
    if taken >= highest:
        for _ in range(taken):
            begin(RunFiles(folder))
    # without numbers the last line of all is believed, as in ledgers from before there were any
    elif records[-1]["start"] < highest:
        begin(RunFiles(folder), after=highest - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "_BLOCK_BYTES", block)
        backwards = list(newest_first(path))
    forwards = [record for record in read_ledger(path) if record["kind"] != "message"]
    assert backwards == forwards[::-1]


def test_a_superseded_writer_ends_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.starts.LOOK_SECONDS", 0.0)
    fence = begin(RunFiles(tmp_path))
    shown: list[Record] = []
    said: list[str] = []

    class Seen:
        def update(self, record: Record) -> None:
            shown.append(record)

        def close(self) -> None:
            pass

    ledger = Ledger(tmp_path / FILE_NAME, [Seen], said.append, fence)
    ledger.write(lambda: attempt(1, 1))
    assert ledger.flush()
    before = (tmp_path / FILE_NAME).read_bytes()
    begin(RunFiles(tmp_path))
    for number in (2, 3):
        ledger.write(lambda number=number: attempt(1, number))  # type: ignore[misc]
    assert not ledger.flush()
    assert ledger.close() is None
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert shown == [attempt(1, 1)]
    assert len(said) == 1
    assert "newer start" in said[0]


def test_what_the_disk_refused_is_not_missed_in_a_newer_starts_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.starts.LOOK_SECONDS", 0.0)
    said: list[str] = []
    ledger = Ledger(tmp_path / FILE_NAME, complain=said.append, fence=begin(RunFiles(tmp_path)))

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.telemetry.writer.os.write", refuse)
        ledger.write(lambda: attempt(1, 1))
        assert not ledger.flush()
    begin(RunFiles(tmp_path))
    assert ledger.close() is None
    assert (tmp_path / FILE_NAME).read_bytes() == b""
    assert ["No space left" in text for text in said] == [True, False]


def test_a_start_has_the_number_of_its_fence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.starts.LOOK_SECONDS", 0.0)
    files = RunFiles(tmp_path)
    begin(files)
    done = Outcome("completed", 0, "done", 1, 10, None)

    def start(**fences: Any) -> Telemetry:
        return Telemetry.open(tmp_path, QUIET, FACTS, **fences)

    second = start(fence=begin(files))
    second.message("info", "hello")
    second.flush()
    third = start(fence=begin(files))
    second.close(done)
    third.close(done)
    found = [(record["kind"], record["start"]) for record in read_ledger(files.ledger)]
    assert found == [
        *[("start", 2), ("goodput", 2), ("message", 2)],
        *[("start", 3), ("goodput", 3), ("goodput", 3), ("outcome", 3)],
    ]
    start().close(done)
    assert [record["start"] for record in read_ledger(files.ledger)][-2:] == [4, 4], "without a fence it counts"
