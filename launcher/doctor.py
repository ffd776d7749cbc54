"""What this machine offers a run, what will not work on it, and why. Imports none of the packages it reports on."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table
from rich.text import Text

from launcher.resources import Resources, detect_resources

Level = Literal["fine", "note", "wrong"]

GIB = 1024**3
PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "datasets", "tokenizers", "tensorboard")

_MARKS: dict[Level, tuple[str, str]] = {"fine": ("✓", "green"), "note": ("!", "yellow"), "wrong": ("✗", "red")}

_ALL_REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(value)
assert value.item() == 3.0, value
dist.destroy_process_group()
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the machine."""

    topic: str
    text: str
    level: Level = "fine"
    """fine · note: works, but something is missing or slower · wrong: a run fails."""


def examine(folder: Path, environment: Mapping[str, str], deep: bool = False) -> list[Finding]:
    """Everything that can be known without starting a run.

    Args:
        folder: where runs will be written; its disk is what counts.
        deep: start two processes that add a number up over gloo.
    """
    findings = [_python(), *_packages()]
    resources = detect_resources()
    findings += [*_devices(resources), *_processor(resources), _memory(resources), _disk(folder)]
    findings += [_shared_memory(), _open_files(), *_compiler(environment)]
    if deep:
        findings.append(_all_reduce(environment))
    return findings


def _python() -> Finding:
    return Finding("Python", f"{platform.python_version()} ({sys.executable})")


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed: no run can start; `make install`", "wrong"))
    return findings


def _devices(resources: Resources) -> list[Finding]:
    findings = [Finding("GPUs", note, "wrong") for note in resources.notes]
    if not resources.gpus and not findings:
        seen = "nvidia-smi shows none" if shutil.which("nvidia-smi") else "nvidia-smi is not installed"
        findings = [Finding("GPUs", f"none ({seen}): runs use the CPU", "note")]
    for number, gpu in enumerate(resources.gpus):
        text = f"{gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB"
        if gpu.has_bf16:
            findings.append(Finding(f"GPU {number}", text))
        else:
            findings.append(
                Finding(f"GPU {number}", f"{text}: no bf16; precision=auto takes fp32, or set fp16", "note")
            )
    backend = "NCCL between GPUs, gloo on CPU" if resources.gpus else "gloo, on CPU"
    return [*findings, Finding("backends", backend)]


def _processor(resources: Resources) -> list[Finding]:
    total = os.cpu_count() or resources.cores
    others = f" of {total} (the others are not for this process)" if resources.cores < total else ""
    findings = [Finding("cores", f"{resources.cores}{others}")]
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return findings
    if "amx_bf16" in flags:
        findings.append(Finding("bf16 on CPU", "native, in matrix units (AMX): precision=bf16 is fast"))
    elif "avx512_bf16" in flags:
        findings.append(Finding("bf16 on CPU", "native (AVX-512): precision=bf16 is usable"))
    else:
        findings.append(Finding("bf16 on CPU", "emulated: right but slow; leave precision=fp32 here", "note"))
    return findings


def _memory(resources: Resources) -> Finding:
    available = min(psutil.virtual_memory().available, resources.memory_bytes)
    return Finding("memory", f"{available / GIB:.1f} GiB of {resources.memory_bytes / GIB:.1f} GiB available")


def _disk(folder: Path) -> Finding:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    usage = shutil.disk_usage(existing)
    text = f"{usage.free / GIB:.1f} GiB of {usage.total / GIB:.1f} GiB free under {existing}"
    try:
        # permission bits say little for root and on network file systems
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        return Finding("disk", f"{text}, but it is not writable ({error.strerror})", "wrong")
    if usage.free < 2 * GIB:
        return Finding("disk", f"{text}: too little for checkpoints of anything but a tiny model", "note")
    return Finding("disk", text)


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage("/dev/shm")  # noqa: S108 (asking how large it is)
    except OSError:
        return Finding("shared memory", "there is no /dev/shm: NCCL and parallel tokenising need it", "wrong")
    text = f"{usage.free / GIB:.1f} GiB free in /dev/shm"
    if usage.free < GIB:
        return Finding("shared memory", f"{text}: NCCL may fail; in a container, start it with --shm-size=8g", "note")
    return Finding("shared memory", text)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = {resource.RLIM_INFINITY: "unlimited"}
    text = f"{words.get(soft, soft)} (up to {words.get(hard, hard)})"
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return Finding("open files", f"{text}: many ranks and shards need more; `ulimit -n 4096`", "note")
    return Finding("open files", text)


def _compiler(environment: Mapping[str, str]) -> list[Finding]:
    offload = "zero.offload needs DeepSpeed's CPU Adam, which is compiled when it is first used"
    findings = []
    compiler = environment.get("CXX") or "g++"
    if (found := shutil.which(compiler)) is None:
        findings.append(Finding("C++ compiler", f"{compiler} is not there: {offload}; install g++", "note"))
    else:
        findings.append(Finding("C++ compiler", found))
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        findings.append(Finding("ninja", f"not there: {offload}; pip install ninja", "note"))
    else:
        findings.append(Finding("ninja", ninja))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        findings.append(Finding("Python headers", f"{header} is not there: {offload}; install python3-dev", "note"))
    return findings


def _all_reduce(environment: Mapping[str, str]) -> Finding:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    settings = {**environment, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603 (a list, no shell)
            [*argv, sys.executable, "-c", _ALL_REDUCE], capture_output=True, text=True, timeout=120, env=settings
        )
    except subprocess.TimeoutExpired:
        text = "two ranks on this machine did not find each other in 120 s: is loopback blocked?"
        return Finding("all-reduce", text, "wrong")
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "see torchrun by hand")
        return Finding("all-reduce", f"two ranks over gloo failed: {last.strip()}", "wrong")
    return Finding("all-reduce", "two ranks over gloo agree")


def table(findings: list[Finding]) -> Table:
    """The findings as a table; what does not work is marked."""
    result = Table(box=None, show_header=False, pad_edge=False)
    result.add_column()
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.level]
        result.add_row(
            Text(mark, style=style), Text(finding.topic), Text(finding.text, style=style if mark == "✗" else "")
        )
    return result
