"""Runs with faults put in, as a user starts them: they end by themselves, with the bits that they should have."""

from __future__ import annotations

import sys

import psutil
import pytest
from test_run import wait_for_step
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

QUICK = ("snapshots.every=5", "guard.clean_steps=3", "guard.verify=4")
"""Snapshots that are healthy early in a run of 30 steps."""
WINDOW = ("schedule.duration=44", "optim.lr=1e-2", "guard.verify=4")
"""Long enough to learn what real text is: then noise stands out."""


def records_of(workspace: Workspace, name: str, kind: str) -> list[dict[str, object]]:
    return [record for record in workspace.ledger(name) if record["kind"] == kind]


def test_faults_of_hardware_leave_the_bits_of_the_clean_run(prepared: Workspace, uninterrupted: Workspace) -> None:
    faults = 'faults=["at(step=12, rank=1).gradient_is_nan()", "at(step=21, rank=0).flip_bit_in_weight()"]'
    code, output = prepared.trimtab("run", "config.yaml", faults, *QUICK)
    assert code == 0, output
    assert prepared.final_state("small") == uninterrupted.final_state("small")
    (rewind,) = records_of(prepared, "small", "rewind")
    assert rewind["source"] == "memory"
    assert rewind["quarantine"] is None
    run = prepared.run_dir("small")
    reports = [(run / "incidents" / number / "report.md").read_text() for number in ("0001", "0002")]
    assert "rank 1" in reports[0]
    assert "rank 0" in reports[1]
    assert (run / "tensorboard" / "abandoned").is_dir()
    assert "put into this run on purpose" in output
    assert "2, each with a report" in output


def test_without_snapshots_it_goes_back_to_a_checkpoint(prepared: Workspace, uninterrupted: Workspace) -> None:
    fault = 'faults=["at(step=24).learning_rate_times(1000)"]'
    code, output = prepared.trimtab("run", "config.yaml", fault, "snapshots.every=null", "guard.clean_steps=3")
    assert code == 0, output
    assert [record["source"] for record in records_of(prepared, "small", "rewind")] == ["checkpoint"]
    assert prepared.final_state("small") == uninterrupted.final_state("small")


def test_poisoned_data_is_left_out_and_was_never_seen(prepared: Workspace) -> None:
    """Left out by the guard, killed in between and gone on with, or excluded from the start: the same bits."""
    poison = 'faults=["batches(30, 33).random_tokens()"]'
    code, output = prepared.trimtab("run", "config.yaml", "name=whole", poison, *WINDOW)
    assert code == 0, output
    skipped = [record["batch"] for record in records_of(prepared, "whole", "attempt") if record["verdict"] == "skip"]
    assert skipped == [30, 31, 32, 33]

    process = prepared.start(sys.executable, "-m", "launcher.cli", "run", "config.yaml", "name=cut", poison, *WINDOW)
    wait_for_step(process, prepared.run_dir("cut"), 31)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate()
    code, output = prepared.trimtab("run", "config.yaml", "name=cut", poison, *WINDOW)
    assert code == 0, output

    assert {path.name for path in (prepared.run_dir("cut") / "incidents").iterdir()} >= {"0002"}

    code, output = prepared.trimtab("run", "config.yaml", "name=without", "data.exclude_batches=[[30, 33]]", *WINDOW)
    assert code == 0, output
    assert prepared.final_state("whole") == prepared.final_state("without")
    assert prepared.final_state("whole") == prepared.final_state("cut")

    code, output = prepared.trimtab("quarantine", str(prepared.run_dir("whole")))
    assert code == 0
    assert "30–33" in output


def test_a_run_that_cannot_get_on_halts_with_a_diagnosis(prepared: Workspace) -> None:
    fault = 'faults=["at(step=24).learning_rate_times(1000).every_time()"]'
    code, output = prepared.trimtab("run", "config.yaml", "name=hopeless", fault, *QUICK, "guard.max_rollbacks=2")
    assert code == 3, output
    outcome = prepared.outcome("hopeless")
    assert outcome["reason"] == "halted"
    assert "after 2 rollbacks" in str(outcome["message"])
    assert (prepared.run_dir("hopeless") / "incidents" / "0001" / "report.md").is_file()


def test_a_sentence_that_is_no_fault_is_refused_before_anything_starts(prepared: Workspace) -> None:
    code, output = prepared.trimtab("run", "config.yaml", "name=typo", 'faults=["at(step=3).gradient_is_nun()"]')
    assert code == 2
    assert "Traceback" not in output
    assert "gradient_is_nun" in output
    assert not (prepared.run_dir("typo") / "ledger.jsonl").exists()
