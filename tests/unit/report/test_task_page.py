"""The page of a run that learned a task: numbers that can be checked by hand, and nothing of a text taken for HTML."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from trainer.config.files import RunFiles
from trainer.report.task import MOST_CLASSES, write
from trainer.telemetry.ledger import encode

EVIL = "<script>alert(1)</script> & co"


def evaluation(step: int, f1: float, best: int | None = None, **more: Any) -> dict[str, Any]:
    found = {"kind": "evaluation", "time": 0.0, "start": 1, "step": step, "loss": 1 / step, "scores": {"f1_macro": f1}}
    return found | ({"best": {"score": "f1_macro", "step": best, "value": 0.0}} if best else {}) | more


def predictions(step: int, confusion: list[list[int]], **more: Any) -> dict[str, Any]:
    wrong = {"document": "rows.csv:3", "truth": "good", "prediction": "bad", "text": f"{EVIL} at {step}"}
    found = {"kind": "predictions", "time": 0.0, "start": 1, "step": step, "errors": [wrong]}
    return found | {"classes": ["bad", "good"], "confusion": confusion} | more


def run(root: Path, *records: dict[str, Any], classes: int = 2) -> RunFiles:
    files = RunFiles(root)
    begin = {"kind": "start", "time": 0.0, "start": 1, "resumed_step": 0}
    files.ledger.write_bytes(b"".join(encode(record) for record in (begin, *records)))
    names = ["bad", "good", *(f"more {number}" for number in range(classes - 2))]
    source = {
        "name": "reviews",
        "removed": {"also in the held-out split": {"documents": 7}},
        "train": {"documents": 1234, "classes": [1000, 234] + [0] * (classes - 2)},
        "held_out": {"documents": 16, "classes": [9, 7] + [0] * (classes - 2)},
    }
    report = {"sources": [source], "classes": names, "cut": {"train": 5, "held_out": 0}}
    files.data.write_text(json.dumps({"report": report | {"sequence_length": 64, "too_long": "window"}}))
    return files


def cells(page: str, heading: str) -> list[list[str]]:
    """Rows of the tables between a heading and the next one."""
    part = page.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", part, re.DOTALL)
    return [
        [
            unescape(re.sub(r"<[^>]*>", "", cell)).strip()
            for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def test_the_best_evaluation_is_shown(tmp_path: Path) -> None:
    files = run(
        tmp_path,
        evaluation(10, 0.5, best=10),
        predictions(10, [[6, 3], [4, 3]]),
        evaluation(20, 0.4, best=10),
        predictions(20, [[0, 9], [0, 7]]),
    )
    assert write(files, "films", "completed 20 steps") == files.report
    page = files.report.read_text()
    assert "Completed 20 steps." in page
    assert cells(page, "Evaluations on held-out data") == [
        ["step", "loss", "f1_macro"], ["10", "0.1000", "0.5000"], ["20", "0.0500", "0.4000"]
    ]  # fmt: skip
    assert '<tr class="chosen"><td class="n">10</td>' in page
    assert "best by f1_macro, at step 10" in page
    assert page.count("data:image/png;base64,") == 1
    assert cells(page, "Confusion")[1:] == [["bad", "6", "3"], ["good", "4", "3"]]
    assert "rgba(31, 119, 180, 0.667)" in page
    data = cells(page, "Data")
    assert data[1] == ["reviews", "1,234", "16", "7 also in the held-out split"]
    # precision 6/10, recall 6/9, F1 12/19; 3/6, 3/7, 6/13
    assert data[3:] == [["bad", "1,000", "9", "0.6000", "0.6667", "0.6316"],
                        ["good", "234", "7", "0.5000", "0.4286", "0.4615"]]  # fmt: skip
    assert "Longer than a sample of 64 tokens, and read in windows: 5 of the train split." in page
    assert [path.name for path in tmp_path.iterdir()].count(".report.html") == 0


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    files = run(tmp_path, evaluation(5, 0.5), predictions(5, [[1, 0], [0, 1]]))
    (tmp_path / "augmentation.json").write_text(
        json.dumps({"said": f"typos {EVIL}", "examples": {"typos": [{"sample": 1, "before": EVIL, "after": "b"}] * 3}})
    )
    write(files, EVIL, f"halted: {EVIL}")
    page = files.report.read_text()
    assert "<script" not in page
    assert cells(page, "Worst errors")[1] == [f"{EVIL} at 5", "good", "bad", "rows.csv:3"]
    assert cells(page, "Augmentation, by example")[1:] == [["typos", EVIL, "b"]] * 2
    assert "newest, at step 5" in page


def test_what_was_rolled_back_is_not_shown(tmp_path: Path) -> None:
    files = run(
        tmp_path,
        evaluation(10, 0.5, best=10),
        evaluation(20, 0.9, best=20),
        predictions(20, [[9, 0], [0, 7]]),
        {"kind": "rewind", "time": 0.0, "start": 1, "step": 12, "to_step": 12, "from_step": 21, "attempt": 21},
        evaluation(20, 0.6, best=20, loss="NaN"),
        predictions(20, [[8, 1], [0, 7]]),
    )
    write(files, "films", "completed")
    page = files.report.read_text()
    assert [row[0] for row in cells(page, "Evaluations on held-out data")[1:]] == ["10", "20"]
    assert "0.9000" not in cells(page, "Evaluations on held-out data")[2]
    assert cells(page, "Confusion")[1] == ["bad", "8", "1"]


def test_without_classes_to_confuse(tmp_path: Path) -> None:
    errors = [{"document": "d", "truth": ["a", "b"], "prediction": [], "text": "t"}]
    closely = {"kind": "predictions", "time": 0.0, "start": 1, "step": 5, "errors": errors}
    files = run(tmp_path, evaluation(5, 0.5), closely, classes=MOST_CLASSES + 4)
    write(files, "tags", "stopped")
    page = files.report.read_text()
    assert "<h2>Confusion</h2>" not in page
    assert cells(page, "Worst errors")[1] == ["t", "a, b", "none", "d"]
    assert len(cells(page, "Data")) == 2 + 1 + MOST_CLASSES
    assert "… and 4 more" in page


def test_a_run_that_was_not_evaluated_has_none(tmp_path: Path) -> None:
    files = run(tmp_path)
    assert write(files, "films", "halted") is None
    assert not files.report.exists()


def test_incidents_are_linked(tmp_path: Path) -> None:
    files = run(tmp_path, evaluation(5, 0.5))
    for number in ("0002", "0001"):
        (files.incidents / number).mkdir(parents=True)
        (files.incidents / number / "report.md").touch()
    write(files, "films", "completed")
    found = re.findall(r'<a href="(.*?)">', files.report.read_text())
    assert found == ["incidents/0001/report.md", "incidents/0002/report.md"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path: Path, value: float) -> None:
    files = run(tmp_path, evaluation(5, value), evaluation(6, value, loss=value))
    write(files, "films", "halted")
    assert cells(files.report.read_text(), "Evaluations on held-out data")[1][2] == str(value)
