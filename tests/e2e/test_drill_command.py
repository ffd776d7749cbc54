"""`trimtab drill` as a user starts it: one launch, a table, a report, an exit code."""

from __future__ import annotations

import json

import pytest
from workspace import Workspace

pytestmark = pytest.mark.timeout(400)


def test_a_drill_of_ones_own_config(prepared: Workspace) -> None:
    faults = ("--faults", "gradient-nan,weight-bit", "--faults", "at(batch=40).data_is_nan()")
    code, output = prepared.trimtab("drill", "config.yaml", "optim.lr=5e-3", "--steps", "40", "--before", "20", *faults)
    assert code == 0, output
    root = prepared.run_dir("drill-small")
    report = json.loads((root / "drill.json").read_text())
    transient, flipped, bad = report["results"]
    for result in (transient, flipped, bad):
        assert result["passed"], result
        assert result["outcome"] == "recovered"
        assert result["name"][:20] in output
    assert (transient["rungs"], transient["lost"], transient["detected_after"]) == (["replay"], 1, 0)
    assert transient["same_bits"] == flipped["same_bits"] == "clean"
    assert flipped["rungs"] == ["rollback"]
    assert 0 < flipped["lost"] <= 20
    assert bad["quarantine"] == [[40, 40]]
    assert bad["same_bits"] == "excluded"
    assert "3 of 3 faults ended as they should" in output
    assert (root / "weight-bit/ledger.jsonl").exists()
    assert not list(root.rglob("checkpoints/*")), "nothing is saved"


def test_a_drill_of_the_processes(prepared: Workspace) -> None:
    code, output = prepared.trimtab("drill", "config.yaml", "--steps", "40", "--faults", "full-disk")
    assert code == 0, output
    assert "1 of 1 faults ended as they should" in output
    root = prepared.run_dir("drill-small")
    report = json.loads((root / "drill.json").read_text())
    assert "results" not in report, "nothing was asked for that is done in one launch"
    (result,) = report["processes"]["results"]
    assert (result["passed"], result["outcome"], result["starts"]) == (True, "went on", 1)
    assert (result["same_bits"], result["lost"], result["exit_codes"]) == ("clean", 0, [0])
    full = root / "processes/full-disk"
    struck = [json.loads(line) for line in (full / "faults.jsonl").read_text().splitlines()]
    assert {entry["rank"] for entry in struck} == {0, 1}
    ledger = [json.loads(line) for line in (full / "ledger.jsonl").read_text().splitlines()]
    assert [record["step"] for record in ledger if record["kind"] == "attempt"] == list(range(1, 41))
    assert 25 not in [record["step"] for record in ledger if record["kind"] == "checkpoint"]
    assert "File too large" in (full / "output.txt").read_text()


def test_what_cannot_be_drilled_is_refused_before_anything_starts(workspace: Workspace) -> None:
    for arguments, says in (
        (("--faults", "weight-bits"), "did you mean weight-bit?"),
        (("--faults", "at(step=3)"), "says when and not what"),
        (("--steps", "8"), "at least 40 steps, not 8"),
    ):
        code, output = workspace.trimtab("drill", "config.yaml", *arguments)
        assert code == 2
        assert says in output
        assert not (workspace.root / "runs").exists()


def test_a_fault_that_is_not_recovered_fails_the_drill(prepared: Workspace) -> None:
    code, output = prepared.trimtab(
        "drill", "config.yaml", "guard.mode=off", "--steps", "40", "--before", "0", "--faults", "gradient-huge"
    )
    assert code == 1, output
    assert "gradient-huge failed: it went unnoticed" in output
    assert "0 of 1 faults ended as they should" in output
