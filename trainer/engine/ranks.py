"""Which rank this process is, whoever started it, and the process group that it joins."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from trainer.config.resolve import Device
from trainer.errors import LaunchError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Place of this process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def first_slurm_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[003-010,12],login1` → `gpu003`."""
    matched = re.match(r"^([^\[,]+)(?:\[([0-9]+)[^\]]*\])?([^,\[]*)", nodelist)
    if not matched:
        raise LaunchError(f"SLURM_JOB_NODELIST is {nodelist!r}, which names no host; start the run through srun")
    prefix, number, suffix = matched.groups()
    return f"{prefix}{number or ''}{suffix or ''}"


def read_ranks(environment: Mapping[str, str]) -> tuple[Ranks, dict[str, str]]:
    """Rank of this process from its environment, and the variables that `torch.distributed` still needs.

    torchrun, `accelerate launch` and the deepspeed launcher set RANK, WORLD_SIZE and LOCAL_RANK; srun sets
    SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID; with neither, this is the only process.

    Raises:
        LaunchError: the variables contradict each other.
    """

    def number(name: str) -> int:
        try:
            return int(environment[name])
        except KeyError:
            raise LaunchError(f"{name} is not set although other rank variables are; use a launcher") from None
        except ValueError:
            raise LaunchError(f"{name} is {environment[name]!r}, not a number; use a launcher") from None

    if "RANK" in environment:
        ranks = Ranks(number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK"))
        missing: dict[str, str] = {}
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        ranks = Ranks(number("SLURM_PROCID"), number("SLURM_NTASKS"), number("SLURM_LOCALID"))
        missing = {
            "RANK": str(ranks.rank),
            "WORLD_SIZE": str(ranks.world_size),
            "LOCAL_RANK": str(ranks.local_rank),
        }
        if "MASTER_ADDR" not in environment:
            nodelist = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
            missing["MASTER_ADDR"] = first_slurm_host(nodelist)
        if "MASTER_PORT" not in environment:
            # all ranks must derive the same port without talking; jobs beside each other get different ones
            missing["MASTER_PORT"] = str(20_000 + number("SLURM_JOB_ID") % 20_000)
    else:
        ranks = Ranks(0, 1, 0)
        missing = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            missing["MASTER_PORT"] = str(probe.getsockname()[1])
    if not 0 <= ranks.rank < ranks.world_size:
        raise LaunchError(f"rank {ranks.rank} does not lie in a world of {ranks.world_size}; check the launcher")
    return ranks, missing


def join(device: Device, timeout_seconds: float = 1800.0) -> Ranks:
    """Join the process group of the run: gloo on CPU, NCCL on GPUs.

    Side effects: completes the rank variables of `os.environ`, selects DeepSpeed's accelerator and this rank's GPU.
    """
    ranks, missing = read_ranks(os.environ)
    os.environ.update(missing)
    os.environ["DS_ACCELERATOR"] = device
    import torch

    if device == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"rank {ranks.rank} is number {ranks.local_rank + 1} on {socket.gethostname()}, which has "
                f"{torch.cuda.device_count()} GPUs; lower cluster.ranks_per_node"
            )
        torch.cuda.set_device(ranks.local_rank)
    import deepspeed

    # a reduction for inference, never called in training, that DeepSpeed would compile with g++ on every new machine
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return ranks


def leave() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
