"""What a node can find out about itself: devices, memory, disk, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from launcher.resources import MIB, detect_resources
from trainer.config.memory import host_memory_available

T = TypeVar("T")

PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "trimtab")
"""Whose versions must be equal on all nodes, beside Python's."""
DISK_BYTES = 16 * MIB
"""That are written to measure a disk."""
DISK_SECONDS = 5.0
"""After which the measurement takes what was written by then."""
GPU_MIB_IN_USE = 1024
"""A GPU with more memory in use is another process's: an idle one shows some hundred MiB of the driver's."""
SMI_SECONDS = 30.0
"""For nvidia-smi, which hangs where a driver does."""

_CGROUPS = Path("/sys/fs/cgroup")


class NoAnswerError(Exception):
    """It took too long."""


def answered(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns or raises, unless it takes longer: then its thread is left behind.

    Raises:
        NoAnswerError: it did not return in time.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001 (raised again below)
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NoAnswerError
    return results[0]


def memory_available(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of host memory that this process can still have.

    Args:
        cgroups: where the second version of cgroups is mounted.
        membership: says which one this process is in. A limit holds for all below it.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folder = cgroups / own
    places = [place for place in (folder, *folder.parents) if place == cgroups or cgroups in place.parents]
    return min(host_memory_available(place) for place in places or [cgroups])


def shared_memory() -> int | None:
    """Bytes free in /dev/shm; None: there is none."""
    try:
        return shutil.disk_usage("/dev/shm").free  # noqa: S108 (asking how large it is)
    except OSError:
        return None


def disk_speed(folder: Path, num_bytes: int = DISK_BYTES, seconds: float = DISK_SECONDS) -> float:
    """Bytes a second at which a file is written and synced in `folder`.

    Raises:
        OSError: it cannot be written.
    """
    # not zeros: some disks compress
    block = os.urandom(MIB)
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder, prefix=".speed.") as file:
        written = 0
        while written < num_bytes and time.perf_counter() - began < seconds:
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return written / (time.perf_counter() - began)


def versions() -> dict[str, str]:
    """Of Python and of what ranks use, by name; nothing is imported."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def boot_id() -> str:
    """Another after every reboot; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def gpus() -> tuple[int, tuple[str, ...], str]:
    """(number that torch can use, clauses on those that are not free, version of the driver)."""
    resources = detect_resources()
    trouble = resources.notes
    driver = ""
    if (path := shutil.which("nvidia-smi")) is not None:
        in_use, driver = _in_use(path, os.environ.get("CUDA_VISIBLE_DEVICES"))
        trouble = (*trouble, *in_use)
    return len(resources.gpus), trouble, driver


def _in_use(path: str, visible: str | None) -> tuple[tuple[str, ...], str]:
    try:
        cards = _ask(path, "--query-gpu=uuid,memory.used,driver_version")
        processes = _ask(path, "--query-compute-apps=gpu_uuid,pid,process_name")
    except (OSError, subprocess.SubprocessError) as error:
        return (f"nvidia-smi fails, so it is not known whether the GPUs are free: {type(error).__name__}",), ""
    return parse_in_use(cards, processes, visible)


def _ask(path: str, query: str) -> str:
    command = [path, query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout  # noqa: S603


def parse_in_use(cards: str, processes: str, visible: str | None) -> tuple[tuple[str, ...], str]:
    """(a clause for each GPU in use, version of the driver) from nvidia-smi's tables.

    Args:
        cards: uuid, MiB in use, version of the driver.
        processes: uuid of a GPU, id and name of a process on it; those of other containers may be missing.
        visible: of CUDA; None: all.
    """
    rows = [row for line in cards.splitlines() if len(row := line.split(", ")) == 3]
    entries = None if visible is None else [entry.strip() for entry in visible.split(",")]
    holders: dict[str, list[str]] = {}
    for line in processes.splitlines():
        uuid, _, holder = line.partition(", ")
        pid, _, name = holder.partition(", ")
        holders.setdefault(uuid, []).append(f"process {pid} ({name})")
    clauses = []
    for index, (uuid, used, _) in enumerate(rows):
        chosen = entries is None or any(e == str(index) or (e and uuid.startswith(e)) for e in entries)
        if not chosen:
            continue
        whose = f": {', '.join(holders[uuid])}" if uuid in holders else ""
        if uuid in holders or (used.isdigit() and int(used) > GPU_MIB_IN_USE):
            clauses.append(f"GPU {index} is in use ({used} MiB{whose})")
    return tuple(clauses), rows[0][2] if rows else ""
