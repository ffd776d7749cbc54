"""Accounts of time: by hand, and over anything that can happen to a run: nothing missing, nothing twice."""

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config.schema import TelemetryConfig
from trainer.records import Outcome, Position, Saved, Step, StepStats, Timing
from trainer.telemetry import scalars as tb
from trainer.telemetry.books import Books, _places, account, first_attempt, newest_of
from trainer.telemetry.goodput import PARTS, Accountant, Goodput
from trainer.telemetry.ledger import FILE_NAME, Record, encode, read_ledger
from trainer.telemetry.recorder import RunFacts, Telemetry
from trainer.telemetry.tensorboard import TensorBoardView

T = 1_800_000_000.0


def start(time: float, number: int = 1, *, step: int = 0, attempt: int = 0, **fields: Any) -> Record:
    return {
        "kind": "start", "time": T + time, "start": number, "resumed_step": step, "resumed_attempt": attempt,
        "began": T + time - 1, "relaunched": None, "job": None, **fields,
    }  # fmt: skip


def job(name: str, allocated: float, restart: int = 0, **fields: Any) -> dict[str, Any]:
    about = {"job": name, "restart": restart, "nodes": ["a"], "allocated": T + allocated, "parts": {}, **fields}
    return {"allocated": T + allocated, "job": about}


def attempt(time: float, number: int, step: int, seconds: float, data: float = 0.0, applied: bool = True) -> Record:
    return {
        "kind": "attempt", "time": T + time, "start": 1, "attempt": number, "step": step, "seconds": seconds,
        "seconds_data": data, "applied": applied,
    }  # fmt: skip


def event(kind: str, time: float, **fields: Any) -> Record:
    return {"kind": kind, "time": T + time, "start": 1, **fields}


def accounts(records: Iterable[Record]) -> Accountant:
    accountant = Accountant()
    for record in records:
        accountant.feed(record)
    return accountant


def parts(found: Goodput) -> dict[str, float]:
    """Those that are not empty."""
    assert list(found.parts) == list(PARTS)
    assert math.fsum(found.parts.values()) == pytest.approx(found.allocated, abs=1e-6)
    return {name: round(seconds, 6) for name, seconds in found.parts.items() if seconds}


def test_a_start_from_its_allocation_to_its_outcome() -> None:
    records = [
        start(20, allocated=T + 0.0),
        attempt(25, 1, 1, seconds=2, data=0.5),
        event("snapshot", 26, step=1, seconds=0.25),
        attempt(27, 2, 2, seconds=2),
        attempt(30, 3, 3, seconds=2.5),
        event("evaluation", 34, step=3, seconds=4),
        event("message", 34.5, text="x"),
        attempt(36, 4, 4, seconds=2, applied=False),
        event("checkpoint", 40, step=4, seconds=4),
        event("evaluation", 43, step=4, seconds=2.5),
        event("outcome", 44, reason="completed"),
    ]
    found = accounts(records).goodput()
    assert parts(found) == {
        "starting": 23, "data": 0.5, "steps": 1.5 + 1.75 + 2.5, "checkpoints": 0.25, "other": 0.5, "evaluation": 6.5,
        "rolled_back": 2, "ending": 40 - 36 + 0.5 + 1,
    }  # fmt: skip
    assert found.allocated == 44
    assert found.fraction == 6.25 / 44


def test_a_save_in_the_background_is_told_late_and_counted_where_it_held_up() -> None:
    """0.5 s right after step 2, 0.25 s of the next attempt; told two steps later."""
    records = [start(0), attempt(1, 1, 1, 1), attempt(2, 2, 2, 1), attempt(3.75, 3, 3, 1.25), attempt(4.75, 4, 4, 1)]
    saved = event("checkpoint", 4.75, step=2, seconds=0.75)
    before = parts(accounts(records).goodput())
    assert before == {"starting": 1, "steps": 4.25, "other": 0.5}
    after = accounts([*records, saved])
    assert parts(after.goodput()) == {"starting": 1, "steps": 4.0, "checkpoints": 0.75}
    # however much a save claims, there is no more than that
    greedy = accounts([*records, {**saved, "seconds": 100.0}])
    assert parts(greedy.goodput()) == {"starting": 1, "steps": 3.0, "checkpoints": 1.75}


def test_a_rollback_and_the_save_that_it_waited_for() -> None:
    records = [
        start(0), *(attempt(step, step, step, 1) for step in range(1, 6)), attempt(6, 6, 6, 1, applied=False),
        event("checkpoint", 8, step=5, seconds=0), event("rewind", 9, attempt=6, to_step=2, seconds=3.0),
        attempt(10, 7, 3, 1),
    ]  # fmt: skip
    assert parts(accounts(records).goodput()) == {"starting": 1, "steps": 3, "rolled_back": 3 + 1 + 3}


def test_a_crash_loses_what_came_after_the_checkpoint_and_the_time_until_the_next_start() -> None:
    records = [
        start(0), *(attempt(step, step, step, 1) for step in range(1, 6)), event("message", 5.5, text="hm"),
        start(20, 2, step=3, attempt=3, relaunched={"ended": T + 15}, allocated=T + 15),
        attempt(22, 6, 4, 1), event("outcome", 23, reason="stopped"),
    ]  # fmt: skip
    found = accounts(records).goodput()
    assert parts(found) == {"starting": 1 + 6, "steps": 4, "lost": 2 + 10, "ending": 1}
    assert found.allocated == 24


def test_a_resume_from_before_a_rollback_brings_back_what_it_had_taken() -> None:
    """The rollback went to step 2, but the run was killed before the checkpoint of step 4 was removed."""
    records = [
        start(0), *(attempt(step, step, step, 1) for step in range(1, 6)),
        event("rewind", 6, attempt=5, to_step=2, seconds=1), attempt(7, 6, 3, 1),
    ]  # fmt: skip
    assert parts(accounts(records).goodput()) == {"starting": 1, "steps": 3, "rolled_back": 4}
    resumed = [*records, start(8, 2, step=4, attempt=4, began=T + 7.5)]
    assert parts(accounts(resumed).goodput()) == {"starting": 1.5, "steps": 4, "rolled_back": 2, "lost": 1}


def test_jobs_and_the_time_between_them() -> None:
    """The first dies with its node, is requeued, and begins again 100 s later; the third never gets to a start."""
    records = [
        start(5, **job("7", 0)), *(attempt(5 + step, step, step, 1) for step in range(1, 6)),
        start(205, 2, step=3, attempt=3, **job("7", 200, restart=1)), attempt(207, 6, 4, 1),
        event("outcome", 208, reason="stopped"),
    ]  # fmt: skip
    accountant = accounts(records)
    by_itself = accountant.goodput()
    assert parts(by_itself) == {"starting": 5 + 6, "steps": 4, "lost": 2, "ending": 1}
    assert by_itself.queued == 190
    jobs = [(T, T + 100), (T + 200, T + 210), (T + 300, T + 320)]
    known = accountant.goodput(jobs)
    assert parts(known) == {"starting": 11, "steps": 4, "lost": 2 + 90 + 20, "ending": 1 + 2}
    assert known.allocated == 100 + 10 + 20
    assert accountant.goodput(jobs) == known, "asking changes nothing"
    # the same from the ledger alone, where the second job was told of the first
    told = [*records[:6], records[6] | job("7", 200, restart=1, earlier=[[T, T + 100]]), *records[7:]]
    assert parts(accounts(told).goodput()) == {"starting": 11, "steps": 4, "lost": 92, "ending": 1}
    assert accounts(told).goodput().queued == 100


def test_a_job_that_goes_on() -> None:
    running: list[tuple[float, float | None]] = [(T, None)]
    nothing = Accountant().goodput(running, T + 30)
    assert parts(nothing) == {"starting": 30}
    begun = [start(10, **job("7", 0))]
    assert parts(accounts(begun).goodput(running, T + 30)) == {"starting": 30}
    assert parts(accounts(begun).goodput(running)) == {"starting": 10}
    training = accounts([*begun, attempt(20, 1, 1, 1)])
    assert parts(training.goodput(running, T + 30)) == {"starting": 19, "steps": 1, "other": 10}
    assert parts(training.goodput([(T, T + 30)])) == {"starting": 19, "steps": 1, "lost": 10}
    ended = accounts([*begun, attempt(20, 1, 1, 1), event("outcome", 21, reason="completed")])
    assert parts(ended.goodput(running, T + 30)) == {"starting": 19, "steps": 1, "ending": 10}


def test_starts_again_in_the_same_allocation() -> None:
    """The job starts the ranks again when they have crashed; it notes an interval for each of its starts."""
    records = [
        start(5, **job("7", 0)), attempt(6, 1, 1, 1), event("outcome", 7, reason="crashed"),
        start(14, 2, **job("7", 10)), attempt(16, 2, 1, 1),
    ]  # fmt: skip
    accountant = accounts(records)
    expected = {"starting": 5 + 5, "lost": 1 + 4, "steps": 1}
    assert parts(accountant.goodput()) == expected
    assert parts(accountant.goodput([(T, T + 10), (T + 10, T + 16)])) == expected
    assert parts(accountant.goodput([(T, T + 10), (T + 10, None)], T + 17)) == expected | {"other": 1}


def test_a_ledger_of_before_and_one_whose_beginning_is_gone() -> None:
    old = {"kind": "start", "time": T + 4, "start": 1, "resumed_step": 0, "began": T}
    older = {name: value for name, value in old.items() if name != "began"}
    resumed = older | {"start": 2, "time": T + 20, "resumed_step": 1}
    records = [attempt(6, 1, 1, 1), attempt(7, 2, 2, 1), resumed, attempt(22, 3, 2, 1)]
    assert parts(accounts([old, *records]).goodput()) == {"starting": 6, "steps": 2, "lost": 1}
    assert parts(accounts([older, *records]).goodput()) == {"starting": 2, "steps": 2, "lost": 1}
    assert accounts(records[:2]).goodput().allocated == 0.0
    assert accounts([]).goodput().fraction == 0.0


def test_clocks_that_go_back_take_nothing_away() -> None:
    records = [start(10), attempt(12, 1, 1, 1), attempt(5, 2, 2, 1), event("evaluation", 6, seconds=3), start(3, 2)]
    assert parts(accounts(records).goodput()) == {"starting": 2, "lost": 1}


def write(path: Path, records: Iterable[Record]) -> None:
    with path.open("ab") as file:
        file.writelines(map(encode, records))


def test_the_books_begin_where_the_newest_record_leaves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE_NAME
    first = Accountant()
    for record in [start(0), *(attempt(step, step, step, 1) for step in range(1, 2001))]:
        first.feed(record)
        write(path, [record])
        if record.get("step", 1) % 100 == 0:
            write(path, [event("goodput", record["time"] - T, **first.record())])
    read: list[Record] = []

    def reading(*arguments: Any) -> Iterable[Record]:
        for record in read_ledger(*arguments):
            read.append(record)
            yield record

    monkeypatch.setattr("trainer.telemetry.books.read_ledger", reading)
    said: list[str] = []
    books = Books(path, 2, said.append)
    # from step 1950: what came after it is known only when the record of step 1900 is gone on with
    resumed = start(2100, 2, step=1950, attempt=1950, began=T + 2050)
    books.feed(resumed)
    assert len(read) == 1 + 101, "of the newest record, and of what a resume at 1950 needs of the time before it"
    straight = accounts([*read_ledger(path), resumed])
    first_record = books.record()
    assert first_record == {"kind": "goodput", **straight.record()}
    assert parts(straight.goodput()) == {"starting": 51, "steps": 1950, "lost": 50}
    # a rollback further back than what was read
    read.clear()
    for record in [attempt(2101, 2001, 1951, 1), event("rewind", 2103, attempt=2001, to_step=1234, seconds=2)]:
        books.feed(record)
        straight.feed(record)
    assert books.record() == {"kind": "goodput", **straight.record()}
    assert len(read) == 7 * 101, "from the record of step 1200 to that of 1900"
    assert said == []


def test_what_a_rollback_took_before_the_newest_record_comes_back_too(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    records = [
        start(0), *(attempt(step, step, step, 1) for step in range(1, 6)),
        event("rewind", 6, attempt=5, to_step=2, seconds=1), attempt(7, 6, 3, 1),
    ]  # fmt: skip
    write(path, [*records, event("goodput", 7, **accounts(records).record())])
    books = Books(path, 2, print)
    resumed = start(8, 2, step=4, attempt=4, began=T + 7.5)
    books.feed(resumed)
    assert books.record() == {"kind": "goodput", **accounts([*records, resumed]).record()}


def test_what_a_superseded_start_wrote_too_late_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    old = Accountant()
    records = [start(0), attempt(1, 1, 1, 1), start(5, 2, began=T + 4), attempt(7, 2, 1, 1) | {"start": 2}]
    for record in records[:2]:
        old.feed(record)
    write(path, records)
    (tmp_path / "starts").mkdir()
    for number in (1, 2):
        (tmp_path / "starts" / f"{number:04d}.json").write_text("{}")
    write(path, [attempt(50, 2, 2, 40), event("goodput", 50, **old.record())])
    assert account(path).record() == accounts(records).record()
    assert parts(account(path).goodput()) == {"starting": 1 + 2, "lost": 1, "steps": 1}


@given(st.lists(st.sampled_from(["start", "starting", "x"]), max_size=8), st.integers(1, 40), st.booleans())
def test_lines_are_found_from_the_end_whatever_the_blocks(kinds: list[str], size: int, cut: bool) -> None:
    lines = [encode({"kind": kind, "text": '{"kind":"start",'}) for kind in kinds]
    content = b"".join(lines)
    places = [len(b"".join(lines[:number])) for number, kind in enumerate(kinds) if kind == "start"]
    end = places[-1] if cut and places else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.telemetry.books._BLOCK_BYTES", size)
        found = list(_places(io.BytesIO(content), b'{"kind":"start",', end))
    assert found[::-1] == (places if end is None else places[:-1])


def test_the_newest_of_a_kind_and_the_first_attempt_of_the_newest_start(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    assert (newest_of(path, "evaluation"), first_attempt(path)) == (None, (None, None))
    seen = event("evaluation", 2, step=1, seconds=1)
    second = start(5, 2)
    write(path, [start(0), attempt(1, 1, 1, 1), seen, second, event("message", 6, start=2)])
    assert newest_of(path, "evaluation") == seen
    assert newest_of(path, "checkpoint") is None
    assert first_attempt(path) == (second, None)
    tries = [attempt(number, number, number, 1) | {"start": 2} for number in (7, 8)]
    write(path, tries)
    assert first_attempt(path) == (second, tries[0])


def test_a_goodput_record_of_another_version_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    records = [start(0), attempt(1, 1, 1, 1)]
    write(path, [*records, event("goodput", 1, fraction=0.5), event("goodput", 1, step=1, attempt=1, state={})])
    assert account(path).record() == accounts(records).record()
    assert account(tmp_path / "none").goodput().allocated == 0.0


QUIET = TelemetryConfig(console="quiet")
FACTS = RunFacts("run", 1, "cpu", "fp32", ("w",), 8, 64, {}, "name: run\n", {})


def tell(telemetry: Telemetry, number: int, step: int) -> None:
    stats = StepStats(number, number - 1, step, 2.0, {}, 63, 1.0, 0, np.ones(1))
    telemetry.record_attempt(stats, Step(0.0), Timing(1e-4, 1e-5, 640.0, None, 1), 1e-3, 0, applied=True)


def test_a_run_records_its_goodput_over_its_starts(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    first = Telemetry.open(tmp_path, QUIET, FACTS)
    for step in range(1, 5):
        tell(first, step, step)
    first.record_checkpoint(Saved(4, "step-00000004", 10, 1e-4), 1e-4)
    tell(first, 5, 5)
    assert first.close(Outcome("crashed", 1, "", 5, 8, None)) is None
    second = Telemetry.open(tmp_path, QUIET, FACTS, Position(4, 4, 4))
    tell(second, 6, 5)
    assert second.close(Outcome("stopped", 75, "", 5, 8, None)) is None
    records = list(read_ledger(path))
    kinds = [record["kind"] for record in records if record["kind"] != "attempt"]
    assert kinds == [
        *["start", "goodput", "checkpoint", "goodput", "goodput", "outcome"],
        *["start", "goodput", "goodput", "outcome"],
    ]
    for number, record in enumerate(records):
        if record["kind"] == "goodput":
            # the last one of a start is of its outcome already
            ended = [each | {"time": record["state"]["until"]} for each in records[number + 1 : number + 2]]
            straight = accounts([*records[:number], *(each for each in ended if each["kind"] == "outcome")]).record()
            assert {name: record[name] for name in straight} == straight
    assert records[-2]["parts"]["lost"] > 0
    assert records[-2]["fraction"] > 0
    folder = str(tmp_path / "tensorboard" / "main")
    reader = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    shown = {event.step: event.value for event in reader.Scalars(tb.GOODPUT)}
    assert shown[5] == pytest.approx(records[-2]["fraction"], rel=1e-6)
    shares = {part: reader.Scalars(f"{tb.SHARE}: {part.replace('_', ' ')}")[-1].value for part in PARTS}
    assert math.fsum(shares.values()) == pytest.approx(1.0, abs=1e-5)
    allocated = records[-2]["allocated"]
    for part, seconds in records[-2]["parts"].items():
        assert shares[part] == pytest.approx(seconds / allocated, rel=1e-5)


def test_tensorboard_reads_back_what_a_record_says(tmp_path: Path) -> None:
    view = TensorBoardView(tmp_path)
    accountant = accounts([start(1), attempt(2, 1, 1, 1), attempt(4, 2, 2, 2, data=0.5)])
    view.update(event("goodput", 4, **accountant.record()))
    view.close()
    reader = EventAccumulator(str(tmp_path / "main"), size_guidance={"scalars": 0}).Reload()
    tags = {tag: [(found.step, found.value) for found in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    share = {"steps": 2.5 / 4, "data": 0.5 / 4, "starting": 1 / 4}
    names = {f"5 throughput/share of the time allocated: {part.replace('_', ' ')}": part for part in PARTS}
    assert tags == {"5 throughput/goodput": [(2, 0.75)]} | {
        name: [(2, share.get(part, 0.0))] for name, part in names.items()
    }


def test_accounts_that_fail_cost_no_record(tmp_path: Path) -> None:
    said: list[str] = []
    books = Books(tmp_path / FILE_NAME, 1, said.append)
    books.feed(start(0))
    books.feed(attempt(1, 1, 1, math.nan))
    books.feed(attempt(2, 2, 2, 1.0))
    assert books.record() is None
    assert len(said) == 1
    assert "goodput is not recorded any more" in said[0]
