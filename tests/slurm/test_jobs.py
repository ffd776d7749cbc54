"""What a job decides at its end, and what comes of pipelines, arrays and names that nobody should give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab
from submitted import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]

ALONE = ("cluster.ranks_per_node=1", "cluster.threads_per_rank=1", "zero.stage=1", "checkpoint.background=false")
SHORT = (*ALONE, "schedule.duration=4", "schedule.warmup=1", "evaluation.every=null")


def test_three_starts_without_progress_end_it(cluster: Cluster) -> None:
    kill = 'faults=["at(step=2).kill().every_time()"]'
    job = cluster.submit("config.yaml", *ALONE, kill, "--nodes", "1")
    cluster.wait_until_over(job)
    gave_up = "gave up: 3 starts in a row brought no new checkpoint (max_fruitless: 3)"
    assert [job.then for job in cluster.jobs()] == ["here", "here", "end"], cluster.log()
    assert gave_up in cluster.jobs()[-1].why
    outcome = cluster.outcome()
    assert (outcome["reason"], outcome["exit_code"], outcome["start"]) == ("crashed", 1, 3)
    assert gave_up in outcome["message"]
    code, output = cluster.trimtab("status")
    assert code == 0, output
    assert gave_up in " ".join(output.split())


PREFLIGHT = "preflight: {memory_gib: 0.01, disk_gib: 0.01, disk_megabytes_per_second: 0, shared_memory_gib: 0.01}"


@pytest.fixture
def unfit(cluster: Cluster, lab_with_machines: Lab) -> Iterator[str]:
    """A node that has hardly any /dev/shm."""
    lab_with_machines.on("node2", "mount", "-o", "remount,size=1M", "/dev/shm")
    yield "node2"
    lab_with_machines.on("node2", "mount", "-o", "remount,size=50%", "/dev/shm")


def test_a_node_that_is_not_fit_is_left_out_by_name(cluster: Cluster, unfit: str) -> None:
    cluster.site(PREFLIGHT)
    job = cluster.submit("config.yaml", *SHORT, "--nodes", "2")
    cluster.wait_until_over(job)
    assert cluster.outcome()["reason"] == "completed", cluster.log()
    first, second = cluster.jobs()
    assert (first.nodes, first.reason, first.then) == (("node1", unfit), "node", "requeue")
    why = f"{unfit}: only 0.00098 GiB are free in /dev/shm, 0.01 are required"
    assert first.why == f"1 of 2 nodes are not fit, and the run needs 2: {why}"
    assert (len(second.nodes), second.reason) == (2, "completed")
    assert unfit not in second.nodes
    assert cluster.lab.job(job)["ExcNodeList"] == unfit
    code, output = cluster.trimtab("nodes")
    assert code == 0
    assert output.startswith(f"{unfit}  for 23 h more, found out by small: {why}")

    # another run of the folder is not given it either, until it is forgiven
    code, output = cluster.trimtab("submit", "config.yaml", *SHORT, "name=other", "--nodes", "2", "--dry-run")
    assert f"--exclude={unfit}" in output, output
    assert cluster.trimtab("nodes", "--forgive", unfit)[1].startswith(f"{unfit} is used again\n")
    code, output = cluster.trimtab("submit", "config.yaml", *SHORT, "name=other", "--nodes", "2", "--dry-run")
    assert "--exclude" not in output, output


def test_with_fewer_nodes_than_before_it_goes_on_with_the_same_batch(cluster: Cluster, unfit: str) -> None:
    """On both nodes first; the next job of the chain finds that one of them is not fit."""
    slow = 'faults=["at(step=2, start=1).slow(2.0, steps=100)"]'
    options = (*ALONE, "schedule.duration=6", "schedule.warmup=1", "checkpoint.every=1", "evaluation.every=null")
    cluster.site("exclude: [node3, node4]", "continue_by: chain")
    job = cluster.submit("config.yaml", *options, slow, "--nodes", "1-2")
    waiting = cluster.lab.sbatch(
        f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--output=/dev/null", "--wrap=true"
    )
    cluster.wait_for_training(1)
    submission = cluster.files().submission
    record = json.loads(submission.read_text())
    record["site"]["preflight"] |= {"enabled": True, "memory_gib": 0.01, "disk_gib": 0.01, "shared_memory_gib": 0.01}
    submission.write_text(json.dumps(record))
    assert cluster.lab.run("scancel", "--batch", "--signal=USR1", str(job)).returncode == 0
    cluster.wait_until_over(waiting)
    assert cluster.outcome()["reason"] == "completed", cluster.log()
    first, second = cluster.jobs()
    assert (first.job, first.then, second.then) == (str(job), "chain", "end")
    # what waited for the first job waited for the second one instead; the third one is not needed
    assert cluster.lab.job(waiting)["JobState"] == "COMPLETED"
    assert cluster.lab.run("squeue", "--noheader", "--all").stdout == ""
    assert json.loads(submission.read_text())["job"] == second.job
    starts = [record for record in cluster.ledger() if record["kind"] == "start"]
    assert [(start["ranks"], start["job"]["nodes"]) for start in starts] == [(2, ["node1", unfit]), (1, ["node1"])]
    assert starts[1]["resumed_step"] > 0
    assert [start["plan"]["batch"].split(" = ")[0] for start in starts] == ["8", "8"]


def test_a_pipeline_ends_with_the_stage_that_fails(cluster: Cluster) -> None:
    faults = 'faults=["at(step=2).gradient_is_nan().every_time()"]'
    options = [option for option in SHORT if "ranks_per_node" not in option]
    stages: list[dict[str, object]] = [
        {"name": "first", "set": options},
        {"name": "second", "set": [*options, "model.config=null", faults], "from": "first"},
        {"name": "third", "set": options},
    ]
    stages = [{"config": "config.yaml", "ranks": 1} | stage for stage in stages]
    (cluster.root / "line.yaml").write_text(json.dumps({"name": "line", "stages": stages}))
    code, output = cluster.trimtab("submit", "line.yaml")
    assert code == 0, output
    jobs = {
        stage["name"]: stage for stage in json.loads(cluster.files("line/pipeline.json").root.read_text())["stages"]
    }
    for name, stage in jobs.items():
        cluster.wait_until_over(stage["job"], f"line/{name}")
    assert cluster.outcome("line/first")["reason"] == "completed", cluster.log("line/first")
    second = cluster.outcome("line/second")
    assert (second["reason"], second["exit_code"]) == ("halted", 3), cluster.log("line/second")
    # a diagnosis is not requeued
    assert [(job.restart, job.reason, job.then) for job in cluster.jobs("line/second")] == [(0, "halted", "end")]
    assert cluster.lab.job(int(jobs["second"]["job"]))["JobState"] == "FAILED"
    third = cluster.outcome("line/third")
    assert third["reason"] == "cancelled"
    assert third["message"].startswith("not started: stage 'second' halted: ")
    assert cluster.jobs("line/third") == []
    assert cluster.lab.job(int(jobs["third"]["job"]))["JobState"] == "CANCELLED"
    code, output = cluster.trimtab("status", "runs/line")
    shown = " ".join(output.split())
    assert f"second: halted: {second['message']}"[:60] in shown
    assert "third: cancelled: not started: stage 'second' halted" in shown


def test_an_array_of_three_seeds_with_a_name_and_a_path_that_are_only_text(cluster: Cluster) -> None:
    name = "a'b\"c $(touch pwned) `touch pwned`; touch pwned"
    folder = f"{name}\n#SBATCH --nodes=9"
    config = (cluster.root / "config.yaml").read_text()
    hostile = config.replace("name: small", f"name: {json.dumps(name)}\nruns: {json.dumps(folder)}")
    (cluster.root / "config.yaml").write_text(hostile)
    job = cluster.submit("config.yaml", *SHORT, "--seeds", "3", "--nodes", "1")
    names = [f"../{folder}/{name}/seed={seed}" for seed in (3, 4, 5)]
    for index, each in enumerate(names):
        cluster.wait_until_over(f"{job}_{index}", each)
        assert cluster.outcome(each)["reason"] == "completed", cluster.log(each)
        assert [start.job for start in cluster.jobs(each)] == [f"{job}_{index}"]
        assert cluster.lab.job(job)["NumNodes"] == "1"
    code, output = cluster.trimtab("results", f"{folder}/{name}", "--json")
    assert code == 0, output
    assert len({run["held_out_loss"] for run in json.loads(output)["runs"]}) == 3
    code, output = cluster.trimtab("status", f"{folder}/{name}")
    assert code == 0, output
    assert [word for word in output.split() if word.startswith("seed=")] == ["seed=3", "seed=4", "seed=5"]
    code, output = cluster.trimtab("logs", f"{folder}/{name}/seed=3", "--lines", "1")
    assert (code, output.count("\n")) == (0, 2), output
    assert not list(cluster.root.rglob("pwned"))
    assert not list(Path.cwd().glob("pwned"))
