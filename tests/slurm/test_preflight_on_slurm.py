"""The look at the nodes of an allocation, before ranks start on them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from lab import Lab

from launcher.preflight.examine import examine
from launcher.preflight.judging import Findings
from launcher.slurm.site import PreflightConfig

pytestmark = pytest.mark.slurm

NODES = ("node1", "node2", "node3")
WANTED = PreflightConfig(memory_gib=0.01, disk_gib=0.01, disk_megabytes_per_second=0, timeout_seconds=60)
PORT = 29876
"""Each node has a network of its own, in which nothing else listens."""


class ThreeNodes:
    """An allocation of three nodes, which outlives them: this cluster gives a node up after ten seconds."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab = lab
        self.reports = folder
        done = lab.run("salloc", f"--nodelist={','.join(NODES)}", "--exclusive", "--no-kill", "--no-shell")
        assert done.returncode == 0, done.stderr
        self.job = done.stderr.rpartition("job allocation ")[2].split()[0]

    def srun(
        self, nodes: Sequence[str], argv: Sequence[str], environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        where = [f"--jobid={self.job}", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
        command = ["srun", "--overlap", "--ntasks-per-node=1", *where, *argv]
        return self.lab.run(*command, env=self.lab.environment | environment, timeout=timeout)

    def on(self, node: str, *argv: str | Path) -> None:
        done = self.srun([node], list(map(str, argv)), {}, 60)
        assert done.returncode == 0, done.stderr

    def examine(self, extra: Mapping[str, str] | None = None, **wanted: float) -> Findings:
        def run(nodes: Sequence[str], argv: Sequence[str], environment: Mapping[str, str], timeout: float) -> int:
            try:
                return self.srun(nodes, argv, {**environment, **(extra or {})}, timeout).returncode
            except subprocess.TimeoutExpired:
                return 124

        return examine(
            NODES, run, self.reports, WANTED.model_copy(update=wanted), 0, sys.executable, "node1", PORT
        )  # fmt: skip


@pytest.fixture
def three_nodes(lab_with_machines: Lab, tmp_path: Path) -> Iterator[ThreeNodes]:
    made = ThreeNodes(lab_with_machines, tmp_path / "reports")
    yield made
    lab_with_machines.run("scancel", made.job)


def test_three_machines_that_are_well_find_each_other(three_nodes: ThreeNodes) -> None:
    findings = three_nodes.examine()
    assert findings.well, findings.sentences
    assert findings.figures["link Gbit/s, slowest"] > 0
    assert sorted(path.name for path in three_nodes.reports.iterdir()) == [f"{node}.json" for node in NODES]


def test_nodes_that_differ_are_named_with_what_differs(three_nodes: ThreeNodes, tmp_path: Path) -> None:
    """On node2 another package is mounted over the shared one; node3 has hardly any /dev/shm."""
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    metadata = other / "accelerate-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 0.1\n")
    three_nodes.on("node2", "mount", "--bind", other, shared)
    three_nodes.on("node3", "mount", "-o", "remount,size=1M", "/dev/shm")
    try:
        findings = three_nodes.examine({"PYTHONPATH": str(shared)}, shared_memory_gib=0.01)
    finally:
        three_nodes.on("node2", "umount", shared)
        three_nodes.on("node3", "mount", "-o", "remount,size=50%", "/dev/shm")
    assert findings.trouble == ()
    assert set(findings.bad) == {"node2", "node3"}
    assert findings.bad["node2"][0].startswith("node2: accelerate is 0.1, on 2 other nodes it is ")
    assert findings.bad["node3"] == ("node3: only 0.00098 GiB are free in /dev/shm, 0.01 are required",)


def test_a_node_whose_link_is_cut_is_named_and_the_others_are_examined(three_nodes: ThreeNodes) -> None:
    three_nodes.lab.cut("node3")
    findings = three_nodes.examine()
    assert findings.trouble == ()
    assert set(findings.bad) == {"node3"}
    assert findings.bad["node3"][0].startswith("node3: no process can be started on it (exit code ")
    # the other two met
    assert findings.figures["link Gbit/s, slowest"] > 0
