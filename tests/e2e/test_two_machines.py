"""The commands that `trimtab prepare` prints for several machines, run to the letter: the bits of the run on one."""

from __future__ import annotations

import json
import re

import pytest
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHAPE = ("cluster.nodes=2", "cluster.ranks_per_node=1")


def commands_of(output: str) -> dict[str, str]:
    """Title → command, of what `trimtab prepare` printed."""
    return dict(re.findall(r"^  # (\w+)\n  (.+)$", output, re.MULTILINE))


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_same_run_on_two_machines(prepared: Workspace, uninterrupted: Workspace, launcher: str) -> None:
    # with as many threads as there: sums depend on it to the bit
    plan = json.loads((uninterrupted.run_dir("small") / "plan.json").read_text())
    threads = f"cluster.threads_per_rank={plan['threads_per_rank']}"
    code, output = prepared.trimtab("prepare", "config.yaml", *SHAPE, threads)
    assert code == 0, output
    assert "On each of the 2 machines" in output
    command = commands_of(output)[launcher]
    assert {"accelerate": "--machine_rank", "torchrun": "--nnodes 2"}[launcher] in command
    assert "num_machines: 2" in (prepared.run_dir("small") / "accelerate.yaml").read_text()
    # this machine stands for both of them
    nodes = [prepared.start("sh", "-c", command, NODE_RANK=str(n), MASTER_ADDR="127.0.0.1") for n in range(2)]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert prepared.outcome("small")["reason"] == "completed"
    start = next(record for record in prepared.ledger("small") if record["kind"] == "start")
    assert start["ranks"] == 2
    assert prepared.final_state("small") == uninterrupted.final_state("small")
