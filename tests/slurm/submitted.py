"""Runs on the test cluster, submitted as a user submits them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from lab import Lab
from workspace import Workspace

from launcher.slurm.history import Job, read_jobs
from trainer.config.files import RunFiles

SMALL = ("cluster.threads_per_rank=1", "checkpoint.background=false")
"""Options of the runs that end with the same bits here and there."""

SITE = """
partition: batch
exclusive: false
memory: 1500M
cpus_per_task: 2
signal_seconds: 20
environment: {HF_HUB_OFFLINE: "1"}
preflight: {enabled: false}
"""


@dataclass
class Cluster:
    """A workspace whose runs go to the cluster."""

    lab: Lab
    workspace: Workspace

    @property
    def root(self) -> Path:
        return self.workspace.root

    def site(self, *lines: str) -> None:
        """Settings of the site: the usual ones, with these after them."""
        names = {line.partition(":")[0] for line in lines}
        kept = [line for line in SITE.strip().splitlines() if line.partition(":")[0] not in names]
        (self.root / "site.yaml").write_text("\n".join([*kept, *lines]) + "\n")

    def trimtab(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *arguments],
            cwd=self.root,
            env=self.lab.environment | {"HF_HUB_OFFLINE": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stdout

    def submit(self, *arguments: str) -> int:
        """The id of the job."""
        code, output = self.trimtab("submit", *arguments)
        assert code == 0, output
        found = re.search(r"^submitted (?:job|an array of \d+ jobs) (\d+): ", output, re.MULTILINE)
        assert found, output
        return int(found[1])

    def files(self, name: str = "small") -> RunFiles:
        return RunFiles(Path(os.path.normpath(self.root / "runs" / name)))

    def outcome(self, name: str = "small") -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.files(name).outcome.read_text())
        return result

    def ledger(self, name: str = "small") -> list[dict[str, Any]]:
        try:
            lines = self.files(name).ledger.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith(b"}")]

    def jobs(self, name: str = "small") -> list[Job]:
        return read_jobs(self.files(name))

    def log(self, name: str = "small") -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.files(name).logs.glob("*.log")))

    def is_training(self, start: int, name: str = "small") -> bool:
        """Whether that start has taken a step."""
        return any(record["kind"] == "attempt" and record["start"] == start for record in self.ledger(name))

    def wait_for_training(self, start: int, name: str = "small", seconds: float = 90) -> None:
        self.wait(lambda: self.is_training(start, name), name, seconds)

    def wait(self, predicate: Callable[[], object], name: str = "small", seconds: float = 90) -> None:
        """As the cluster waits; what the run's jobs printed is said where it was in vain."""
        try:
            self.lab.wait_for(predicate, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(name)}") from error

    def wait_until_over(self, job: int | str, name: str = "small", seconds: float = 180) -> None:
        """Until the scheduler has ended the job for good."""

        def is_over() -> bool:
            state = self.lab.run("squeue", "--noheader", "--states=all", "--format=%T", f"--job={job}").stdout.split()
            return not any(each in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED") for each in state)

        self.wait(is_over, name, seconds)

    def ranks(self, name: str = "small") -> list[psutil.Process]:
        """Processes of ranks of a run, on all nodes, in the order in which they were started."""
        run = str(self.files(name).root)
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            line = process.info["cmdline"] or []
            if line[-1:] == [run] and "trainer" in line and "accelerate.commands.launch" not in line:
                found.append(process)
        return sorted(found, key=lambda process: process.info["create_time"])

    def kill_a_rank(self, name: str = "small") -> None:
        os.kill(self.ranks(name)[-1].pid, signal.SIGKILL)


EVENTS = {
    "limit": "its time limit",
    "preempted": "preempted by a higher partition",
    "requeued": "`scontrol requeue`",
    "killed": "SIGKILL to a rank",
    "lost": "a node loses its power",
    "cut": "a node's network is cut, its ranks live on",
    "warned": "USR1 while a checkpoint is written",
}
AT_A_TIME = 2.0
"""Seconds of a step while something is to happen."""


def befall(cluster: Cluster, *site: str, one_by_one: bool = True) -> tuple[int, list[tuple[str, int, float]]]:
    """Submits `small` on two nodes, and lets each of EVENTS befall a start of it, in turn.

    Args:
        one_by_one: else a start loses one of its nodes while the other is cut off.

    Returns:
        The job; and of each event its name, the start, and when it was, in Unix seconds.
    """
    lab, happened = cluster.lab, []

    def note(what: str) -> None:
        happened.append((what, max(record["start"] for record in cluster.ledger()), time.time()))

    last = 6 if one_by_one else 5
    slow = [f'"at(step=1, start={start}).slow({AT_A_TIME}, steps=1000)"' for start in range(1, last + 1)]
    faults = f'faults=[{", ".join(slow)}, "at(step=1, start={last + 1}).warn_while_saving()", '
    # the last save is at the end, and the last evaluation comes after it
    faults += f'"at(step=30, start={last + 2}).warn_while_saving()"]'
    cluster.site("signal_seconds: 30", *site)
    options = (*SMALL, "checkpoint.every=1", faults)
    job = cluster.submit("config.yaml", *options, "--nodes", "2", "--ranks", "1", "--time", "1")

    cluster.wait_for_training(1)
    cluster.wait(lambda: "until the time limit of the job" in cluster.log() or "SIGUSR1: " in cluster.log())
    note("limit")
    cluster.wait(lambda: cluster.jobs()[-1].reason == "stopped" or cluster.is_training(2))
    assert lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=30").returncode == 0
    cluster.wait_for_training(2)
    preempting = lab.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    note("preempted")
    cluster.wait_until_over(preempting)
    cluster.wait_for_training(3)
    assert lab.run("scontrol", "requeue", str(job)).returncode == 0
    note("requeued")
    cluster.wait_for_training(4)
    cluster.kill_a_rank()
    note("killed")
    cluster.wait_for_training(5)
    lab.power_off(cluster.jobs()[-1].nodes[-1])
    note("lost")
    if one_by_one:
        cluster.wait_for_training(6)
    old = cluster.ranks()
    # the first node: there are rank 0, which writes, and what looks after the ranks
    lab.cut(cluster.jobs()[-1].nodes[0])
    note("cut")
    after = 7 if one_by_one else 6
    cluster.wait_for_training(after)
    assert any(process.is_running() for process in old), "ranks that were cut off live on"
    struck = cluster.files().root / "faults.jsonl"
    cluster.wait(lambda: "warn_while_saving" in struck.read_text())
    warning = next(line for line in struck.read_text().splitlines() if "warn_while_saving" in line)
    return job, [*happened, ("warned", after, json.loads(warning)["time"])]
