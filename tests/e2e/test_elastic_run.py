"""A run that goes on with other ranks and another ZeRO stage: the same command, two options more."""

from __future__ import annotations

import pytest
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STOPPED = 'faults=["at(step=15, rank=0).terminate()"]'


def attempts(workspace: Workspace, name: str) -> dict[int, dict[str, object]]:
    return {int(str(r["step"])): r for r in workspace.ledger(name) if r["kind"] == "attempt"}


def test_other_ranks_in_another_stage_go_on_with_the_same_samples(
    prepared: Workspace, uninterrupted: Workspace
) -> None:
    code, output = prepared.trimtab("run", "config.yaml", STOPPED)
    assert code == 75, output
    stopped = int(str(prepared.outcome("small")["step"]))
    assert 15 <= stopped < 20
    code, output = prepared.trimtab("run", "config.yaml", STOPPED, "zero.stage=3", "--ranks=1")
    assert code == 0, output
    assert "zero.stage: 2 → 3" in output
    assert "cluster.ranks_per_node: 2 → 1" in output
    assert "written by 2 ranks in ZeRO 2 and goes on with 1 in ZeRO 3" in output
    assert prepared.outcome("small")["step"] == 30

    whole, resumed = attempts(uninterrupted, "small"), attempts(prepared, "small")
    assert resumed.keys() == whole.keys() == set(range(1, 31))
    for step, attempt in whole.items():
        # the micro-batch is the same, so dropout draws the same masks
        assert resumed[step]["batch"] == attempt["batch"]
        assert resumed[step]["loss"] == pytest.approx(attempt["loss"], abs=1e-5 if step > stopped else 0), step
    assert list((prepared.run_dir("small") / "checkpoints").glob("step-00000030/rank-*.json")) == [
        prepared.run_dir("small") / "checkpoints" / "step-00000030" / "rank-00000.json"
    ]

    code, output = prepared.trimtab("export", str(prepared.run_dir("small")), "--average=9")
    assert code == 2
    assert "an average of 9 checkpoints was asked for" in output
