"""What is usual for the gradient of each parameter: tells which layer grew when something goes wrong."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from trainer.records import FloatArray

FAST_RATE = 1 / 16
"""Follows a growth within tens of steps; one batch moves it by 6 % of its own deviation."""
SLOW_RATE = 1 / 256
"""What was usual a few hundred steps ago: instabilities announce themselves over hundreds of steps."""


class ParameterNorms:
    """Fast and slow averages of the log gradient norm of each parameter, over accepted steps.

    A norm that is not finite, or zero (a frozen layer, an expert that saw no token), leaves its averages as they are.
    """

    def __init__(self, num_parameters: int) -> None:
        self._fast = np.full(num_parameters, np.nan)
        self._slow = np.full(num_parameters, np.nan)
        self._count = 0
        self._complete = False

    def accept(self, norms: FloatArray) -> None:
        """Take the norms of an applied step, [parameters].

        Raises:
            ValueError: there are not as many as parameters.
        """
        if norms.shape != self._fast.shape:
            raise ValueError(f"{self._fast.size} parameters, but the gradient norms are of shape {norms.shape}")
        self._count += 1
        fast_rate, slow_rate = max(FAST_RATE, 1 / self._count), max(SLOW_RATE, 1 / self._count)
        # the smallest and the largest tell about all of them: NaN fails both comparisons
        if self._complete and norms.min() > 0.0 and norms.max() < np.inf:
            logs = np.log(norms)
            self._fast += fast_rate * (logs - self._fast)
            self._slow += slow_rate * (logs - self._slow)
            return
        known = (norms > 0.0) & np.isfinite(norms)
        logs = np.log(np.where(known, norms, 1.0))
        for average, rate in ((self._fast, fast_rate), (self._slow, slow_rate)):
            moved = np.where(np.isnan(average), logs, average + rate * (logs - average))
            np.copyto(average, moved, where=known)
        self._complete = not bool(np.isnan(self._fast).any())

    def usual(self) -> FloatArray:
        """Usual gradient norm, [parameters]; NaN where none was seen. Empty before the first accepted step."""
        return np.exp(self._fast) if self._count else np.zeros(0)

    def growth(self) -> FloatArray:
        """Usual norm lately over that of some hundred steps, [parameters]: 1 is steady. Empty before the first step."""
        return np.exp(self._fast - self._slow) if self._count else np.zeros(0)

    def fingerprint(self) -> int:
        """32 bits of the averages."""
        return zlib.crc32(self._slow.tobytes(), zlib.crc32(self._fast.tobytes()))

    def state(self) -> dict[str, Any]:
        """Plain JSON (null: not seen yet)."""
        return {"count": self._count, "fast": _plain(self._fast), "slow": _plain(self._slow)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`.

        Raises:
            ValueError: it is of another number of parameters.
        """
        fast, slow = _array(state["fast"]), _array(state["slow"])
        if fast.shape != self._fast.shape or slow.shape != self._slow.shape:
            raise ValueError(f"{self._fast.size} parameters, but the saved averages are of {fast.size}")
        self._count, self._fast, self._slow = int(state["count"]), fast, slow
        self._complete = self._count > 0 and not bool(np.isnan(fast).any())


def _plain(values: FloatArray) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _array(values: list[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
