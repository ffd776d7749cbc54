"""What a run leaves out of its data, as `trimtab quarantine` lists it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.quarantine import quarantined
from tests.unit.launcher.conftest import small_config
from trainer.errors import RunDirectoryError
from trainer.telemetry.ledger import encode


def attempt(number: int, quarantine: bool = True, incident: int = 1, start: int = 1) -> dict[str, Any]:
    return {
        "kind": "attempt",
        "time": 1e9 + number,
        "start": start,
        "attempt": number,
        "step": number,
        "batch": number - 1,
        "incident": incident,
        "applied": not quarantine,
        "quarantined": quarantine,
        "reason": f"reason of {number}",
    }


def rewind(number: int, first: int, last: int) -> dict[str, Any]:
    return {
        "kind": "rewind",
        "time": 1e9 + number,
        "start": 1,
        "attempt": number,
        "incident": 2,
        "from_step": number - 1,
        "to_step": 1,
        "quarantine": [first, last],
        "reason": "the loss rose",
    }


def start(number: int, attempt: int) -> dict[str, Any]:
    return {"kind": "start", "time": 1e9, "start": number, "resumed_attempt": attempt, "resumed_step": attempt}


def make_run(root: Path, *records: dict[str, Any], **changes: Any) -> Path:
    root.mkdir()
    (root / "config.yaml").write_text(json.dumps(small_config(root, **changes)))
    if records:
        (root / "ledger.jsonl").write_bytes(b"".join(map(encode, records)))
    return root


def test_ranges_are_listed_with_where_they_come_from(tmp_path: Path) -> None:
    records = [start(1, 0), attempt(1, False), attempt(2), attempt(3), attempt(4, False), rewind(20, 10, 14)]
    config = small_config(tmp_path)["data"] | {"exclude_batches": [[100, 109]]}
    found = quarantined(make_run(tmp_path / "run", *records, data=config))
    assert [(e.first, e.last, e.incident, e.step, e.reason) for e in found] == [
        (100, 109, None, None, "data.exclude_batches of the config"),
        (1, 2, 1, 2, "reason of 2"),
        (10, 14, 2, 20, "the loss rose"),
    ]


def test_what_a_resume_took_back_is_not_left_out_but_a_rollback_keeps_it(tmp_path: Path) -> None:
    records = [start(1, 0), attempt(1, False), attempt(9), rewind(10, 20, 20), attempt(12), start(2, 11)]
    found = quarantined(make_run(tmp_path / "run", *records))
    assert [(entry.first, entry.last) for entry in found] == [(8, 8), (20, 20)]


def test_the_text_of_the_worst_samples_is_shown(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", start(1, 0), attempt(2))
    folder = root / "incidents" / "0001"
    folder.mkdir(parents=True)
    sample = {"batch": 1, "id": 5, "loss": 9.5}
    documents = [{"source": "web", "document": "page-7", "text": f"[bold]spam[/bold]\n  {'eggs ' * 80}"}]
    other = {"batch": 7, "id": 6, "loss": "NaN", "documents": [{"source": "wiki", "document": "p", "text": "other"}]}
    lines = [sample | {"documents": documents}, sample | {"loss": None, "documents": []}, other]
    (folder / "samples.jsonl").write_bytes(b"".join(encode(line) for line in lines))
    plain = CliRunner().invoke(app, ["quarantine", str(root)])
    assert plain.exit_code == 0
    assert "web" in plain.output
    assert "spam" not in plain.output
    shown = CliRunner().invoke(app, ["quarantine", str(root), "--text"])
    assert "loss 9.5  page-7" in shown.output
    assert "[bold]spam[/bold] eggs eggs" in shown.output
    assert "wiki" not in shown.output
    assert shown.output.endswith("1 batch is left out\n")


def test_an_empty_quarantine_says_so(tmp_path: Path) -> None:
    for root in (make_run(tmp_path / "a"), make_run(tmp_path / "b", start(1, 0), attempt(1, False))):
        done = CliRunner().invoke(app, ["quarantine", str(root)])
        assert done.exit_code == 0
        assert done.output == "nothing is left out: no batch is in quarantine, and the config excludes none\n"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        quarantined(tmp_path)
