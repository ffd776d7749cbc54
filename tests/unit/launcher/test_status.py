import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.run_directory import locked
from launcher.status import SILENT_SECONDS, RunStatus, age, newest_checkpoint, status_of, statuses, table
from launcher.watch import watch_run
from trainer.checkpoint.manifest import Manifest, name_of, write_manifest
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.starts import begin
from trainer.telemetry.ledger import encode

NOW = 1_000_000.0

START = {
    "kind": "start", "time": NOW - 60, "start": 1, "name": "a", "steps": 100, "resumed_step": 0, "resumed_attempt": 0,
    "hostname": "here", "ranks": 2, "device": "cpu", "precision": "fp32", "parameter_names": [], "config": "",
    "num_skipped": 0, "num_clipped": 0,
}  # fmt: skip


def attempt(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "attempt", "time": NOW - 50 + step, "start": 1, "attempt": step, "step": step, "batch": step - 1,
        "epoch": 0, "loss": 3.25, "parts": {}, "targets": 64, "grad_norm": 1.0, "nonfinite": 0, "lr": 1e-3,
        "verdict": "step", "reason": None, "clip": 1.0, "clipped": False, "applied": True, "num_skipped": 0,
        "num_clipped": 0, "seconds": 1.0, "seconds_data": 0.0, "tokens_per_second": 12345.6, "flop_utilisation": None,
        "memory_bytes": 1 << 30, "loss_scale": 1.0, "stop_votes": 0, "agree": True, "rank_seconds": [1.0, 1.0],
    } | changes  # fmt: skip


def make_run(
    root: Path,
    *records: dict[str, Any],
    age: float = 0.0,
    outcome: dict[str, Any] | None = None,
    outcome_age: float = 0,
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text("")
    if records:
        (root / "ledger.jsonl").write_bytes(b"".join(map(encode, records)))
        os.utime(root / "ledger.jsonl", (NOW - age, NOW - age))
    if outcome is not None:
        (root / "outcome.json").write_text(json.dumps(outcome))
        os.utime(root / "outcome.json", (NOW - outcome_age, NOW - outcome_age))
    return root


def make_checkpoint(root: Path, step: int, run: str = "", start: int = 1) -> Path:
    directory = root / "checkpoints" / name_of(step)
    directory.mkdir(parents=True)
    manifest = Manifest(
        run=run, start=start, step=step, attempt=step, next_batch=step, quarantine=(), world_size=2, stage=1,
        global_batch=8, config_fingerprint="c", data_fingerprint="d", parameters=("w",), files=(),
    )  # fmt: skip
    write_manifest(directory, manifest)
    return directory


def test_a_run_that_has_not_started(tmp_path: Path) -> None:
    status = status_of(make_run(tmp_path / "a"), NOW)
    assert (status.state, status.step, status.loss, status.seconds_since) == ("prepared", None, None, None)


def test_a_live_run_shows_its_newest_applied_step(tmp_path: Path) -> None:
    records = [START, attempt(1), attempt(2, loss=3.0), attempt(3, applied=False, loss=float("nan"))]
    evaluation = {"kind": "evaluation", "time": NOW, "start": 1, "step": 2, "loss": 3.5, "targets": 9, "seconds": 1.0}
    root = make_run(tmp_path / "a", *records, evaluation, age=30)
    make_checkpoint(root, 2)
    make_checkpoint(root, 10)
    (root / "checkpoints" / "step-00000011.partial").mkdir()
    status = status_of(root, NOW)
    assert (status.state, status.step, status.steps, status.loss) == ("running", 2, 100, 3.0)
    assert (status.held_out_loss, status.tokens_per_second, status.seconds_since) == (3.5, 12345.6, 30)
    assert status.checkpoint == newest_checkpoint(root) == "step-00000010"


def test_the_newest_checkpoint_is_of_the_runs_history(tmp_path: Path) -> None:
    """Not one without a manifest, of another run, or of a start that was cut off when it wrote it."""
    root = make_run(tmp_path / "a", START)
    first = begin(RunFiles(root))
    first.resumed(0, 0)
    second = begin(RunFiles(root))
    second.resumed(1, 10)
    make_checkpoint(root, 10, first.run)
    assert newest_checkpoint(root) == "step-00000010"
    make_checkpoint(root, 20, first.run, start=2)
    make_checkpoint(root, 30, first.run, start=1)
    make_checkpoint(root, 40, "another", start=2)
    (root / "checkpoints" / "step-00000050").mkdir()
    assert newest_checkpoint(root) == "step-00000020"
    status = status_of(root, NOW)
    assert (status.checkpoint, status.start) == ("step-00000020", 2)


def test_what_a_superseded_start_notes_is_not_the_outcome(tmp_path: Path) -> None:
    outcome = {"reason": "stopped", "exit_code": 75, "message": "", "step": 1, "steps": 100, "start": 1}
    root = make_run(tmp_path / "a", START, attempt(1), outcome=outcome)
    begin(RunFiles(root))
    assert status_of(root, NOW).state == "stopped"
    begin(RunFiles(root))
    assert status_of(root, NOW).state == "running"
    make_run(root, outcome=outcome | {"start": 0})
    assert status_of(root, NOW).state == "stopped"


def test_silence_is_death_unless_steps_are_that_slow(tmp_path: Path) -> None:
    silent = SILENT_SECONDS + 1
    assert status_of(make_run(tmp_path / "a", START, attempt(1), age=silent), NOW).state == "crashed"
    assert status_of(make_run(tmp_path / "b", START, attempt(1, seconds=300.0), age=silent), NOW).state == "running"


def test_a_locked_run_is_running_however_silent(tmp_path: Path) -> None:
    root = make_run(tmp_path / "a", START, age=10 * SILENT_SECONDS)
    with locked(root):
        assert status_of(root, NOW).state == "running"
    assert status_of(root, NOW).state == "crashed"


@pytest.mark.parametrize(
    ("reason", "state"),
    [("completed", "finished"), ("stopped", "stopped"), ("halted", "halted"), ("crashed", "crashed")],
)
def test_an_ended_run_says_how(tmp_path: Path, reason: str, state: str) -> None:
    outcome = {"reason": reason, "exit_code": 0, "step": 7, "steps": 100, "held_out_loss": 2.5}
    status = status_of(make_run(tmp_path / "a", START, attempt(7), age=5, outcome=outcome, outcome_age=4), NOW)
    assert (status.state, status.step, status.held_out_loss) == (state, 7, 2.5)


def test_the_outcome_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    outcome = {"reason": "stopped", "exit_code": 75, "step": 1, "steps": 100}
    records = [START, attempt(1), START | {"start": 2, "time": NOW - 20}, attempt(2, start=2, time=NOW - 10)]
    status = status_of(make_run(tmp_path / "a", *records, age=10, outcome=outcome, outcome_age=45), NOW)
    assert (status.state, status.step) == ("running", 2)


def test_a_folder_of_runs_and_a_name_that_looks_like_markup(tmp_path: Path) -> None:
    make_run(tmp_path / "b", START, attempt(1, loss=float("nan")))
    make_run(tmp_path / "[red]$(touch x)'", START)
    (tmp_path / "not a run").mkdir()
    runs = statuses(tmp_path, NOW)
    assert [run.name for run in runs] == ["[red]$(touch x)'", "b"]
    assert [run.name for run in statuses(tmp_path / "b", NOW)] == ["b"]
    shown = io.StringIO()
    Console(width=160, file=shown).print(table(runs))
    text = shown.getvalue()
    assert "[red]$(touch x)'" in text
    assert "NaN" in text
    assert "1/100" in text
    with pytest.raises(RunDirectoryError, match="there is no folder"):
        statuses(tmp_path / "missing")


def test_incidents_and_what_they_left_out_have_columns_where_there_are_any(tmp_path: Path) -> None:
    counts = {"num_incidents": 2, "num_quarantined": 3}
    make_run(tmp_path / "a", START, attempt(1, **counts), attempt(2, applied=False, incident=2, **counts))
    make_run(tmp_path / "b", START, attempt(1, **counts, incident=0))
    found = statuses(tmp_path, NOW)
    assert [(run.incidents, run.incident_open, run.quarantined) for run in found] == [(2, True, 3), (2, False, 3)]

    def lines(runs: list[RunStatus]) -> list[str]:
        shown = io.StringIO()
        Console(file=shown, width=160).print(table(runs))
        return shown.getvalue().splitlines()

    header, first, second = lines(found)
    assert "incidents" in header
    assert "2, 1 open  3 batches" in first
    assert "open" not in second
    make_run(tmp_path / "c" / "d", START, attempt(1))
    assert "incidents" not in lines(statuses(tmp_path / "c", NOW))[0]


def test_watch_shows_where_a_run_stands(tmp_path: Path) -> None:
    root = make_run(tmp_path / "a", START, attempt(41, loss=3.1415))
    shown = io.StringIO()
    watch_run(root, Console(file=shown, width=100), once=True)
    assert "step 41 of 100" in shown.getvalue()
    assert "3.1415" in shown.getvalue()
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        watch_run(tmp_path, Console())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "59 s"), (200, "3 min"), (18_420, "5 h"), (187_200, "2 d")]
)
def test_ages_in_one_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text
