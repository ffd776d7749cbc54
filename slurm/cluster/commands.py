"""The command lines of up, down and node."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import lifecycle
from cluster import Cluster
from plan import MAX_NODES, ClusterError


def up() -> None:
    parser = argparse.ArgumentParser(
        prog="slurm/cluster/up",
        description='Brings up a Slurm cluster on this machine. eval "$(slurm/cluster/up)" lets this shell use it.',
    )
    _with_folder(parser)
    sizes = {
        "nodes": (1, MAX_NODES, "number of nodes"),
        "cpus": (1, 1024, "CPUs that each says it has"),
        "gpus": (0, 64, "fake GPUs that each says it has"),
        "grace": (0, 3600, "seconds that a preempted job has left; Slurm looks every ten"),
    }
    flags = {"cpus": "--cpus-per-node", "gpus": "--gpus-per-node"}
    for name, (low, high, words) in sizes.items():
        flag = flags.get(name, f"--{name}")
        help_text = f"{words} (default: {lifecycle.DEFAULTS[name]})"
        parser.add_argument(flag, dest=name, type=_between(low, high), metavar="N", help=help_text)
    parser.add_argument(
        "--mode",
        choices=("auto", "namespaces", "ports"),
        default="auto",
        help="namespaces: each node a machine of its own (root); ports: side by side (default: what works here)",
    )
    parser.add_argument("--for", dest="owner", type=int, metavar="PID", help="take it down when this process ends")
    parser.add_argument("--no-install", dest="install", action="store_false", help="never install packages")
    options = parser.parse_args()
    wanted = {name: getattr(options, name) for name in sizes}

    def act() -> None:
        with lifecycle.held(options.state, create=True) as folder:
            assert folder is not None
            plan = lifecycle.up(folder, options.mode, wanted, install=options.install)
            if options.owner is not None:
                lifecycle.bind(folder, options.owner)
        print((plan.folder / "env").read_text(), end="")

    _run(act)


def down() -> None:
    parser = argparse.ArgumentParser(
        prog="slurm/cluster/down", description="Ends the cluster, its jobs and its record, and leaves nothing behind."
    )
    _with_folder(parser)
    options = parser.parse_args()

    def act() -> None:
        with lifecycle.held(options.state, create=False) as folder:
            lifecycle.down(folder or lifecycle.located(options.state))

    _run(act)


VERBS: dict[str, tuple[str, Callable[[Cluster, str], None]]] = {
    "cut": ("pull its network cable; its processes live on", lambda it, name: it.plug(name, connected=False)),
    "join": ("put the cable back", lambda it, name: it.plug(name, connected=True)),
    "kill": ("end all its processes at once", Cluster.kill),
    "power-off": ("pull the cable, then end all its processes", Cluster.power_off),
    "kill-slurmd": ("end its slurmd; the processes of jobs live on", Cluster.kill_daemon),
}
BOOT = ("boot", "start what is dead of it, plug it in, wait until it serves")


def node() -> None:
    words = "\n".join(f"  {verb:12} {what}" for verb, what in [*((v, w) for v, (w, _) in VERBS.items()), BOOT])
    parser = argparse.ArgumentParser(
        prog="slurm/cluster/node",
        description=f"Does something to nodes of the cluster.\n\n{words}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="node1, node2, …")
    parser.add_argument("verb", choices=[*VERBS, BOOT[0]], metavar="VERB", help="one of the above")
    _with_folder(parser)
    options = parser.parse_args()

    def act() -> None:
        with lifecycle.held(options.state, create=False) as folder:
            cluster = lifecycle.find(folder or options.state)
            for name in options.names:
                if name not in cluster.plan.names:
                    raise ClusterError(f"there is no {name}: the nodes are {', '.join(cluster.plan.names)}")
            if options.verb == BOOT[0]:
                cluster.boot(options.names)
            else:
                for name in options.names:
                    VERBS[options.verb][1](cluster, name)

    _run(act)


def _with_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        default=lifecycle.default_folder(),
        help="the cluster's folder (default: $TRIMTAB_LAB, or %(default)s)",
    )


def _between(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return number


def _run(act: Callable[[], None]) -> None:
    try:
        act()
    except ClusterError as error:
        lifecycle.say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
