"""How long a rank itself computed for an attempt: without waiting for others, since all wait for the slowest one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.config.resolve import Device

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
"""Nanoseconds that this thread ran, and that it wanted to and had no core (Linux). A thread that waits in a collective
sleeps, and counts in neither."""


class OwnTime:
    """Measures one attempt after the other: `begin`, the forward passes inside `forward`, `end`.

    On CPU all that the main thread computes counts, and what it waited for a core. On a GPU it is the forward passes
    between events on the stream: nothing waits for others there in ZeRO 0, 1 and 2; in ZeRO 3 they wait for each
    other's weights, and a slow rank shows in all.
    """

    def __init__(self, device: Device):
        self._on_gpu = device == "cuda"
        self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """An attempt begins."""
        self._events.clear()
        self._began = _busy_seconds()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass."""
        if not self._on_gpu:
            yield
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def end(self) -> float:
        """Seconds of the attempt. On a GPU the caller has waited for its stream: the gradients' norms are read."""
        if not self._on_gpu:
            return _busy_seconds() - self._began
        return float(sum(first.elapsed_time(last) for first, last in self._events)) / 1000


def _busy_seconds() -> float:
    try:
        ran, waited, _ = _SCHEDSTAT.read_bytes().split()
    except (OSError, ValueError):
        return time.thread_time()
    return (int(ran) + int(waited)) / 1e9
