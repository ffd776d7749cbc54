"""The batch script and the scheduler's commands, on a real cluster."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from lab import Lab

from launcher.slurm import scheduler
from launcher.slurm.scheduler import SchedulerError
from launcher.slurm.script import log_path, render, sbatch_arguments
from launcher.slurm.site import SiteConfig
from launcher.slurm.submission import Submission

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

HOSTILE = "a b'c\"d $(touch x) `touch y` ;touch z; #SBATCH --wait\r\n#SBATCH --nodes=9 100% %j é中 ${HOME} * ~"

RECORDER = """\
#!/usr/bin/env python3
import json, os, subprocess, sys
from pathlib import Path

argv, step = sys.argv[1:], os.environ.get("SLURM_STEP_ID", "batch")
is_job = argv[1] == "launcher.slurm.job"
root = Path(argv[2] if is_job else argv[-1])
kept = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "CUDA_"))}
record = root / f"record-{'job' if is_job else os.environ['SLURM_NODEID']}.json"
record.write_text(json.dumps({"argv": argv, "environment": kept, "cwd": os.getcwd()}))
print("this is the log of", "the job" if is_job else "node " + os.environ["SLURM_NODEID"], flush=True)
if is_job:
    ranks = {**os.environ, "TRIMTAB_MASTER": "node1", "TRIMTAB_PORT": "4711"}
    srun = argv[argv.index("--") + 1 :]
    sys.exit(subprocess.run([srun[0], "--nodes=" + os.environ["SLURM_JOB_NUM_NODES"], *srun[1:]], env=ranks).returncode)
"""


@pytest.fixture(autouse=True)
def on_the_lab(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)


def submission(root: Path, site: dict[str, Any] | None = None, **changes: Any) -> Submission:
    values: dict[str, Any] = {
        "name": root.name,
        "root": str(root),
        "script": str(root / "train.sbatch"),
        "workdir": str(root.parent),
        "nodes": (2, 2),
        "ranks_per_node": 2,
        "device": "cpu",
        "time": "10",
        "python": str(root.parent / "bin dir" / "python"),
        "site": SiteConfig(**(site or {})),
    }
    made = Submission(**(values | changes))
    (root / "logs").mkdir(parents=True)
    python = Path(made.python)
    python.parent.mkdir(exist_ok=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    return made


def write(submissions: list[Submission]) -> Path:
    path = Path(submissions[0].script)
    (path.parent / "logs").mkdir(exist_ok=True)
    path.write_text(render(submissions), encoding="utf-8", newline="")
    return path


def wait_until_over(lab: Lab, *jobs: str) -> None:
    def over() -> bool:
        states = scheduler.jobs(jobs)
        return bool(states) and not any(scheduler.is_alive(state.state) for state in states.values())

    lab.wait_for(over)


GPU = {"gpu_type": "fake", "partition": "batch"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cpu": ({}, {}),
    "shared nodes": ({"exclusive": False, "memory": "1G"}, {"threads_per_rank": 1}),
    "gpus": (GPU, {"device": "cuda", "nodes": (1, 2)}),
    "gres": ({**GPU, "gpu_option": "gres"}, {"device": "cuda"}),
    "chain": ({"continue_by": "chain", "signal_seconds": 300, "directives": {"nice": 5, "comment": "a 'b' $(c)"}}, {}),
    "everything": (
        {"memory": "0", "cpus_per_task": 2, "partition": "batch,high", "exclude": ("node4",), "qos": "normal"},
        {"after": ("/runs/x",)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cluster_takes_the_script(tmp_path: Path, name: str) -> None:
    site, changes = CASES[name]
    made = submission(tmp_path / "run", site, **changes)
    estimate = scheduler.test(write([made]), sbatch_arguments([made]))
    assert "processors on node" in estimate


def test_an_array_is_taken(tmp_path: Path) -> None:
    runs = [submission(tmp_path / name, script=str(tmp_path / "train.sbatch")) for name in ("a", "b", "c")]
    assert "processors on node" in scheduler.test(write(runs), sbatch_arguments(runs))


def test_what_the_cluster_has_not_is_refused_in_its_words(tmp_path: Path) -> None:
    made = submission(tmp_path / "run", {"partition": "nope"})
    with pytest.raises(SchedulerError, match="said: invalid partition specified: nope"):
        scheduler.test(write([made]), [])
    with pytest.raises(SchedulerError, match="configuration is not available"):
        scheduler.test(write([made]), ["--partition=batch", "--nodes=60"])


def test_gpus_of_the_node_are_all_visible_to_its_one_task(lab: Lab, tmp_path: Path) -> None:
    made = submission(tmp_path / "run", {"gpu_type": "fake"}, device="cuda")
    job = scheduler.submit(write([made]), sbatch_arguments([made]))
    wait_until_over(lab, job)
    for node in (0, 1):
        record = json.loads((tmp_path / "run" / f"record-{node}.json").read_text())
        assert record["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert record["environment"]["SLURM_NODEID"] == str(node)


def test_cores_that_are_asked_for_reach_the_step(lab: Lab, tmp_path: Path) -> None:
    made = submission(tmp_path / "run", {"exclusive": False, "cpus_per_task": 2}, nodes=(1, 1))
    job = scheduler.submit(write([made]), sbatch_arguments([made]))
    wait_until_over(lab, job)
    record = json.loads((tmp_path / "run" / "record-0.json").read_text())
    assert record["environment"]["SLURM_CPUS_PER_TASK"] == "2"
    assert record["environment"]["SLURM_CPUS_ON_NODE"] == "2"


@pytest.mark.parametrize("folder", [HOSTILE, "back\\slash $(touch x) 100%"])
def test_texts_of_users_stay_texts(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    workdir = tmp_path / "work"
    workdir.mkdir()
    monkeypatch.chdir(workdir)
    run = tmp_path / folder
    made = submission(run)
    arguments = sbatch_arguments([made])
    scheduler.test(write([made]), arguments)
    job = scheduler.submit(write([made]), arguments)
    wait_until_over(lab, job)
    state = scheduler.job(job)
    assert state is not None
    log = log_path(made, job).read_text()
    assert state.state == "COMPLETED", log
    record = json.loads((run / "record-job.json").read_text())
    assert record["argv"][:4] == ["-m", "launcher.slurm.job", str(run), "--"]
    assert record["cwd"] == str(workdir)
    for node in (0, 1):
        argv = json.loads((run / f"record-{node}.json").read_text())["argv"]
        assert argv[argv.index("--config_file") + 1] == f"{run}/accelerate.yaml"
        assert argv[-1] == str(run)
        assert argv[argv.index("--machine_rank") + 1] == str(node)
    assert set(log.splitlines()) == {
        "this is the log of the job",
        *(f"{node}: this is the log of node {node}" for node in (0, 1)),
    }
    # nothing was executed from them
    assert list(workdir.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"work", "bin dir", folder}


def test_runs_of_an_array_and_one_of_them_again(lab: Lab, tmp_path: Path) -> None:
    names = ("a b", "$(touch x)", "c")
    runs = [submission(tmp_path / name, script=str(tmp_path / "train.sbatch"), nodes=(1, 1)) for name in names]
    array = scheduler.submit(write(runs), sbatch_arguments(runs))
    wait_until_over(lab, array)
    states = scheduler.jobs([array])
    assert {job: state.state for job, state in states.items()} == {
        f"{array}_{index}": "COMPLETED" for index in range(3)
    }
    for index, run in enumerate(runs):
        log = log_path(run, f"{array}_{index}")
        assert log.read_text().startswith("this is the log of the job\n")
        record = json.loads((Path(run.root) / "record-job.json").read_text())
        assert record["environment"]["SLURM_ARRAY_TASK_ID"] == str(index)
        (Path(run.root) / "record-job.json").unlink()
    again = scheduler.submit(Path(runs[1].script), [*sbatch_arguments(runs[1:2]), "--array=1"])
    wait_until_over(lab, again)
    assert [path.parent.name for path in tmp_path.glob("*/record-job.json")] == [names[1]]
    assert log_path(runs[1], f"{again}_1").exists()


# commands

WAITS = """\
#!/bin/bash
trap 'echo signalled >> "$OUT"; exit 0' USR1
echo "began ${SLURM_RESTART_COUNT-first}" >> "$OUT"
while :; do sleep 0.1; done
"""


class Waiting:
    """A script that runs until it is signalled."""

    def __init__(self, folder: Path):
        self.script, self.out = folder / "waits.sbatch", folder / "out"
        self.script.write_text(WAITS)
        self.arguments = ("--output=/dev/null", f"--export=ALL,OUT={self.out}", "--time=10", "--open-mode=append")

    def submit(self, *arguments: str) -> str:
        return scheduler.submit(self.script, [*self.arguments, *arguments])

    def lines(self) -> list[str]:
        return self.out.read_text().splitlines() if self.out.exists() else []


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    return Waiting(tmp_path)


def state_of(job: str) -> str:
    state = scheduler.job(job)
    assert state is not None
    return state.state


def test_a_job_is_seen_signalled_and_over(lab: Lab, waiting: Waiting) -> None:
    job = waiting.submit("--nodes=2", f"--job-name={HOSTILE}|RUNNING|9|")
    lab.wait_for(lambda: waiting.lines() == ["began first"])
    state = scheduler.job(job)
    assert state is not None
    assert (state.id, state.state, state.nodes, state.restarts) == (job, "RUNNING", ("node1", "node2"), 0)
    assert state.start is not None
    assert state.end == state.start + 600
    assert abs(state.start - time.time()) < 60
    assert scheduler.end_time(job) == state.end
    scheduler.signal(job, "USR1", batch=True)
    wait_until_over(lab, job)
    assert state_of(job) == "COMPLETED"
    assert waiting.lines() == ["began first", "signalled"]
    # known while it is remembered, and no other is
    assert scheduler.jobs([job, "999999"]).keys() == {job}
    assert scheduler.job("999999") is None


def test_a_requeued_job_starts_again_where_it_may(lab: Lab, waiting: Waiting) -> None:
    job = waiting.submit("--nodes=1", "--nice=0")
    lab.wait_for(lambda: waiting.lines() == ["began first"])
    before = scheduler.job(job)
    assert before is not None
    with pytest.raises(
        SchedulerError, match=rf"set ExcNodeList of job {job} to '{before.nodes[0]}', and said: Job is no"
    ):
        scheduler.exclude(job, before.nodes)
    scheduler.requeue(job)
    scheduler.exclude(job, before.nodes)
    lab.wait_for(lambda: len(waiting.lines()) == 2)
    after = scheduler.job(job)
    assert after is not None
    assert waiting.lines()[1] == "began 1"
    assert (after.restarts, set(after.nodes) & set(before.nodes)) == (1, set())
    scheduler.cancel([job, "999999"])
    wait_until_over(lab, job)
    assert state_of(job) == "CANCELLED"
    scheduler.cancel([job])
    with pytest.raises(SchedulerError, match="requeue job 999999, and said: Invalid job id specified"):
        scheduler.requeue("999999")


def test_one_task_of_an_array_is_a_job_of_its_own(lab: Lab, waiting: Waiting) -> None:
    array = waiting.submit("--array=0-2", "--nodes=1", "--cpus-per-task=1")
    tasks = [f"{array}_{index}" for index in range(3)]
    lab.wait_for(lambda: len(waiting.lines()) == 3)
    scheduler.requeue(tasks[2])
    lab.wait_for(lambda: len(waiting.lines()) == 4)
    assert [state.restarts for _, state in sorted(scheduler.jobs([array]).items())] == [0, 0, 1]
    scheduler.cancel([tasks[1]])
    lab.wait_for(lambda: state_of(tasks[1]) == "CANCELLED")
    assert state_of(tasks[0]) == "RUNNING"
    held = waiting.submit("--hold", "--array=0-1")
    assert scheduler.jobs([held]).keys() == {f"{held}_0", f"{held}_1"}
    scheduler.cancel([array, held])
    wait_until_over(lab, array, held)


def test_what_waits_for_a_job_can_wait_for_another(lab: Lab, waiting: Waiting) -> None:
    first, second = waiting.submit("--hold"), waiting.submit("--hold")
    third = waiting.submit(f"--dependency=afterok:{first},afterany:{second}")
    lab.wait_for(lambda: scheduler.waiting_for(first).keys() == {third})
    fourth = waiting.submit("--hold")
    for state in scheduler.waiting_for(first).values():
        scheduler.redirect(state, first, fourth)
    assert scheduler.waiting_for(first) == {}
    changed = scheduler.job(third)
    assert changed is not None
    assert changed.dependency == f"afterok:{fourth}(unfulfilled),afterany:{second}(unfulfilled)"
    scheduler.depend(third, "")
    lab.wait_for(lambda: state_of(third) == "RUNNING")
    scheduler.cancel([first, second, third, fourth])
    wait_until_over(lab, first, second, third, fourth)


def test_nodes(lab: Lab) -> None:
    nodes = scheduler.hostnames("node[1-2]")
    assert nodes == ["node1", "node2"]
    assert scheduler.node_states([*nodes, "nowhere"]) == {"node1": "idle", "node2": "idle"}
    assert (
        scheduler.gpus_by_node(None) == scheduler.gpus_by_node("high,batch", "fake") == dict.fromkeys(lab.states(), 2)
    )
    assert scheduler.gpus_by_node("batch", "a100") == dict.fromkeys(lab.states(), 0)
    address = scheduler.address("node1")
    assert lab.run("srun", "--nodes=1", "--nodelist=node1", "hostname", "-I").stdout.split().count(address) or (
        lab.mode == "ports" and address == "127.0.0.1"
    )
    with pytest.raises(SchedulerError, match="say where node nowhere is, and said: Node nowhere not found"):
        scheduler.address("nowhere")


def test_a_node_that_dies_is_seen(lab_with_machines: Lab) -> None:
    lab = lab_with_machines
    lab.power_off("node2")
    lab.wait_for(lambda: scheduler.is_gone(scheduler.node_states(["node2"])["node2"]))
    assert not scheduler.is_gone(scheduler.node_states(["node1"])["node1"])
