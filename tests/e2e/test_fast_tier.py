"""A run whose processes die goes on from the memory of the node, where every rank's copy is there and whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from workspace import Workspace

from trainer.checkpoint.manifest import step_of

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
    folders = [copies_of(prepared) / f"rank-{rank:05d}" for rank in range(2)]
    # a copy that was on its way when the ranks died is one on neither or on one of them
    whole = [{path.parent.name for path in folder.glob("step-????????/manifest.json")} for folder in folders]
    *older, newest = sorted(whole[0] & whole[1])
    shard = next((folders[1] / newest).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    code, output = prepared.trimtab("run", *OPTIONS)
    assert code == 0, output
    assert f"the copy of step {step_of(newest)} in memory is not used: " in output
    assert "rank-00001.safetensors" in output
    # step 10 is on disk
    step = max([10, *(step_of(name) or 0 for name in older)])
    assert (f"going on from the copy of step {step} in the memory of the nodes" in output) == (step > 10)
    assert resumed(prepared) == [0, step]
    assert prepared.final_state("small") == uninterrupted.final_state("small")
