"""What a cluster is made of: nodes, addresses, files, and the configuration that Slurm reads."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path

CONTROLLER = "ctl"
"""The member that runs slurmctld; in namespaces mode its network holds the switch that connects everything."""

MUNGE = "munge"

MAX_NODES = 64
SLOTS = 64
"""So many clusters fit on one machine side by side: each has a subnet, or a range of ports, of its own."""

MEMORY_MIB = 65536
"""What each node says it has. The nodes share one machine: Slurm counts this memory, nobody enforces it."""

_PORTS_A_SLOT = 200
_FIRST_PORT = 17000  # below the kernel's ephemeral ports, which begin at 32768
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")


class ClusterError(Exception):
    """One sentence: what is wrong and what to do."""

    exit_code = 1


class UnavailableError(ClusterError):
    """Slurm cannot run on this machine as it is."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


@dataclass(frozen=True)
class Plan:
    """One cluster, fully decided; written to DIR/cluster.json."""

    folder: Path
    mode: str
    """`namespaces` or `ports`."""
    nodes: int
    cpus: int
    gpus: int
    grace: int
    """Seconds that a preempted job has left."""
    slot: int

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def members(self) -> list[str]:
        return [CONTROLLER, *self.names]

    @property
    def namespaces(self) -> bool:
        return self.mode == "namespaces"

    @property
    def link(self) -> str:
        """The machine's end of the cable to the switch."""
        return f"trimtab{self.slot}"

    @property
    def gateway(self) -> str:
        """The machine's own address on the switch; nothing is routed beyond it."""
        return f"10.77.{self.slot}.253"

    def address(self, member: str) -> str:
        if not self.namespaces:
            return "127.0.0.1"
        return f"10.77.{self.slot}.{254 if member == CONTROLLER else self.names.index(member) + 1}"

    def port(self, member: str) -> int:
        base = _FIRST_PORT + _PORTS_A_SLOT * self.slot
        return base if member == CONTROLLER else base + 1 + self.names.index(member)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    def log(self, member: str) -> Path:
        return self.folder / "log" / f"{member}.log"

    def save(self, *, complete: bool) -> None:
        values = dataclasses.asdict(self) | {"folder": str(self.folder), "complete": complete}
        new = self.folder / "cluster.json.new"
        new.write_text(json.dumps(values, indent=1) + "\n")
        new.replace(self.folder / "cluster.json")

    @classmethod
    def load(cls, folder: Path) -> tuple[Plan, bool] | None:
        """The plan of the cluster in `folder` and whether it was brought up to the end; None: there is none."""
        try:
            values = json.loads((folder / "cluster.json").read_text())
            complete = values.pop("complete")
            return cls(**values | {"folder": folder}), complete
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ClusterError(f"{folder}/cluster.json is unreadable ({error}); remove {folder} by hand") from error

    def prepare(self) -> None:
        """Makes the folders, and the key by which the members know each other."""
        for name in ("log", "state", "spool", "dev"):
            (self.folder / name).mkdir(exist_ok=True)
        with os.fdopen(os.open(self.folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(os.urandom(128))

    def write(self, version: tuple[int, int]) -> None:
        """Writes what Slurm and its clients read."""
        self.conf.write_text(self._slurm_conf())
        (self.folder / "plugstack.conf").write_text("")
        # from 24.05 on slurmd takes hold of cgroups even where no plugin asks for them
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if version >= (24, 5) else "")
        if self.gpus:
            devices = ",".join(str(device) for device in self._devices())
            nodes = f"NodeName=node[1-{self.nodes}] Name=gpu Type=fake File={devices}"
            (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{nodes}\n")
        if self.namespaces:
            hosts = [f"{self.address(member)} {member}" for member in self.members]
            (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
            (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        named = self.environment | {"TRIMTAB_LAB": str(self.folder)}  # so that node and down mean this cluster
        exports = "".join(f"export {name}='{value}'\n" for name, value in named.items())
        (self.folder / "env").write_text(exports)

    def _devices(self) -> list[Path]:
        """A fake GPU is any character device, each a different one."""
        if os.geteuid() != 0:
            if self.gpus > len(_DEVICES):
                raise ClusterError(f"without root a node has at most {len(_DEVICES)} fake GPUs, not {self.gpus}")
            return [Path("/dev", name) for name in _DEVICES[: self.gpus]]
        paths = [self.folder / "dev" / f"gpu{number}" for number in range(self.gpus)]
        try:
            for path in paths:
                if not path.exists():
                    os.mknod(path, 0o20666, os.makedev(1, 3))
        except PermissionError:  # a container's root may not make devices
            return [Path("/dev", name) for name in _DEVICES[: self.gpus]]
        return paths

    def _slurm_conf(self) -> str:
        folder, user = self.folder, user_name()
        host = CONTROLLER if self.namespaces else socket.gethostname().partition(".")[0]
        srun = self.port(CONTROLLER) + MAX_NODES + 1
        lines = [
            "ClusterName=lab",
            f"SlurmctldHost={host}({self.address(CONTROLLER)})",
            f"SlurmctldPort={self.port(CONTROLLER)}",
            f"SrunPortRange={srun}-{self.port(CONTROLLER) + _PORTS_A_SLOT - 1}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            # the delay before a requeued job starts again is this expiry; below 5 it is 120
            f"AuthInfo=socket={folder}/munge.sock,cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={self.log(CONTROLLER)}",
            f"SlurmdLogFile={folder}/log/%n.log",
            f"PlugStackConfig={folder}/plugstack.conf",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none",
            # far shorter than a site's: 300, 10, 30
            "SlurmdTimeout=10",
            "MessageTimeout=5",
            "KillWait=5",
            "InactiveLimit=0",
            "WaitTime=0",
            "MinJobAge=7200",
            "ReturnToService=1",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,"
            "bf_interval=2,bf_resolution=5,requeue_delay=0",
            "PriorityType=priority/basic",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "DefMemPerCPU=512",
            "JobRequeue=1",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmdParameters=config_overrides",
            "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/filetxt",
            f"JobCompLoc={folder}/jobcomp.log",
        ]
        if not self.namespaces:
            lines.append("CommunicationParameters=NoInAddrAny,NoCtldInAddrAny")
        gres = f" Gres=gpu:fake:{self.gpus}" if self.gpus else ""
        if gres:
            lines.append("GresTypes=gpu")
        for name in self.names:
            place = f"NodeHostname={name if self.namespaces else host} NodeAddr={self.address(name)}"
            size = f"CPUs={self.cpus} RealMemory={MEMORY_MIB}{gres} State=UNKNOWN"
            lines.append(f"NodeName={name} {place} Port={self.port(name)} {size}")
        lines += [
            "PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=UNLIMITED",
            f"PartitionName=batch Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace}",
            "PartitionName=high Default=NO PriorityTier=10 PreemptMode=OFF",
        ]
        return "\n".join([*lines, ""])


def user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as error:
        raise ClusterError(f"user {os.geteuid()} has no name in /etc/passwd, and Slurm wants one") from error
