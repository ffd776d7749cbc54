"""Pretrain, distil into half of the layers, compare: one pipeline on this machine, interrupted and gone on with."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from test_run import wait_for_step
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PIPELINE = """
name: line
stages:
  - {name: teacher, config: config.yaml, set: [schedule.duration=12, evaluation.every=12]}
  - {name: student, config: student.yaml, from: teacher, teacher: teacher}
"""
STUDENT = {
    "stage": "distill",
    "model": {"pretrained": "teacher", "layers": "first:1"},
    "distill": {"teacher": {"place": "replica"}, "compare": True},
    "schedule": {"duration": 12, "warmup": 2},
}


def test_a_pipeline_distils_what_it_trained(prepared: Workspace) -> None:
    from trainer.config import yamltext

    config = yamltext.parse(prepared.config.read_text()) | STUDENT
    del config["data"]["tokenizer"]
    (prepared.root / "student.yaml").write_text(json.dumps(config))
    (prepared.root / "line.yaml").write_text(PIPELINE)
    folder = prepared.run_dir("line")

    process = prepared.start(sys.executable, "-m", "launcher.cli", "run", "line.yaml")
    wait_for_step(process, folder / "student", 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert "stage student stopped; the same command goes on with it" in output
    code, shown = prepared.trimtab("status", "runs/line")
    assert code == 0
    assert [line.split()[:2] for line in shown.splitlines()[1:3]] == [["student", "stopped"], ["teacher", "finished"]]

    code, output = prepared.trimtab("run", "line.yaml")
    assert code == 0, output
    assert "stage 1 of 2, teacher: it is complete" in output
    assert (folder / "student" / "export" / "config.json").is_file()
    found = json.loads((folder / "student" / "comparison.json").read_text())["entries"]
    assert [entry["name"] for entry in found] == ["teacher", "distilled", "plain"]
    teacher, distilled, plain = found
    assert teacher["parameters"] > distilled["parameters"] == plain["parameters"]
    assert distilled["tokens"] == plain["tokens"] == 12 * 8 * 32
    outcome = json.loads((folder / "teacher" / "outcome.json").read_text())
    # the same weights on the same held-out text
    assert teacher["held_out_loss"] == pytest.approx(outcome["held_out_loss"], abs=1e-4)
    assert distilled["held_out_loss"] != plain["held_out_loss"]
    assert "Side by side" in output

    code, output = prepared.trimtab("run", "line.yaml")
    assert code == 0
    assert "stage 2 of 2, student: it is complete" in output
