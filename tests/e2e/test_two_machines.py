"""The commands that `trimtab prepare` prints for several machines, run to the letter: the bits of the run on one."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from workspace import Workspace, make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHAPE = ("cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.threads_per_rank=1", "zero.stage=3")


@pytest.fixture(scope="module")
def on_one_machine(tmp_path_factory: pytest.TempPathFactory, uninterrupted: Workspace) -> Iterator[dict[str, bytes]]:

    made = make_workspace(tmp_path_factory.mktemp("one") / "work")
    code, output = made.trimtab("run", "config.yaml", "zero.stage=3", "cluster.threads_per_rank=1")
    assert code == 0, output
    yield made.final_state("small")
    made.close()


def commands_of(output: str) -> dict[str, str]:
    """Title → command, of what `trimtab prepare` printed."""
    return dict(re.findall(r"^  # (\w+)\n  (.+)$", output, re.MULTILINE))


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_same_run_on_two_machines(prepared: Workspace, on_one_machine: dict[str, bytes], launcher: str) -> None:
    code, output = prepared.trimtab("prepare", "config.yaml", *SHAPE)
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
    assert prepared.final_state("small") == on_one_machine
