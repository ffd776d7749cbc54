"""The cluster of slurm/cluster: it comes up, does what a real one does, is damaged, heals, and goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import CLUSTER, Lab, parse_fields

pytestmark = pytest.mark.slurm

BEATING = """#!/bin/bash
echo "$(hostname) ${SLURM_RESTART_COUNT:-0}" >> starts.$SLURM_JOB_ID
while :; do echo beat >> beats.$SLURM_JOB_ID.$(hostname); sleep 0.1; done
"""


@pytest.fixture(scope="module")
def quick_lab(session_lab: Lab) -> Iterator[Lab]:
    """A second cluster beside the first, in which a preempted job has no time left."""
    made = Lab()
    made.up("--grace", "0")
    yield made
    made.close()


@pytest.fixture
def quick(quick_lab: Lab) -> Lab:
    quick_lab.free_all()
    return quick_lab


@pytest.fixture
def machines(quick: Lab) -> Lab:
    if quick.mode != "namespaces":
        pytest.skip("nodes share this machine's network: namespaces are not allowed here")
    return quick


@pytest.fixture
def empty(session_lab: Lab) -> Iterator[Lab]:
    """A folder without a cluster."""
    made = Lab()
    yield made
    made.close()


def processes_of(lab: Lab) -> dict[int, str]:
    """Every process, a job's too, that knows of the folder of a cluster."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if os.fsencode(lab.folder) in text:
                found[int(process.name)] = (process / "comm").read_text().strip()
        except OSError:
            continue
    return found


def links_of(lab: Lab) -> list[str]:
    aliases = Path("/sys/class/net").glob("*/ifalias")
    return [path.parent.name for path in aliases if path.read_text().strip() == str(lab.folder)]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(text)
    return path


# up


def test_a_second_up_changes_nothing(quick: Lab) -> None:
    before = processes_of(quick)
    done = quick.cluster("up")
    assert "running already" in done.stderr
    assert done.stdout == (quick.folder / "env").read_text()
    assert processes_of(quick) == before


def test_another_shape_is_refused(quick: Lab) -> None:
    done = quick.cluster("up", "--nodes", "3")
    assert done.returncode == 1
    assert done.stderr == f"cluster: the cluster in {quick.folder} has nodes 4, not 3: take it down first\n"
    assert len(quick.states()) == 4


def test_a_folder_with_something_else_is_left_alone(empty: Lab) -> None:
    (empty.folder / "thesis.tex").write_text("\\chapter{One}")
    for command in ("up", "down"):
        done = empty.cluster(command)
        assert done.returncode == 1
        assert "no cluster" in done.stderr
    assert [path.name for path in empty.folder.iterdir()] == ["thesis.tex"]
    (empty.folder / "thesis.tex").unlink()


def test_a_shell_uses_it_after_eval(quick: Lab) -> None:
    command = f'eval "$({CLUSTER}/up --state {quick.folder})" && sinfo --noheader --format="%P %D"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "batch* 4\nhigh 4\n"


# what jobs see


def test_nodes_are_machines(machines: Lab) -> None:
    assert machines.run("srun", "--nodes=2", "bash", "-c", "touch /dev/shm/$(hostname)").returncode == 0
    words = "echo $(hostname) $(getent hosts node2 | wc -w) $(ls /dev/shm); rm /dev/shm/*"
    done = machines.run("srun", "--nodes=2", "bash", "-c", words)
    assert sorted(done.stdout.splitlines()) == ["node1 2 node1", "node2 2 node2"]


def test_jobs_get_fake_gpus(quick: Lab) -> None:
    done = quick.run("srun", "--nodes=1", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert done.stdout == "0,1\n"


def test_jobs_do_not_carry_the_mark_of_a_member(quick: Lab) -> None:
    assert "TRIMTAB_LAB_MEMBER" not in quick.run("srun", "env").stdout


def test_fields_of_a_job_may_have_spaces(quick: Lab) -> None:
    words = ["--job-name=two words", "--comment=a=b c=d", "--hold", "--output=/dev/null", "--wrap=true"]
    job = quick.job(quick.sbatch(*words))
    assert (job["JobName"], job["Comment"], job["JobState"]) == ("two words", "a=b c=d", "PENDING")
    with pytest.raises(LookupError, match="Invalid job id"):
        quick.job(99999)


def test_fields() -> None:
    line = "JobId=7 JobName=a b ReqB:S:C:T=0:0:*:* TRES=cpu=1,mem=2G Command=/x y/z Comment= Power="
    assert parse_fields(line) == {
        "JobId": "7",
        "JobName": "a b",
        "ReqB:S:C:T": "0:0:*:*",
        "TRES": "cpu=1,mem=2G",
        "Command": "/x y/z",
        "Comment": "",
        "Power": "",
    }


def test_high_preempts_batch_by_requeue(quick: Lab, tmp_path: Path) -> None:
    job = quick.sbatch("--nodes=4", "--exclusive", f"--chdir={tmp_path}", script(tmp_path, BEATING))
    quick.wait_for(lambda: lines(tmp_path / f"starts.{job}"))
    done = quick.run("srun", "--partition=high", "--nodes=4", "true")
    assert done.returncode == 0, done.stderr
    quick.wait_for(lambda: len(lines(tmp_path / f"starts.{job}")) == 2)
    assert [line.split()[1] for line in lines(tmp_path / f"starts.{job}")] == ["0", "1"]
    assert quick.job(job)["Restarts"] == "1"


# what can happen to nodes


def test_cut_and_join(machines: Lab) -> None:
    values = parse_fields(machines.run("scontrol", "-o", "show", "node", "node3").stdout)

    def answers() -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.3)
            return probe.connect_ex((values["NodeAddr"], int(values["Port"]))) == 0

    before = processes_of(machines)
    assert answers()
    machines.cut("node3")
    assert not answers()
    assert "cut off: node3" in machines.cluster("up").stderr
    assert processes_of(machines) == before
    machines.join("node3")
    machines.wait_for(answers)


def test_slurmd_alone_may_die(quick: Lab, tmp_path: Path) -> None:
    job = quick.sbatch("--nodes=1", f"--chdir={tmp_path}", script(tmp_path, BEATING))
    quick.wait_for(lambda: lines(tmp_path / f"starts.{job}"))
    node = quick.job(job)["NodeList"]
    quick.wait_for(lambda: list(tmp_path.glob(f"beats.{job}.*")))
    beats = next(tmp_path.glob(f"beats.{job}.*"))
    quick.kill_slurmd(node)
    count = len(lines(beats))
    quick.wait_for(lambda: len(lines(beats)) > count + 2)
    quick.boot(node)
    assert quick.job(job)["JobState"] == "RUNNING"


def test_names_of_nodes_are_checked(quick: Lab) -> None:
    done = quick.cluster("node", "node9", "boot")
    assert done.returncode == 1
    assert done.stderr == "cluster: there is no node9: the nodes are node1, node2, node3, node4\n"


# damage to the cluster itself


def test_a_dead_controller_is_started_again_with_its_jobs(quick: Lab) -> None:
    job = quick.sbatch("--hold", "--output=/dev/null", "--wrap=true")
    submitted = time.time()
    quick.wait_for(lambda: (quick.folder / "state" / "job_state").stat().st_mtime > submitted)
    for pid, command in processes_of(quick).items():
        if command in ("slurmctld", "munged"):
            os.kill(pid, signal.SIGKILL)
    assert "repaired" in quick.cluster("up").stderr
    assert quick.job(job)["JobState"] == "PENDING"
    assert set(quick.states().values()) == {"idle"}


@pytest.mark.parametrize("mode", ["auto", "ports"])
def test_an_up_that_was_killed_is_no_obstacle(empty: Lab, mode: str) -> None:
    for follow in ("up", "down"):
        argv = [CLUSTER / "up", "--mode", mode, "--state", empty.folder]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            empty.wait_for((empty.folder / "munge.key").exists)
            process.kill()
        assert json.loads((empty.folder / "cluster.json").read_text())["complete"] is False
        done = empty.cluster(follow, *(["--mode", mode] if follow == "up" else []))
        assert done.returncode == 0, done.stderr
        if follow == "up":
            assert empty.run("srun", "--nodes=4", "true").returncode == 0
            empty.down()
    assert processes_of(empty) == {}
    assert links_of(empty) == []


# down


@pytest.mark.parametrize("mode", ["auto", "ports"])
def test_down_leaves_nothing(empty: Lab, tmp_path: Path, mode: str) -> None:
    empty.up("--mode", mode)
    stray = "setsid --fork sleep 86399; echo > strayed; trap '' TERM; while :; do sleep 1; done"
    empty.sbatch(f"--chdir={tmp_path}", "--output=/dev/null", f"--wrap={stray}")
    empty.wait_for((tmp_path / "strayed").exists)
    assert "sleep" in processes_of(empty).values()
    assert bool(links_of(empty)) == (empty.mode == "namespaces")
    empty.down()
    assert processes_of(empty) == {}
    assert links_of(empty) == []
    assert not empty.folder.exists()
    assert empty.cluster("down").stderr == f"cluster: there is none in {empty.folder}\n"


def test_down_ends_a_cluster_whose_folder_was_cleared_away(empty: Lab) -> None:
    empty.up("--nodes", "1")
    shutil.rmtree(empty.folder)
    assert "was gone" in empty.cluster("down").stderr
    assert processes_of(empty) == {}
    assert links_of(empty) == []


def test_it_goes_with_the_process_that_it_was_for(empty: Lab) -> None:
    with subprocess.Popen(["sleep", "600"]) as owner:
        done = empty.cluster("up", "--nodes", "1", "--for", str(owner.pid))
        assert done.returncode == 0, done.stderr
        assert processes_of(empty)
        owner.kill()
    deadline = time.monotonic() + 20
    while processes_of(empty) or empty.folder.exists():
        assert time.monotonic() < deadline, processes_of(empty)
        time.sleep(0.05)


def test_side_by_side_on_ports(empty: Lab, tmp_path: Path) -> None:
    empty.up("--mode", "ports", "--nodes", "2")
    done = empty.cluster("node", "node1", "cut")
    assert done.returncode == 1
    assert done.stderr == "cluster: node1 has no network of its own to cut: this cluster runs in ports mode\n"
    job = empty.sbatch("--nodelist=node1", f"--chdir={tmp_path}", script(tmp_path, BEATING))
    empty.wait_for(lambda: lines(tmp_path / f"starts.{job}"))
    assert "slurm_script" in processes_of(empty).values()
    empty.kill("node1")
    assert "slurm_script" not in processes_of(empty).values()
    empty.boot("node1")
    assert empty.run("srun", "--nodes=2", "--overlap", "printenv", "SLURM_NODEID").stdout.split() in (
        ["0", "1"],
        ["1", "0"],
    )
