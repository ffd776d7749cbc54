"""What the scheduler gave this job: read on its first node from the environment of the batch script."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.errors import LaunchError


@dataclass(frozen=True, slots=True)
class Allocation:
    """One allocation of one job."""

    job: str
    """Id for the scheduler: `123`, or in an array `123_4`."""
    restart: int
    """How often it was requeued before."""
    nodes: tuple[str, ...]
    """Names, in the scheduler's order: this process runs on the first."""
    began: float
    """Unix seconds."""


def read_allocation(
    environment: Mapping[str, str],
    hostnames: Callable[[str], list[str]],
    now: Callable[[], float] = time.time,
) -> Allocation:
    """The allocation of the batch script that this process belongs to.

    Args:
        hostnames: of a list of nodes as Slurm writes it.

    Raises:
        LaunchError: this is no job of one kind of nodes.
    """
    if int(environment.get("SLURM_HET_SIZE", "0") or 0) > 1:
        raise LaunchError(
            "the job has components of different kinds (SLURM_HET_SIZE), and ranks must be alike; submit it as one"
        )
    try:
        nodes = tuple(hostnames(environment["SLURM_JOB_NODELIST"]))
        job = environment["SLURM_JOB_ID"]
    except KeyError as error:
        raise LaunchError(f"{error.args[0]} is not set: this runs in a batch script of `trimtab submit`") from None
    if "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    # newer schedulers say it
    began = environment.get("SLURM_JOB_START_TIME")
    return Allocation(
        job=job,
        # unset, not 0, on the first start
        restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        nodes=nodes,
        began=float(began) if began else now(),
    )


def free_port() -> int:
    """A port of this node that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def usable(nodes: int, fewest: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number of nodes, `fewest` … `nodes`, whose ranks divide the global batch; None: there is none."""
    return next((number for number in range(nodes, fewest - 1, -1) if fits(number)), None)
