"""Arithmetic of throughput, and the table of peaks."""

import os

import psutil
import pytest

from trainer.config.resolve import Precision
from trainer.records import Timing
from trainer.telemetry.timing import StepTimer, memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA GH200 480GB", "fp16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Quadro P400", "fp32", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_of_a_device(name: str, precision: Precision, teraflops: float | None) -> None:
    peak = peak_flops(name, precision)
    assert (None if peak is None else peak / 1e12) == (None if teraflops is None else pytest.approx(teraflops))


def timer(times: list[float], memory: list[int], peak: float | None) -> StepTimer:
    clock, reads = iter(times), iter(memory)
    return StepTimer(1000, 6e6, peak, read_memory=lambda: next(reads), clock=lambda: next(clock))


def test_an_attempt_is_timed_without_what_lies_between_attempts() -> None:
    # made at 0; attempts 10–12, 20–20.5 and 21–23; memory is read at 12 and, a second later, at 23
    step = timer([0, 10, 12, 20, 20.5, 21, 23], [7, 8, 9], peak=6e9 * 10)
    step.begin()
    assert step.end(0.5) == Timing(2.0, 0.5, 500.0, pytest.approx(500 * 6e6 / 6e10), 7)
    step.begin()
    assert step.end(0.0).memory_bytes == 8
    step.begin()
    assert step.end(0.0).tokens_per_second == 500


def test_memory_is_read_once_a_second_and_utilisation_is_unknown_without_a_peak() -> None:
    step = timer([0, 1, 1.2, 1.3, 1.5, 2.0, 2.2], [7, 8], peak=None)
    seen = []
    for _ in range(3):
        step.begin()
        seen.append(step.end(0.0))
    assert [timing.memory_bytes for timing in seen] == [7, 7, 8]
    assert {timing.flop_utilisation for timing in seen} == {None}


def test_memory_of_this_process() -> None:
    resident = psutil.Process(os.getpid()).memory_info().rss
    assert abs(memory_bytes("cpu") - resident) < resident / 4
