"""Seconds, tokens per second, FLOP utilisation and memory of an attempt. Loads torch only on a GPU."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Final

import psutil

from trainer.config.resolve import Device, Precision
from trainer.records import Timing

_MEMORY_EVERY_SECONDS = 1.0

# Dense peak FLOP/s in matrix products with fp32 accumulation, from the vendors' datasheets: (bf16 or fp16, fp32).
# `fp32` is the plain fp32 rate, since PyTorch leaves TF32 off for matrix products. First match wins.
_PEAKS: Final[tuple[tuple[str, float, float], ...]] = (
    (r"GB200|GB300", 2500e12, 80e12),
    (r"B300", 2250e12, 75e12),
    (r"B200", 2250e12, 75e12),
    (r"GH200|H200", 989e12, 67e12),
    (r"H100.*PCIe", 756e12, 51e12),
    (r"H100.*NVL", 835e12, 60e12),
    (r"H100|H800", 989e12, 67e12),
    (r"H20\b", 148e12, 44e12),
    (r"A100|A800", 312e12, 19.5e12),
    (r"A40\b", 149.7e12, 37.4e12),
    (r"A30\b", 165e12, 10.3e12),
    (r"A10G", 70e12, 35e12),
    (r"A10\b", 125e12, 31.2e12),
    (r"L40S", 362e12, 91.6e12),
    (r"L40\b", 181e12, 90.5e12),
    (r"L4\b", 121e12, 30.3e12),
    (r"V100.*PCIe", 112e12, 14e12),
    (r"V100", 125e12, 15.7e12),
    (r"\bT4\b", 65e12, 8.1e12),
    (r"RTX 5090(?! (?:D|Laptop))", 209.5e12, 104.8e12),
    (r"RTX 4090(?! (?:D|Laptop))", 165.2e12, 82.6e12),
    (r"RTX 3090(?! Ti)", 71e12, 35.6e12),
    (r"RTX 6000 Ada", 364.2e12, 91.1e12),
    (r"MI355X", 2500e12, 157.3e12),
    (r"MI300X|MI325X", 1307.4e12, 163.4e12),
    (r"MI300A", 980.6e12, 122.6e12),
    (r"MI250X", 191.5e12, 47.9e12),  # one of its two dies: that is what PyTorch calls a device
)
# V100, T4 and earlier have no bf16 units
_NO_BF16 = re.compile(r"V100|\bT4\b")


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense peak FLOP/s of one device, by the name that the driver gives it; None where it is not known (CPUs too)."""
    for pattern, half, full in _PEAKS:
        if re.search(pattern, device_name):
            if precision == "fp32":
                return full
            return None if precision == "bf16" and _NO_BF16.search(device_name) else half
    return None


def memory_bytes(device: Device) -> int:
    """Peak memory allocated on this rank's GPU, or resident memory of this process on CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


class StepTimer:
    """Times attempts: `begin` before asking for the batch, `end` when the update was applied or dropped.

    Reading a device's memory takes longer than the rest together, so it is read once a second at most.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops_of_all_ranks: float | None,
        read_memory: Callable[[], int],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens = tokens_per_step
        self._flops = flops_per_token
        self._peak = peak_flops_of_all_ranks
        self._read_memory = read_memory
        self._clock = clock
        self._begun = clock()
        self._memory = 0
        self._memory_read = float("-inf")

    def begin(self) -> None:
        """An attempt begins."""
        self._begun = self._clock()

    def end(self, seconds_data: float) -> Timing:
        """The attempt is over; `seconds_data` of it went into waiting for data."""
        now = self._clock()
        seconds = max(now - self._begun, 1e-9)
        if now - self._memory_read >= _MEMORY_EVERY_SECONDS:
            self._memory, self._memory_read = self._read_memory(), now
        rate = self._tokens / seconds
        return Timing(
            seconds=seconds,
            seconds_data=seconds_data,
            tokens_per_second=rate,
            flop_utilisation=None if self._peak is None else rate * self._flops / self._peak,
            memory_bytes=self._memory,
        )
