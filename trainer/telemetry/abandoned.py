"""Curves of what was rolled back: each rollback leaves a TensorBoard run of its own, beside the curve that stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.telemetry.events import EventFile
from trainer.telemetry.ledger import Record

_LIMIT = 8192
"""Points in memory. One of a model of 80 layers takes about 1 kB."""


@dataclass(frozen=True, slots=True)
class _Point:
    step: int
    time: float
    tags: tuple[str, ...]
    values: NDArray[np.float64]


class Abandoned:
    """Remembers the newest points of the curve, and writes those that a rollback takes back into
    `folder/incident-0001`; a second rollback of an incident into `incident-0001-2`, and so on."""

    def __init__(self, folder: Path, limit: int = _LIMIT):
        """`limit`: points that are kept; of a rollback over more than these the newest are written."""
        self._folder = folder
        self._points: deque[_Point] = deque(maxlen=limit)
        self._tags: dict[tuple[str, ...], tuple[str, ...]] = {}

    def add(self, values: Mapping[str, float], step: int, time: float) -> None:
        """One point of the curve, or of an attempt that was not applied."""
        tags = tuple(values)
        tags = self._tags.setdefault(tags, tags)
        self._points.append(_Point(step, time, tags, np.array(list(values.values()), dtype=np.float64)))

    def forget(self, step: int) -> None:
        """The run went on from a checkpoint of this step: what came after it will be done again."""
        self._points = deque((point for point in self._points if point.step <= step), self._points.maxlen)

    def rewind(self, record: Record) -> None:
        """Writes what the rollback took back."""
        taken = [point for point in self._points if point.step > record["to_step"]]
        self.forget(record["to_step"])
        if not taken:
            return
        file = EventFile(self._unused(record["incident"]))
        for point in taken:
            file.scalars(dict(zip(point.tags, point.values.tolist(), strict=True)), point.step, point.time)
        file.text("1 rolled back", record["reason"], record["from_step"], record["time"])
        file.close()

    def _unused(self, incident: int) -> Path:
        folder, number = self._folder / f"incident-{incident:04}", 1
        while folder.exists():
            number += 1
            folder = self._folder / f"incident-{incident:04}-{number}"
        return folder
