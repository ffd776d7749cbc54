"""Host memory: what there is of it, what snapshots take of it, and whether they fit. Free of torch."""

from __future__ import annotations

from pathlib import Path

import psutil

from trainer.config.schema import RunConfig

SNAPSHOT_BYTES_PER_PARAMETER = 12
"""fp32 weights and Adam's two moments."""
AVERAGE_BYTES_PER_PARAMETER = 4
"""The moving average of the weights, where one is kept."""
RESERVE = 0.1
"""Fraction of what is free that stays free: for data, for files that are being written, for the system."""

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


def copies(config: RunConfig) -> tuple[int, int]:
    """Copies of its training state that a rank holds in host memory: (snapshots to go back to, copies that are being
    saved)."""
    snapshots = 0 if config.snapshots.every is None or config.guard.mode != "act" else config.snapshots.keep
    saving = config.checkpoint
    return snapshots, (saving.background and saving.every is not None) + (saving.memory_every is not None)


def snapshot_bytes(config: RunConfig, num_elements: int, buffer_bytes: int = 0) -> int:
    """Host memory of one rank's copies of its training state once all are taken; 0 where none are.

    (`snapshots.keep` + those that are being saved) × (12 bytes × elements + buffers); 16 bytes with `optim.ema`.

    Args:
        num_elements: parameters whose master weights this rank holds: its partition, under ZeRO 0 all.
        buffer_bytes: of the model's persistent buffers.
    """
    size = SNAPSHOT_BYTES_PER_PARAMETER + (AVERAGE_BYTES_PER_PARAMETER if config.optim.ema is not None else 0)
    return sum(copies(config)) * (size * num_elements + buffer_bytes)


def host_memory_total(cgroup: Path = _CGROUP) -> int:
    """Bytes of host memory that this process may use, the container's limit included."""
    total = int(psutil.virtual_memory().total)
    limit = _number(cgroup / "memory.max")
    return total if limit is None else min(total, limit)


def host_memory_available(cgroup: Path = _CGROUP) -> int:
    """Bytes of these that can be had without swapping. What the kernel can drop (cached files) counts as free."""
    available = int(psutil.virtual_memory().available)
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None:
        return available
    return min(available, max(0, limit - used + _droppable(cgroup)))


def shortage(needed_bytes_per_rank: int, ranks_on_node: int, available: int | None = None) -> str | None:
    """Why so much more does not fit into this host's memory, in one clause; None: it fits.

    Args:
        needed_bytes_per_rank: what each rank of this node is about to take.
        available: bytes on this node. None: what there is now.
    """
    usable = int((1 - RESERVE) * (host_memory_available() if available is None else available))
    needed = needed_bytes_per_rank * ranks_on_node
    if needed <= usable:
        return None
    return f"{needed / _GIB:,.1f} GiB are needed on this host, and {usable / _GIB:,.1f} GiB are free for it"


def _number(path: Path) -> int | None:
    """None where the file is not there or names no number (`max`)."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _droppable(cgroup: Path) -> int:
    try:
        lines = (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
