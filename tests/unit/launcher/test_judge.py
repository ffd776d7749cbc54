"""`trimtab judge`: curves from all kinds of files, and where the guard would have acted on them."""

import json
import math
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.curve import read_curve
from trainer.errors import DataError
from trainer.telemetry.events import EventFile
from trainer.telemetry.ledger import encode

NUMBERS = random.Random(7)
LOSSES = [4.0 + NUMBERS.gauss(0, 0.02) for _ in range(120)]
NORMS = [1.0 + NUMBERS.gauss(0, 0.02) for _ in range(120)]
STEPS = list(range(10, 130))
SPIKED = [*LOSSES[:80], 40.0, *LOSSES[81:]]


def ledger_of(path: Path, losses: list[float]) -> Path:
    records = [{"kind": "start", "time": 0.0, "start": 1, "resumed_step": 0, "resumed_attempt": 0}]
    for step, loss, norm in zip(STEPS, losses, NORMS, strict=True):
        fields = {"kind": "attempt", "time": 0.0, "start": 1, "attempt": step, "step": step, "applied": True}
        records.append({**fields, "verdict": "step", "loss": loss, "grad_norm": norm})
    path.write_bytes(b"".join(map(encode, records)))
    return path


def json_lines_of(path: Path, losses: list[float]) -> Path:
    rows = [{"step": s, "loss": x, "grad_norm": n} for s, x, n in zip(STEPS, losses, NORMS, strict=True)]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:5], json.dumps({"step": 14, "eval_loss": 3.0}), "", *lines[5:]]))
    return path


def csv_of(path: Path, losses: list[float]) -> Path:
    rows = [f"0.0,{step},{norm},{loss}" for step, loss, norm in zip(STEPS, losses, NORMS, strict=True)]
    path.write_text("\n".join(["Wall time,Step,grad_norm,train/loss", *rows]) + "\n")
    return path


def events_of(folder: Path, losses: list[float]) -> Path:
    file = EventFile(folder)
    for step, loss, norm in zip(STEPS, losses, NORMS, strict=True):
        file.scalars({"lr": 1.0, "1 stability/loss": loss, "1 stability/gradient norm": norm}, step, 0.0)
    file.close()
    return folder


def test_every_kind_of_file_gives_the_same_curve(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ledger = ledger_of(run / "ledger.jsonl", SPIKED)
    for path in (run, ledger, json_lines_of(tmp_path / "a.json", SPIKED), csv_of(tmp_path / "a.csv", SPIKED)):
        curve = read_curve(path)
        assert (list(curve.steps), list(curve.losses), list(curve.grad_norms or ())) == (STEPS, SPIKED, NORMS)
    folder = events_of(tmp_path / "tensorboard" / "main", SPIKED)
    (file,) = folder.iterdir()
    for path in (folder, file, tmp_path / "tensorboard"):
        curve = read_curve(path)
        assert list(curve.steps) == STEPS
        assert list(curve.losses) == pytest.approx(SPIKED, rel=1e-6)
        assert list(curve.grad_norms or ()) == pytest.approx(NORMS, rel=1e-6)


def test_a_ledger_tells_what_was_rolled_back_but_not_what_was_computed_twice(tmp_path: Path) -> None:
    def attempt(number: int, step: int, loss: float, verdict: str = "step", start: int = 1) -> dict[str, object]:
        fields = {"kind": "attempt", "time": 0.0, "start": start, "attempt": number, "step": step, "grad_norm": 1.0}
        return {**fields, "loss": loss, "verdict": verdict, "applied": verdict == "step"}

    def started(number: int, attempt: int) -> dict[str, object]:
        return {"kind": "start", "time": 0.0, "start": number, "resumed_step": 1, "resumed_attempt": attempt}

    records = [
        started(1, 0),
        attempt(1, 1, 4.0),
        attempt(2, 2, math.nan, "replay"),
        attempt(3, 2, math.nan, "rollback"),
        {"kind": "rewind", "time": 0.0, "start": 1, "attempt": 3, "to_step": 0, "from_step": 1},
        attempt(4, 1, 5.0),
        attempt(5, 2, 99.0),
        started(2, 4),
        attempt(6, 2, 6.0, start=2),
    ]
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(map(encode, records)))
    assert [str(loss) for loss in read_curve(path).losses] == ["4.0", "nan", "5.0", "6.0"]


def test_what_is_missing_is_done_without(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text('{"training_loss": 3, "x": 1}\n{"training_loss": "NaN"}\n')
    curve = read_curve(path)
    assert (curve.losses[0], math.isnan(curve.losses[1]), curve.grad_norms, curve.steps) == (3.0, True, None, (1, 2))
    other = tmp_path / "curve.csv"
    other.write_text("step;loss;val_loss\n1;3;4\n2;3;5\n")
    assert read_curve(other, tag="val_loss").losses == (4.0, 5.0)


def test_the_table_shows_where_the_guard_would_have_acted(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["judge", str(csv_of(tmp_path / "a.csv", SPIKED))])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].split() == ["step", "action", "score", "why"]
    assert lines[1].split()[:3] == [str(STEPS[80]), "leave", "out"]
    assert done.output.endswith("steps 10 to 129; the guard would have acted once\n")
    calm = CliRunner().invoke(app, ["judge", str(csv_of(tmp_path / "b.csv", LOSSES))])
    assert calm.exit_code == 0
    assert "120 values (loss and gradient norm)" in calm.output
    assert calm.output.endswith("the guard would not have acted\n")
    assert len(calm.output.splitlines()) == 1


def test_a_threshold_can_be_given(tmp_path: Path) -> None:
    path = str(csv_of(tmp_path / "a.csv", SPIKED))
    done = CliRunner().invoke(app, ["judge", path, "--spike", "1e9", "--drift", "1e9"])
    assert done.output.endswith("the guard would not have acted\n")


@pytest.mark.parametrize(
    ("name", "content", "tag", "words"),
    [
        ("absent", None, None, "there is no file or folder"),
        ("a.jsonl", b'{"accuracy": 1}\n', None, "has no field that holds a loss; it has accuracy"),
        ("a.jsonl", b'{"loss": 1}\n', "lost", "has no field 'lost'; it has loss"),
        ("a.jsonl", b'{"loss": 1}\nnonsense\n', None, "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"loss": [1]}\n', None, "loss is \\[1\\], which is not a number"),
        ("a.csv", b"", None, "is empty"),
        ("a.csv", b"step,loss\n1,hello\n", None, "loss is 'hello', which is not a number"),
        ("a.csv", b"step,loss\nx,1\n", None, "step is 'x', which is not a number"),
        ("a.csv", b"step,loss\n", None, "has no field that holds a loss"),
        ("a.bin", b"\xff\xfe\x00\x80", None, "is no text"),
        ("events.out.tfevents.1", b"", None, "has no tag that holds a loss; it has no scalars"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, name: str, content: bytes | None, tag: str, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_curve(path, tag)


def test_folders_without_a_clear_curve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither a ledger"):
        read_curve(tmp_path)
    for name in ("one", "two"):
        events_of(tmp_path / name, LOSSES)
    with pytest.raises(DataError, match=r"several runs \(one, two\)"):
        read_curve(tmp_path)
    with pytest.raises(DataError, match="has no tag 'cost'; it has lr"):
        read_curve(tmp_path / "one", "cost")
