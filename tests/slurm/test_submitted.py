"""A submitted run ends with the bits of the run on one machine, whatever the cluster does to it meanwhile."""

from __future__ import annotations

import pytest
from lab import Lab
from submitted import EVENTS, SMALL, Cluster, befall
from workspace import Workspace

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_nodes_with_two_ranks_each_equal_four_local_ranks(cluster: Cluster) -> None:
    options = (*SMALL, "zero.stage=3", "schedule.duration=12")
    code, output = cluster.workspace.trimtab("run", "config.yaml", "--ranks", "4", *options, "name=four")
    assert code == 0, output
    job = cluster.submit("config.yaml", *options, "--nodes", "2", "--ranks", "2", "--time", "10")
    cluster.wait_until_over(job)
    assert cluster.outcome()["reason"] == "completed", cluster.log()
    (start,) = (record for record in cluster.ledger() if record["kind"] == "start")
    assert start["ranks"] == 4
    assert start["job"]["nodes"] == ["node1", "node2"]
    assert cluster.lab.job(job)["JobState"] == "COMPLETED"
    assert cluster.workspace.final_state("small") == cluster.workspace.final_state("four")


def test_whatever_happens_to_it(cluster: Cluster, lab_with_machines: Lab, local: Workspace) -> None:
    """In turn: the time limit, preemption, a requeue, a killed rank, a lost node and a cut one, a signal in a save."""
    job, happened = befall(cluster, one_by_one=False)
    assert [what for what, _, _ in happened] == list(EVENTS)
    cluster.wait_until_over(job)
    assert cluster.outcome()["reason"] == "completed", cluster.log()
    assert cluster.workspace.final_state("small") == local.final_state("small")

    jobs = cluster.jobs()
    starts = {record["start"]: record for record in cluster.ledger() if record["kind"] == "start"}
    nodes = [starts[start]["job"]["nodes"] for start in sorted(starts)]
    assert [job.then for job in jobs if job.reason == "crashed"].count("here") == 1
    # one node of the fifth start was lost, the other cut off
    assert set(nodes[4]).isdisjoint(nodes[5])
    # warned in a save, that was finished; warned in the last one, the last evaluation was left to another start
    assert len(starts) == 8
    assert [job.reached for job in jobs][-2:] == [30, 30]
    assert "asked to stop: the evaluation at step 30 is given up" in cluster.log()
