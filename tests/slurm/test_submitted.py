"""A submitted run ends with the bits of the run on one machine, whatever the cluster does to it meanwhile."""

from __future__ import annotations

import pytest
from submitted import SMALL, Cluster
from workspace import Workspace

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

AT_A_TIME = 2.0
"""Seconds of a step while something is to happen."""


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


def test_whatever_happens_to_it(cluster: Cluster, local: Workspace) -> None:
    """In turn: the time limit, preemption, a requeue, a killed rank, a lost node, a cut one, a signal in a save."""
    lab = cluster.lab
    slow = [f'"at(step=1, start={start}).slow({AT_A_TIME}, steps=1000)"' for start in range(1, 7)]
    cluster.site("signal_seconds: 40")
    faults = f'faults=[{", ".join(slow)}, "at(step=1, start=7).warn_while_saving()"]'
    options = (*SMALL, "checkpoint.every=1", faults)
    job = cluster.submit("config.yaml", *options, "--nodes", "2", "--ranks", "1", "--time", "1")

    cluster.wait_for_training(1)
    lab.wait_for(lambda: any(each.reason == "stopped" for each in cluster.jobs()))  # the time limit
    assert lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=30").returncode == 0
    cluster.wait_for_training(2)
    preempting = lab.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait_until_over(preempting)
    cluster.wait_for_training(3)
    assert lab.run("scontrol", "requeue", str(job)).returncode == 0
    cluster.wait_for_training(4)
    cluster.kill_a_rank()
    cluster.wait_for_training(5)
    lost = cluster.jobs()[-1].nodes[-1]
    lab.power_off(lost)
    cluster.wait_for_training(6)
    cut = cluster.jobs()[-1].nodes[-1]
    lab.cut(cut)
    cluster.wait_for_training(7)
    cluster.wait_until_over(job)

    assert cluster.outcome()["reason"] == "completed", cluster.log()
    assert cluster.workspace.final_state("small") == local.final_state("small")
