"""Where a run is to run → accelerate's config, the commands of every way to start it, their environment. Pure.

Every way runs `python -m trainer RUN` once a rank with the usual variables (RANK, WORLD_SIZE, …); the trainer calls
DeepSpeed itself, so a launcher only launches.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SHUTDOWN_SECONDS = 300
"""Time that a torch-elastic agent leaves its ranks to save after SIGTERM before it kills them (its default: 30)."""

MONITOR_SECONDS = 0.5
"""Time between two looks of the agent at its ranks (its default: 0.1). When it collects a dead one, the kernel forgets
what it died of: until then `trimtab`, which is woken at once, must have asked."""

MULTI_NODE_PORT = 29500
"""Where the ranks of several machines meet. On one machine a free port is found at each start."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the ranks are."""

    nodes: int
    ranks_per_node: int
    device: Literal["cpu", "cuda"]
    threads_per_rank: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, slots=True)
class Variable:
    """A shell variable that is to expand where and when the command runs, on each machine."""

    name: str


Word = str | Variable


@dataclass(frozen=True, slots=True)
class Command:
    """One way to start a run."""

    title: str
    argv: tuple[Word, ...]
    environment: dict[str, Word] = field(default_factory=dict)
    """To be set on top of the caller's."""

    def shell(self) -> str:
        """The command as it is pasted into a shell: whatever is in a path stays text."""
        settings = [f"{name}={_quoted(value)}" for name, value in self.environment.items()]
        return " ".join(settings + [_quoted(word) for word in self.argv])


def _quoted(word: Word) -> str:
    return f'"${word.name}"' if isinstance(word, Variable) else shlex.quote(word)


def accelerate_yaml(layout: Layout) -> str:
    """The file for `accelerate launch --config_file`."""
    on_cpu = layout.device == "cpu"
    port = 0 if layout.nodes == 1 else MULTI_NODE_PORT
    # By accelerate's own MULTI_CPU and NO it would start a single process without an agent: signals would orphan it.
    comment = (
        "# MULTI_GPU is accelerate's name for `one torch-elastic agent a machine`, with use_cpu on CPU too.\n"
        "# The trainer configures DeepSpeed from config.yaml (shown in deepspeed.json); accelerate only launches.\n"
    )
    if layout.nodes > 1:
        comment += (
            "# On each machine: --machine_rank N --main_process_ip FIRST-MACHINE, as `trimtab prepare` shows them.\n"
        )
    return comment + "\n".join(
        [
            "compute_environment: LOCAL_MACHINE",
            "distributed_type: MULTI_GPU",
            f"use_cpu: {'true' if on_cpu else 'false'}",
            f"num_machines: {layout.nodes}",
            f"num_processes: {layout.ranks}",
            "machine_rank: 0",
            f"main_process_port: {port}" + ("  # 0: a free one" if port == 0 else ""),
            "same_network: true",
            "rdzv_backend: static",
            "gpu_ids: all",
            # the trainer's config decides the precision; accelerate's autocast would be a second one
            "mixed_precision: 'no'",
            "dynamo_config: {}",
            "debug: false",
            "",
        ]
    )


def environment(layout: Layout) -> dict[str, str]:
    """What every way to start sets, on top of the caller's environment."""
    settings = {"OMP_NUM_THREADS": str(layout.threads_per_rank)}
    if layout.device == "cpu":
        # without it DeepSpeed looks for accelerators in every process, and warns
        settings["DS_ACCELERATOR"] = "cpu"
    return settings


def accelerate_argv(run: Path, python: str = sys.executable, module: str = "trainer") -> list[str]:
    """`accelerate launch` of `module` with this Python, whatever is on the PATH."""
    launcher = [python, "-m", "accelerate.commands.launch", "--monitor_interval", str(MONITOR_SECONDS)]
    return [*launcher, "--config_file", str(run / "accelerate.yaml"), "-m", module, str(run)]


def ways_to_start(layout: Layout, run: Path, port: int = MULTI_NODE_PORT) -> list[Command]:
    """The same run by other launchers, with the same bits at the end; on several machines once on each.

    Args:
        port: for those that find no free one by themselves.
    """
    several = layout.nodes > 1
    settings: dict[str, Word] = dict(environment(layout))
    agent: dict[str, Word] = settings | {"PET_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
    node, first = Variable("NODE_RANK"), Variable("MASTER_ADDR")
    trainer: Sequence[Word] = ("-m", "trainer", str(run))
    ranks = str(layout.ranks_per_node)

    accelerate: list[Word] = ["accelerate", "launch", "--config_file", str(run / "accelerate.yaml")]
    torchrun: list[Word] = ["torchrun", "--nproc-per-node", ranks]
    deepspeed: list[Word] = ["deepspeed", "--num_gpus", ranks, "--master_port", str(port)]
    if several:
        accelerate += ["--machine_rank", node, "--main_process_ip", first]
        torchrun += ["--nnodes", str(layout.nodes), "--node-rank", node]
        torchrun += ["--master-addr", first, "--master-port", str(port)]
        deepspeed += ["--hostfile", Variable("HOSTFILE"), "--num_nodes", str(layout.nodes)]
        deepspeed += ["--no_ssh", "--node_rank", node, "--master_addr", first]
    else:
        torchrun += ["--standalone"]
    # by default DeepSpeed's launcher adds an argument for the local rank, and starts remote machines over pdsh
    deepspeed += ["--no_local_rank", "--module", "trainer", str(run)]

    tasks = ["--nodes", str(layout.nodes), "--ntasks-per-node", ranks]
    srun: list[Word] = ["srun", *tasks, "--kill-on-bad-exit=1", "python", *trainer]
    return [
        Command("accelerate", (*accelerate, *trainer), agent),
        Command("torchrun", (*torchrun, *trainer), agent),
        Command("deepspeed", tuple(deepspeed), settings),
        Command("srun", tuple(srun), settings),
    ]
