"""Cables and a switch made of namespaces: nothing of it outlives the processes in them.

The switch is a bridge in the controller's network, away from the machine's own firewall. Each node has a cable to it,
the machine has one, and there is no route to anywhere else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from plan import CONTROLLER, SLOTS, ClusterError, Plan, UnavailableError

SWITCH = "lan"
TOOLS = ("ip", "unshare", "nsenter", "mount")


def isolating(uptime: int) -> list[str]:
    """The prefix of a command that gets a machine of its own; it dies with this command."""
    new = ["--net", "--mount", "--uts", "--pid", "--ipc", "--time"]
    # Slurm notices a reboot by the time since boot, which starts at zero in here
    return ["unshare", *new, "--boottime", str(-uptime), "--fork", "--kill-child=KILL", "--mount-proc"]


def uptime() -> int:
    return int(float(Path("/proc/uptime").read_text().split()[0]))


def obstacle() -> str | None:
    """Why nodes cannot have namespaces here; None: they can. Tries what they need in one that is thrown away."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"the command {tool} is missing"
    links = "ip link add name lan0 type bridge && ip link add name one type veth peer name two netns 1"
    trial = f"{links} && mount -t tmpfs tmpfs /dev/shm && echo trial > /proc/sys/kernel/hostname"
    done = _run([*isolating(uptime()), "sh", "-c", trial])
    if done.returncode:
        return f"this machine does not allow it ({' '.join(done.stderr.split()) or 'no reason given'})"
    return None


def claim(switch: int, folder: Path, first: int) -> int:
    """Builds the switch in the network of process `switch` and a cable from it to this machine. Returns the slot.

    The name of the cable is the claim: the kernel gives each name once.
    """
    _batch(switch, f"link set lo up\nlink add name {SWITCH} type bridge\nlink set {SWITCH} up\n")
    for offset in range(SLOTS):
        slot = (first + offset) % SLOTS
        if _run(["ip", "-4", "route", "show", "root", f"10.77.{slot}.0/24"]).stdout.strip():
            continue
        cable = f"link add name uplink type veth peer name trimtab{slot} netns {os.getpid()}"
        done = _run([*_inside(switch), "ip", *cable.split()])
        if done.returncode == 0:
            alias = ["ip", "link", "set", "dev", f"trimtab{slot}", "alias", str(folder)]
            _must(_run(alias))
            return slot
        if "exists" not in done.stderr:
            raise UnavailableError(f"nodes cannot be connected to this machine: {done.stderr.strip()}")
    raise ClusterError(f"all {SLOTS} subnets 10.77.0.0/24 … 10.77.{SLOTS - 1}.0/24 are in use on this machine")


def wire(plan: Plan, switch: int, nodes: dict[str, int]) -> None:
    """Lays the cables between the switch and the networks of the nodes' processes, and puts this machine on it."""
    lines = [f"addr add {plan.address(CONTROLLER)}/24 dev {SWITCH}", f"link set uplink master {SWITCH} up"]
    for name, pid in nodes.items():
        lines += _cable(plan, name, pid)
    _batch(switch, "\n".join(lines) + "\n")
    own = f"addr add {plan.gateway}/24 dev {plan.link}\nlink set {plan.link} up\n"
    _must(_run(["ip", "-batch", "-"], own))


def rewire(plan: Plan, switch: int, name: str, pid: int) -> None:
    """A new cable to a node that was started again."""
    _run([*_inside(switch), "ip", "link", "del", name])  # the old one goes with the old network, at some time
    _batch(switch, "\n".join(_cable(plan, name, pid)) + "\n")


def plug(switch: int, name: str, *, connected: bool) -> None:
    """Pulls a node's cable out of the switch, or puts it back."""
    _batch(switch, f"link set {name} {'up' if connected else 'down'}\n")


def plugged(switch: int) -> set[str]:
    """The nodes whose cables are in the switch."""
    links = json.loads(_run([*_inside(switch), "ip", "-json", "link", "show"]).stdout)
    return {link["ifname"] for link in links if "UP" in link["flags"]}


def at_node(plan: Plan, name: str) -> str:
    """What a node does on its own side, for `ip -batch`."""
    return f"link set lo up\naddr add {plan.address(name)}/24 dev eth0\nlink set eth0 up\n"


def unplug(folder: Path) -> None:
    """Removes this machine's cables of the cluster in `folder`; they would go by themselves, a moment later."""
    if shutil.which("ip") is None:
        return
    for link in json.loads(_run(["ip", "-json", "-details", "link", "show", "type", "veth"]).stdout or "[]"):
        if link.get("ifalias") == str(folder):
            _run(["ip", "link", "del", link["ifname"]])


def _cable(plan: Plan, name: str, pid: int) -> list[str]:
    # the same hardware address at each boot: the others remember it
    hardware = f"02:54:4d:{plan.slot:02x}:00:{plan.names.index(name) + 1:02x}"
    return [
        f"link add name {name} type veth peer name eth0 address {hardware} netns {pid}",
        f"link set {name} master {SWITCH} up",
    ]


def _inside(pid: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{pid}/ns/net"]


def _batch(pid: int, lines: str) -> None:
    _must(_run([*_inside(pid), "ip", "-batch", "-"], lines))


def _run(argv: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, input=text, capture_output=True, text=True, check=False)  # noqa: S603 (a list, no shell)


def _must(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise ClusterError(f"`{' '.join(done.args)}` failed: {done.stderr.strip()}")
