"""A real Slurm cluster for tests: brought up and down, asked, and damaged by the commands that people use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CLUSTER = Path(__file__).parents[2] / "slurm" / "cluster"

UNAVAILABLE = 69
"""Exit code of `up` where Slurm cannot run on this machine."""

SECONDS = 60
_FIELD = re.compile(r"(?:^| )([A-Z][\w/:]*)=")


class LabUnavailableError(Exception):
    """There can be no cluster on this machine; the message says why."""


class Lab:
    """One cluster in a folder of its own."""

    def __init__(self) -> None:
        # short, because Slurm's sockets are in it
        self.folder = Path(tempfile.mkdtemp(prefix="trimtab-lab-", dir="/tmp"))

    # the cluster

    def cluster(self, command: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """Runs `up`, `down` or `node` for this folder; its exit code is the caller's to look at."""
        return subprocess.run(
            [CLUSTER / command, *argv, "--state", self.folder], capture_output=True, text=True, check=False, timeout=300
        )

    def up(self, *options: str) -> str:
        """What `up` says. Raises LabUnavailableError where this machine cannot have a cluster.

        The cluster goes with this process, even if that is killed.
        """
        done = self.cluster("up", "--for", str(os.getpid()), *options)
        if done.returncode == UNAVAILABLE:
            raise LabUnavailableError(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
        return done.stderr.strip()

    def down(self) -> None:
        done = self.cluster("down")
        assert done.returncode == 0, done.stderr

    @property
    def environment(self) -> dict[str, str]:
        """For a process that uses this cluster: this process's own environment and where the cluster is."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "TRIMTAB_LAB": str(self.folder)}

    @property
    def mode(self) -> str:
        """`namespaces`, or `ports`, where nodes cannot be cut off and all have the machine's hostname."""
        done = self.run("scontrol", "show", "config")
        return "namespaces" if re.search(r"^SlurmctldHost\[0\] *= ctl\(", done.stdout, re.MULTILINE) else "ports"

    # Slurm

    def run(self, *argv: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """Runs a command, at best one of Slurm's, to its end; its exit code is the caller's to look at."""
        settings: dict[str, object] = {"env": self.environment, "timeout": SECONDS} | options
        return subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload,no-any-return]

    def sbatch(self, *argv: str | Path) -> int:
        """Submits a job and returns its id."""
        done = self.run("sbatch", "--parsable", *argv)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def on(self, node: str, *argv: str | Path) -> None:
        """Runs a command on a node."""
        done = self.run("srun", f"--nodelist={node}", "--overlap", *argv)
        assert done.returncode == 0, done.stderr

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says about a job. Raises LookupError if there is none.

        A value may have spaces in it, but no word that reads `Name=`: Slurm does not quote.
        """
        done = self.run("scontrol", "--oneliner", "show", "job", str(job))
        if done.returncode:
            raise LookupError(f"job {job}: {done.stderr.strip()}")
        return parse_fields(done.stdout.strip())

    def states(self) -> dict[str, str]:
        """Node → state, in the words of `sinfo`; a `*` at its end says that it does not answer."""
        done = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T")
        assert done.returncode == 0, done.stderr
        return dict(line.split() for line in done.stdout.splitlines())

    def wait_for(self, predicate: Callable[[], object], seconds: float = SECONDS) -> None:
        """Looks until it is true; fails with what the cluster was doing when the time is up."""
        deadline = time.monotonic() + seconds
        while not predicate():
            if time.monotonic() > deadline:
                seen = self.run("squeue", "--all").stdout + self.run("sinfo", "--Node", "--long").stdout
                raise AssertionError(f"not so within {seconds} s; the cluster:\n{seen}")
            time.sleep(0.1)

    # what can happen to a node

    def cut(self, node: str) -> None:
        """Pulls its network cable; its processes live on."""
        self._node(node, "cut")

    def join(self, node: str) -> None:
        """Puts the cable back."""
        self._node(node, "join")

    def kill(self, node: str) -> None:
        """Ends all its processes at once."""
        self._node(node, "kill")

    def power_off(self, node: str) -> None:
        """Pulls the cable, then ends all its processes."""
        self._node(node, "power-off")

    def kill_slurmd(self, node: str) -> None:
        """Ends its slurmd; the processes of jobs live on."""
        self._node(node, "kill-slurmd")

    def boot(self, *nodes: str) -> None:
        """Starts what is dead of them, plugs them in, and waits until they serve; nothing happens to sound ones."""
        self._node(*nodes, "boot")

    def free_all(self, seconds: float = 90) -> None:
        """Cancels every job, boots what is dead or cut off, and waits until all nodes are idle."""
        self.run("scancel", "--user", str(os.geteuid()))
        done = self.cluster("up")
        assert done.returncode == 0, done.stderr
        self.boot(*self.states())

        def is_free() -> bool:
            jobs = self.run("squeue", "--noheader", "--all", "--format=%A").stdout.split()
            if jobs:
                self.run("scancel", "--quiet", "--full", "--signal=KILL", *jobs)
                self.run("scancel", "--quiet", *jobs)
            return not jobs and set(self.states().values()) == {"idle"}

        self.wait_for(is_free, seconds)

    def close(self) -> None:
        """Brings it down; nothing of it is left, its folder neither."""
        self.down()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _node(self, *arguments: str) -> None:
        done = self.cluster("node", *arguments)
        assert done.returncode == 0, done.stderr


def parse_fields(line: str) -> dict[str, str]:
    """`Name=value Name=value …` as a dictionary."""
    marks = list(_FIELD.finditer(line))
    ends = [mark.start() for mark in marks[1:]] + [len(line)]
    return {mark[1]: line[mark.end() : end].rstrip() for mark, end in zip(marks, ends, strict=True)}
