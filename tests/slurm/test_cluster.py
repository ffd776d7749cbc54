"""The cluster of slurm/cluster: it comes up, is damaged, heals, and goes."""

from __future__ import annotations

import pytest
from lab import Lab

pytestmark = pytest.mark.slurm


def test_two_nodes_are_two_machines(lab_with_machines: Lab) -> None:
    done = lab_with_machines.run("srun", "--nodes=2", "hostname")
    assert sorted(done.stdout.split()) == ["node1", "node2"]
