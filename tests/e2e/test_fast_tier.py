"""A run whose processes die goes on from the memory of the node, where every rank's copy is there and whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

OPTIONS = ("config.yaml", "checkpoint.memory_every=2", 'faults=["at(step=17, rank=1).kill()"]')


def copies_of(prepared: Workspace) -> Path:
    """The folder of the run in shared memory."""
    record = json.loads((prepared.run_dir("small") / "starts" / "0001.json").read_text())
    (folder,) = Path(f"/dev/shm/trimtab-{os.getuid()}").glob(f"{record['run']}-*")
    return folder


def resumed(prepared: Workspace) -> list[object]:
    return [record["resumed_step"] for record in prepared.ledger("small") if record["kind"] == "start"]


def test_a_killed_rank_costs_two_steps_at_most(prepared: Workspace, uninterrupted: Workspace) -> None:
    code, output = prepared.trimtab("run", *OPTIONS)
    assert code == 0, output
    assert "going on from the copy of step 1" in output
    first, second = resumed(prepared)
    # the copy of step 16 may still have been on its way when the rank died
    assert first == 0
    assert second in (14, 16)
    assert prepared.final_state("small") == uninterrupted.final_state("small")
    with pytest.raises(ValueError, match="not enough values"):
        copies_of(prepared)


def test_a_damaged_copy_is_said_and_an_older_whole_one_used(prepared: Workspace, uninterrupted: Workspace) -> None:
    code, output = prepared.trimtab("run", *OPTIONS, "supervision.restarts=0")
    assert code == 1, output
    newest, older = sorted((copies_of(prepared) / "rank-00001").glob("step-*"), reverse=True)
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    code, output = prepared.trimtab("run", *OPTIONS)
    assert code == 0, output
    step = int(older.name.removeprefix("step-"))
    assert f"the copy of step {int(newest.name.removeprefix('step-'))} in memory is not used: " in output
    assert "rank-00001.safetensors" in output
    assert f"going on from the copy of step {step} in the memory of the nodes" in output
    assert resumed(prepared) == [0, step]
    assert prepared.final_state("small") == uninterrupted.final_state("small")
