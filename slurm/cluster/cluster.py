"""A cluster by its processes: what runs of it, and how each part is started, ended and cut off.

What runs is what the process table says, not what a file says.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import network
import packages
import processes
from plan import CONTROLLER, MUNGE, ClusterError, Plan
from processes import Process, wait_for

START_SECONDS = 30
SERVICE_SECONDS = 90

RUNNING = "running"
WITHOUT_DAEMON = "without its daemon"
DEAD = "dead"

_INIT = Path(__file__).with_name("init.py")


class Cluster:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    # what runs

    def processes(self, member: str) -> list[Process]:
        return processes.members(self.plan.folder).get(member, [])

    def condition(self) -> dict[str, str]:
        """Member → `RUNNING`, `WITHOUT_DAEMON` or `DEAD`."""
        found = processes.members(self.plan.folder)
        result = {MUNGE: RUNNING if MUNGE in found else DEAD}
        for member in self.plan.members:
            group = found.get(member, [])
            has_daemon = any(process.command == _daemon(member) for process in group)
            result[member] = RUNNING if has_daemon else WITHOUT_DAEMON if group else DEAD
        return result

    def cut_off(self) -> list[str]:
        """The nodes whose cable is out."""
        if not self.plan.namespaces:
            return []
        plugged = network.plugged(self._switch())
        return [name for name in self.plan.names if name not in plugged and self.processes(name)]

    def states(self) -> dict[str, str]:
        """Node → state, in Slurm's words; empty while the controller does not answer."""
        done = self.slurm("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T")
        return dict(line.split(maxsplit=1) for line in done.stdout.splitlines()) if done.returncode == 0 else {}

    def slurm(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 (a list, no shell)
            [str(packages.find(program)), *arguments],
            env=_without_slurm() | self.plan.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def last_words(self, name: str) -> str:
        """The end of a log, for a message."""
        log = self.plan.log(name)
        lines = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
        return f"{log} ends with: {' | '.join(lines) or 'nothing'}"

    # parts

    def start_munge(self) -> None:
        folder = self.plan.folder
        path = folder / "munge.sock"
        path.unlink(missing_ok=True)
        files = [f"--socket={path}", f"--key-file={folder}/munge.key", f"--pid-file={folder}/munge.pid"]
        files += [f"--seed-file={folder}/munge.seed", f"--log-file={self.plan.log(MUNGE)}"]
        with self.plan.log(MUNGE).open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 (a list, no shell)
                [str(packages.find("munged")), "--foreground", "--force", "--num-threads=2", *files],
                env=os.environ | processes.mark(MUNGE, folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        wait_for(lambda: _accepts(path) or process.poll() is not None, START_SECONDS, pause=0.01)
        if not _accepts(path):
            raise ClusterError(f"munged did not start: {self.last_words(MUNGE)}")

    def start_init(self, member: str) -> subprocess.Popen[str]:
        """Starts a member's first process, which then waits for `order`."""
        apart = network.isolating(network.uptime()) if self.plan.namespaces else []
        with self.plan.log(f"{member}.out").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 (a list, no shell)
                [*apart, sys.executable, "-I", "-S", str(_INIT)],
                env=_without_slurm() | self.plan.environment | processes.mark(member, self.plan.folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                cwd="/",
            )

    def await_ready(self, member: str, init: subprocess.Popen[str]) -> int:
        """The id of a process in whose network the member lives."""
        assert init.stdout is not None
        if init.stdout.readline() != "ready\n":
            raise ClusterError(f"{member} did not start: {self.last_words(f'{member}.out')}")
        return init.pid

    def order(self, member: str, init: subprocess.Popen[str]) -> None:
        """Has a member that is ready and wired prepare itself and start its daemon."""
        assert init.stdin is not None
        options = [] if member == CONTROLLER else ["-N", member]
        order = {
            "name": member,
            "apart": self.plan.namespaces,
            "folder": str(self.plan.folder),
            "network": "" if member == CONTROLLER else network.at_node(self.plan, member),
            "daemon": [str(packages.find(_daemon(member))), "-D", *options],
        }
        try:
            print(json.dumps(order), file=init.stdin, flush=True)
        except BrokenPipeError:
            raise ClusterError(f"{member} did not start: {self.last_words(f'{member}.out')}") from None

    def await_controller(self) -> None:
        address = (self.plan.address(CONTROLLER), self.plan.port(CONTROLLER))
        if not wait_for(lambda: _accepts(address), START_SECONDS, pause=0.02):
            raise ClusterError(f"slurmctld did not start: {self.last_words(f'{CONTROLLER}.out')}")

    def restart_daemon(self, member: str) -> None:
        """Has a living member's first process start its daemon again."""
        os.kill(self._keeper(member), signal.SIGUSR1)

    # what can happen to a node

    def boot(self, names: list[str]) -> None:
        """Starts what is dead of nodes, all of it or only slurmd, plugs them in, and waits until they serve."""
        since = {name: self._start(name) for name in names}
        for name, moment in since.items():
            self.await_service(name, moment)

    def _start(self, name: str) -> float:
        """Returns the time since which the node's slurmd must have been started to be the present one."""
        condition = self.condition()[name]
        moment = 0.0
        if condition != RUNNING:
            # Slurm tells the starts of a slurmd apart by the second
            moment = self._served_since(name) + 1
            wait_for(lambda: time.time() >= moment, 2, pause=0.01)
        if condition == DEAD:
            init = self.start_init(name)
            pid = self.await_ready(name, init)
            if self.plan.namespaces:
                network.rewire(self.plan, self._switch(), name, pid)
            self.order(name, init)
        elif condition == WITHOUT_DAEMON:
            self.restart_daemon(name)
        if self.plan.namespaces:
            network.plug(self._switch(), name, connected=True)
        return moment

    def await_service(self, name: str, moment: float = 0.0) -> None:
        """Waits until Slurm gives work to a node whose slurmd has started since `moment`; resumes it if needed."""

        def serves() -> bool:
            state = self._fields(name).get("State", "UNKNOWN")
            flags = set(state.replace("*", "+NOT_RESPONDING").split("+"))
            if self._served_since(name) < moment:
                return False
            if flags & {"DOWN", "DRAIN"}:
                self.slurm("scontrol", "update", f"nodename={name}", "state=resume")
            return not flags & {"DOWN", "DRAIN", "NOT_RESPONDING", "UNKNOWN", "FUTURE", "REBOOT"}

        if not wait_for(serves, SERVICE_SECONDS, pause=0.1):
            raise ClusterError(f"{name} is not in service after {SERVICE_SECONDS} s: {self.last_words(f'{name}.out')}")

    def _fields(self, name: str) -> dict[str, str]:
        """What Slurm says about a node; empty while the controller does not answer."""
        done = self.slurm("scontrol", "--oneliner", "show", "node", name)
        return {} if done.returncode else dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def _served_since(self, name: str) -> float:
        """When the slurmd of a node that last made itself known was started; 0: none has."""
        try:
            return time.mktime(time.strptime(self._fields(name)["SlurmdStartTime"], "%Y-%m-%dT%H:%M:%S"))
        except (KeyError, ValueError):
            return 0.0

    def kill(self, name: str) -> None:
        """Ends every process of a node at once."""
        processes.end(self.plan.folder, name)

    def kill_daemon(self, name: str) -> None:
        """Ends a node's slurmd; what it has started lives on."""
        for process in self.processes(name):
            if process.command == _daemon(name):
                os.kill(process.pid, signal.SIGKILL)

    def plug(self, name: str, *, connected: bool) -> None:
        if not self.plan.namespaces:
            raise ClusterError(f"{name} has no network of its own to cut: this cluster runs in ports mode")
        if not self.processes(name):
            raise ClusterError(f"{name} is dead: boot it")
        network.plug(self._switch(), name, connected=connected)

    def power_off(self, name: str) -> None:
        """Pulls the cable first: nobody hears that its processes end."""
        self.plug(name, connected=False)
        self.kill(name)

    # helpers

    def _switch(self) -> int:
        group = self.processes(CONTROLLER)
        if not group:
            raise ClusterError(
                f"the controller of the cluster in {self.plan.folder} is dead: bring the cluster up again"
            )
        return group[0].pid

    def _keeper(self, member: str) -> int:
        """The process that keeps a member's daemon; in namespaces mode its parent, `unshare`, is the first."""
        group = self.processes(member)
        keepers = [it.pid for it in group if it.parent == group[0].pid] if self.plan.namespaces else [group[0].pid]
        if not keepers:
            raise ClusterError(f"{member} is dying; try again")
        return keepers[0]


def _daemon(member: str) -> str:
    return "slurmctld" if member == CONTROLLER else "slurmd"


def _without_slurm() -> dict[str, str]:
    """This process's environment, less what would change how Slurm's commands act and write."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}


def _accepts(address: Path | tuple[str, int]) -> bool:
    """Whether somebody listens there."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(str(address) if isinstance(address, Path) else address) == 0
