"""What the machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.resources import Gpu, detect_resources, parse_gpus

TABLE = """\
GPU-aaaa1111, NVIDIA H100 80GB HBM3, 81559, 9.0
GPU-bbbb2222, Tesla V100, SXM2, 32768, 7.0
GPU-bbbb3333, NVIDIA A100-SXM4-40GB, 40960, 8.0
"""
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, True)
V100 = Gpu("Tesla V100, SXM2", 32768 * 2**20, False)
A100 = Gpu("NVIDIA A100-SXM4-40GB", 40960 * 2**20, True)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (H100, V100, A100)),
        ("", ()),
        ("-1", ()),
        ("2,0", (A100, H100)),
        ("0,7,1", (H100,)),
        ("GPU-aaaa", (H100,)),
        ("GPU-bbbb", ()),
        ("GPU-bbbb3333, 1", (A100, V100)),
    ],
)
def test_the_gpus_that_cuda_sees(visible, expected):
    assert parse_gpus(TABLE, visible) == expected


def test_lines_that_are_no_gpu_are_passed_over():
    assert parse_gpus("No devices were found\n\nGPU-1, Thor, [N/A], 11.0\n", None) == ()


def test_this_machine_has_cores_and_memory():
    resources = detect_resources()
    assert 1 <= resources.cores <= (os.cpu_count() or 1)
    assert 2**28 < resources.memory_bytes < 2**50


def fake_driver(folder: Path, script: str) -> dict[str, str]:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:/usr/bin:/bin"}


def detect(environment: dict[str, str], *path: str) -> str:
    code = "from launcher.resources import detect_resources as d; r = d(); print(r.gpus, r.notes, sep='|')"
    environment = environment | {"PYTHONPATH": os.pathsep.join([*path, str(Path.cwd())])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_gpus_that_this_torch_cannot_use_are_left_out_and_said(tmp_path):
    environment = fake_driver(tmp_path, "echo 'GPU-1, NVIDIA A100-SXM4-40GB, 40960, 8.0'")
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("raise ImportError('nothing here may import torch')")
    (torch / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = None\n")
    said = "('1 GPU(s) are not used: the installed torch is built without CUDA',)"
    assert detect(environment, str(tmp_path)) == f"()|{said}"

    (torch / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    assert detect(environment, str(tmp_path)) == f"({A100!r},)|()"


def test_a_driver_that_fails_is_said(tmp_path):
    environment = fake_driver(tmp_path, "exit 9")
    assert detect(environment) == "()|('nvidia-smi fails, so GPUs are not known: CalledProcessError',)"
