"""Up and down: a cluster is found running, repaired, or built; and removed without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import network
import packages
import processes
from cluster import DEAD, RUNNING, START_SECONDS, WITHOUT_DAEMON, Cluster
from plan import CONTROLLER, MUNGE, SLOTS, ClusterError, Plan, UnavailableError
from processes import wait_for

DEFAULTS = {"nodes": 4, "cpus": 4, "gpus": 2, "grace": 10}

_LONGEST_FOLDER = 60  # of the 107 characters of a socket's path; Slurm adds the others
_TROUBLESOME = frozenset(" ,;#%@'\"\\$`()[]")  # to Slurm's configuration, to a shell, to `processes`


def say(words: str) -> None:
    print(f"cluster: {words}", file=sys.stderr, flush=True)


def default_folder() -> Path:
    named = os.environ.get("TRIMTAB_LAB")
    if named:
        return Path(named)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "trimtab-lab") if runtime else Path(f"/tmp/trimtab-lab-{os.geteuid()}")  # noqa: S108


def located(folder: Path) -> Path:
    """One name for one folder. A link in its own place is not followed: `held` refuses it."""
    folder = folder.absolute()
    return folder.parent.resolve() / folder.name


@contextlib.contextmanager
def held(folder: Path, *, create: bool) -> Iterator[Path | None]:
    """The folder of a cluster, while no other of these commands works on it; None where there is none."""
    folder = located(folder)
    if len(str(folder)) > _LONGEST_FOLDER or not str(folder).isprintable() or _TROUBLESOME & set(str(folder)):
        raise ClusterError(f"{folder} cannot hold a cluster: at most {_LONGEST_FOLDER} plain characters without spaces")
    while True:
        try:
            if create:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise ClusterError(f"{folder} cannot hold a cluster: {error.strerror}") from error
        try:
            if os.fstat(handle).st_uid != os.geteuid():
                raise ClusterError(f"{folder} belongs to another user; name another folder with --state")
            fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                yield folder
                return
        finally:
            os.close(handle)


def find(folder: Path) -> Cluster:
    """The cluster that was brought up in a folder."""
    loaded = Plan.load(folder)
    if loaded is None or not loaded[1]:
        raise ClusterError(f"there is no cluster in {folder}: bring one up with slurm/cluster/up --state {folder}")
    return Cluster(loaded[0])


def up(folder: Path, mode: str, wanted: dict[str, int | None], *, install: bool) -> Plan:
    """Leaves a running cluster in `folder`. `wanted` has None for what may be as it is."""
    version = packages.ensure(install=install)
    loaded = Plan.load(folder)
    if loaded is not None and loaded[1]:
        plan = loaded[0]
        _refuse_another_shape(plan, mode, wanted)
        if repair(Cluster(plan)):
            return plan
        say("the controller is gone; starting afresh, without its jobs")
    elif loaded is None and any(entry.name != "cluster.json.new" for entry in folder.iterdir()):
        raise ClusterError(f"{folder} is not empty and holds no cluster; name another folder with --state")
    remove(folder, keep_folder=True)
    return build(
        folder, mode, {**DEFAULTS, **{name: value for name, value in wanted.items() if value is not None}}, version
    )


def repair(cluster: Cluster) -> bool:
    """Starts again what has died of a cluster. False: it has no controller's network any more, all is to be built."""
    plan = cluster.plan
    condition = cluster.condition()
    if condition[CONTROLLER] == DEAD:
        return False
    if condition[MUNGE] == DEAD:
        say("starting munged again")
        cluster.start_munge()
    if condition[CONTROLLER] == WITHOUT_DAEMON:
        say("starting slurmctld again")
        cluster.restart_daemon(CONTROLLER)
    cluster.await_controller()
    broken = [name for name in plan.names if condition[name] != RUNNING]
    if broken:
        say(f"booting {', '.join(broken)}")
        cluster.boot(broken)
    cut = cluster.cut_off()
    if condition[CONTROLLER] != RUNNING:
        for name in set(plan.names) - set(cut):
            cluster.await_service(name)
    notes = f"; cut off: {', '.join(cut)}" if cut else ""
    sound = set(condition.values()) == {RUNNING}
    say(f"{'running already' if sound else 'repaired'}: {describe(plan)}{notes}")
    return True


def build(folder: Path, mode: str, shape: dict[str, int], version: tuple[int, int]) -> Plan:
    obstacle = None if mode == "ports" else network.obstacle()
    auto = mode == "auto"
    if mode == "namespaces" and obstacle:
        raise UnavailableError(f"nodes cannot have machines of their own: {obstacle}; take --mode ports")
    if auto:
        mode = "ports" if obstacle else "namespaces"
        if obstacle:
            say(f"nodes share this machine's network and processes: {obstacle}")
    plan = Plan(folder=folder, mode=mode, slot=crc32(os.fsencode(folder)) % SLOTS, **shape)
    plan.save(complete=False)
    plan.prepare()
    try:
        plan = _start(plan, version)
    except BaseException as error:
        processes.end(folder)
        network.unplug(folder)
        if isinstance(error, UnavailableError) and auto and plan.namespaces:
            say(str(error))
            return build(folder, "ports", shape, version)
        raise
    plan.save(complete=True)
    say(f"up: {describe(plan)}")
    return plan


def _start(plan: Plan, version: tuple[int, int]) -> Plan:
    cluster = Cluster(plan)
    inits = {member: cluster.start_init(member) for member in plan.members}
    cluster.start_munge()
    switch = cluster.await_ready(CONTROLLER, inits[CONTROLLER])
    slot = network.claim(switch, plan.folder, plan.slot) if plan.namespaces else _free_ports(plan)
    plan = dataclasses.replace(plan, slot=slot)
    plan.write(version)
    cluster = Cluster(plan)
    nodes = {name: cluster.await_ready(name, inits[name]) for name in plan.names}
    if plan.namespaces:
        network.wire(plan, switch, nodes)
    cluster.order(CONTROLLER, inits[CONTROLLER])
    cluster.await_controller()
    for name in plan.names:
        cluster.order(name, inits[name])

    def all_idle() -> bool:
        for member, init in inits.items():
            if init.poll() is not None:
                raise ClusterError(f"{member} has ended: {cluster.last_words(f'{member}.out')}")
        states = cluster.states()
        return set(states) == set(plan.names) and set(states.values()) == {"idle"}

    if not wait_for(all_idle, START_SECONDS, pause=0.02):
        late = [name for name in plan.names if cluster.states().get(name) != "idle"]
        raise ClusterError(f"{', '.join(late)} did not start: {cluster.last_words(f'{late[0]}.out')}")
    return plan


def remove(folder: Path, *, keep_folder: bool = False) -> int:
    """Ends everything of the cluster in a folder and empties the folder. Returns how many processes ended."""
    ended = processes.end(folder)
    network.unplug(folder)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not keep_folder:
        folder.rmdir()
    return ended


def down(folder: Path) -> None:
    if not folder.exists():  # it may have been cleared away under a running cluster
        ended = processes.end(folder)
        network.unplug(folder)
        say(f"down: {ended} processes ended; {folder} was gone" if ended else f"there is none in {folder}")
        return
    if Plan.load(folder) is None and any(entry.name != "cluster.json.new" for entry in folder.iterdir()):
        raise ClusterError(f"{folder} holds no cluster; it is left as it is")
    ended = remove(folder)
    say(f"down: {ended} processes ended, {folder} removed")


def bind(folder: Path, pid: int) -> None:
    """Has the cluster taken down when a process ends, however that happens."""
    subprocess.Popen(  # noqa: S603 (a list, no shell)
        [sys.executable, "-I", str(Path(__file__).with_name("watch.py")), str(pid), str(folder)],
        env=os.environ | processes.mark("watch", folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def describe(plan: Plan) -> str:
    gpus = f" and {plan.gpus} fake GPUs" if plan.gpus else ""
    nodes = f"{plan.nodes} node{'s' if plan.nodes > 1 else ''} with {plan.cpus} CPUs{gpus}"
    return f"{nodes}, {plan.mode} mode, in {plan.folder}"


def _refuse_another_shape(plan: Plan, mode: str, wanted: dict[str, int | None]) -> None:
    other = [
        f"{name} {getattr(plan, name)}, not {value}"
        for name, value in wanted.items()
        if value not in (None, getattr(plan, name))
    ]
    if mode not in ("auto", plan.mode):
        other.append(f"mode {plan.mode}, not {mode}")
    if other:
        raise ClusterError(f"the cluster in {plan.folder} has {'; '.join(other)}: take it down first")


def _free_ports(plan: Plan) -> int:
    """A range of ports of which none that matters is in use, at best the plan's."""
    for offset in range(SLOTS):
        slot = (plan.slot + offset) % SLOTS
        tried = dataclasses.replace(plan, slot=slot)
        with contextlib.ExitStack() as sockets:
            try:
                for member in plan.members:
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", tried.port(member)))
            except OSError:
                continue
            return slot
    raise ClusterError("no range of ports is free for a cluster")
