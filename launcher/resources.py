"""What this machine has for a run: cores, memory, GPUs. Found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trainer.config.memory import host_memory_total

MIB = 2**20
FIRST_BF16_CAPABILITY = 8.0
"""CUDA compute capability from which tensor cores know bf16 (Ampere)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int
    has_bf16: bool


@dataclass(frozen=True, slots=True)
class Resources:
    """One machine; the plan takes the others of the run to be like it."""

    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    """Host memory that this process may use."""
    gpus: tuple[Gpu, ...] = ()
    """GPUs that the installed torch can use."""
    notes: tuple[str, ...] = ()
    """Why something that is there is not used, one sentence each."""


def detect_resources() -> Resources:
    """Cores and memory within the container's limits, and the visible NVIDIA GPUs."""
    gpus, notes = _gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if gpus and not _torch_has_cuda():
        notes = (*notes, f"{len(gpus)} GPU(s) are not used: the installed torch is built without CUDA")
        gpus = ()
    return Resources(cores=_cores(), memory_bytes=host_memory_total(), gpus=gpus, notes=notes)


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0))
    quota, period = [*_cgroup("cpu.max").split(), "", ""][:2]
    if quota.isdigit() and period.isdigit():
        return max(1, min(allowed, int(quota) // int(period)))
    return allowed


def _cgroup(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="utf-8")
    except OSError:
        return ""


def _gpus(visible: str | None) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    path = shutil.which("nvidia-smi")
    if path is None:
        return (), ()
    query = [path, "--query-gpu=uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        return (), (f"nvidia-smi fails, so GPUs are not known: {type(error).__name__}",)
    return parse_gpus(output, visible), ()


def parse_gpus(output: str, visible: str | None) -> tuple[Gpu, ...]:
    """GPUs in `nvidia-smi`'s table (uuid, name, MiB, compute capability), of which CUDA sees only `visible`.

    As CUDA does, the list ends at the first entry that names no GPU.
    """
    gpus: dict[str, Gpu] = {}
    for line in output.splitlines():
        cells = line.split(", ")
        if len(cells) >= 4 and cells[-2].isdigit():
            uuid, *name, mebibytes, capability = cells
            gpus[uuid] = Gpu(", ".join(name), int(mebibytes) * MIB, float(capability) >= FIRST_BF16_CAPABILITY)
    if visible is None:
        return tuple(gpus.values())
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        entry = entry.strip()
        matches = [gpu for uuid, gpu in gpus.items() if entry and uuid.startswith(entry)]
        if entry.isdigit() and int(entry) < len(gpus):
            matches = [list(gpus.values())[int(entry)]]
        if len(matches) != 1:
            break
        chosen += matches
    return tuple(chosen)


def _torch_has_cuda() -> bool:
    """What torch/version.py says; torch itself would take seconds to import."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None
