"""A small plot in braille dots for terminals, and the thinned history that it shows. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_DOTS_WIDE, _DOTS_HIGH = 2, 4
# bit of each dot of a braille character, [column][row from the top] (Unicode block U+2800)
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800


def braille(values: Sequence[float], width: int, height: int) -> list[str]:
    """The finite values as a line from left to right in `height` strings of `width` characters, highest value on top.

    More values than dots are averaged; fewer leave the right side empty. What is not finite leaves a gap.
    """
    columns = width * _DOTS_WIDE
    averages = [_mean(chunk) for chunk in _chunks(values, columns)]
    finite = [value for value in averages if value is not None]
    grid = [[_BLANK] * width for _ in range(height)]
    if finite:
        low, high = min(finite), max(finite)
        rows = height * _DOTS_HIGH
        previous: int | None = None
        for x, value in enumerate(averages):
            if value is None:
                previous = None
                continue
            y = round((high - value) / (high - low) * (rows - 1)) if high > low else rows // 2
            # a steep line is drawn without gaps
            start = y if previous is None else previous + (y > previous) - (y < previous)
            for dot in range(min(start, y), max(start, y) + 1):
                grid[dot // _DOTS_HIGH][x // _DOTS_WIDE] |= _BITS[x % _DOTS_WIDE][dot % _DOTS_HIGH]
            previous = y
    return ["".join(map(chr, row)) for row in grid]


def _chunks(values: Sequence[float], count: int) -> list[Sequence[float]]:
    if len(values) <= count:
        return [[value] for value in values]
    edges = [len(values) * index // count for index in range(count + 1)]
    return [values[start:end] for start, end in pairwise(edges)]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


class History:
    """Values by step in bounded memory: when full, neighbours are averaged in pairs."""

    def __init__(self, capacity: int = 4096):
        self._capacity = capacity
        self._stride = 1
        self._points: list[tuple[int, float]] = []
        self._waiting: list[tuple[int, float]] = []

    def add(self, step: int, value: float) -> None:
        self._waiting.append((step, value))
        if len(self._waiting) < self._stride:
            return
        self._points.append(_merged(self._waiting))
        self._waiting = []
        if len(self._points) >= self._capacity:
            self._points = [_merged(self._points[at : at + 2]) for at in range(0, len(self._points), 2)]
            self._stride *= 2

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`."""
        self._points = [point for point in self._points if point[0] <= step]
        self._waiting = [point for point in self._waiting if point[0] <= step]

    def values(self) -> list[float]:
        waiting = [_merged(self._waiting)] if self._waiting else []
        return [value for _, value in [*self._points, *waiting]]


def _merged(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    mean = _mean([value for _, value in points])
    return points[-1][0], math.nan if mean is None else mean
