"""One channel of the detector: is this value sudden, is it the end of a slow rise? Floats only.

Every number is judged against values that were *accepted* before it. Nothing here remembers a rejected value.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

LEVEL_RATE = 1 / 12
"""Of the usual level: short enough to follow a warm-up, long enough that its own noise is a fifth of the values'."""
SLOPE_RATE = 1 / 32
"""Of the slope of a fall: slower than the level, so that noise does not become slope."""
BASE_RATE = 1 / 100
"""Of the level that drift is measured from: of a rise over 40 steps it takes up a fifth."""
SCALE_RATE = 1 / 64
"""Of the robust scale: about 128 values count, so that it is known to a tenth."""
MEMORY_RATE = 1 / 128
"""Of the correlation of neighbouring residuals."""
FAMILIAR = 4.0
"""Values that the assumed scale counts as, beside those seen."""
WIDENING = 6.0
"""A threshold is (1 + 6 / values seen) times as wide: no blind steps, but little trust in little knowledge."""
WINSOR = 4.0
"""Residuals beyond 4 σ count as 4 σ in the scale and in the CUSUM: one outlier widens nothing and is no drift."""
SLACK = 0.5
"""The CUSUM's allowance, in σ. With a height of 12, independent normal noise gives one false alarm in a million steps
(Siegmund 1985: (e^(2k(h + 1.166)) − …) / 2k²)."""
MAX_CORRELATION = 0.8
"""Of neighbouring residuals that the CUSUM allows for: a drift correlates them too and must not hide itself."""
LEAST_LAG = 1.0
"""The base of drift stays at most 1 σ above the level: after a fall, a rise shows soon."""
SIGMAS_OF_DEVIATION = math.sqrt(math.pi / 2)
"""Standard deviation of a normal distribution over its mean absolute deviation."""
LEAST_RATIO = 1e-3
"""A logarithmic channel takes any value below a thousandth of the usual one as that thousandth."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What differs between kinds of channels; σ in units of y: log of the value, or the value over the unit."""

    scale: Literal["log", "linear"]
    floor: float
    """Least σ."""
    first: float
    """σ that is assumed before any value was seen."""


class Channel:
    """Level, slope, scale and CUSUM of one series of numbers.

    `unit` makes linear channels comparable (the usual loss, for its parts); logarithmic ones need none.
    """

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.logarithmic = tuning.scale == "log"
        self.count = 0
        self.level = 0.0
        self.slope = 0.0
        self.base = 0.0
        self.deviation = tuning.first / SIGMAS_OF_DEVIATION
        self.correlation = 0.0
        self.residual = 0.0
        self.recent: tuple[float, ...] = ()
        self.height = 0.0
        self.zero_step = 0

    @property
    def usual(self) -> float:
        """The value expected next; NaN before anything is known."""
        return self._value(self._expected) if self.count else math.nan

    @property
    def usual_before_drift(self) -> float:
        """What a drift is measured from; NaN before anything is known."""
        return self._value(self.base) if self.count else math.nan

    def sigma(self, unit: float = 1.0) -> float:
        """Robust standard deviation of y now in force."""
        floor = self.tuning.floor * (1.0 if self.logarithmic else unit)
        return max(SIGMAS_OF_DEVIATION * self.deviation, floor)

    def score(self, value: float, unit: float = 1.0) -> float:
        """Robust standard deviations above what was expected; 0 while nothing is known, NaN for a NaN or an infinity."""
        if not math.isfinite(value):
            return math.nan
        if not self.count:
            return 0.0
        return (self._y(value) - self._expected) / (self.sigma(unit) * (1 + WIDENING / self.count))

    def rise(self, value: float, unit: float = 1.0) -> float:
        """y above what was expected; 0 while nothing is known."""
        return (self._y(value) - self._expected) / (1.0 if self.logarithmic else unit) if self.count else 0.0

    def climb(self, value: float, unit: float = 1.0) -> float:
        """Height of the CUSUM with this value; NaN for a NaN or an infinity."""
        if not math.isfinite(value):
            return math.nan
        if not self.count:
            return 0.0
        correlation = min(max(self.correlation, 0.0), MAX_CORRELATION)
        sigma = self.sigma(unit) * math.sqrt((1 + correlation) / (1 - correlation)) * (1 + WIDENING / self.count)
        step = (self._y(value) - self.base) / sigma
        return max(0.0, self.height + min(max(step, -WINSOR), WINSOR) - SLACK)

    def accept(self, step: int, value: float, unit: float = 1.0) -> None:
        """Take a value into the history; one that is not finite never enters."""
        if not math.isfinite(value):
            return
        if not self.logarithmic:
            pass
        elif value < 0:
            self._become_linear()
        y = self._y(value)
        if not self.count:
            self.count, self.level, self.base, self.recent, self.zero_step = 1, y, y, (y,), step
            return
        self.height = self.climb(value, unit)
        if self.height == 0.0:
            self.zero_step = step
        sigma = self.sigma(unit)
        self.count += 1
        residual = min(max((y - self._expected) / sigma, -WINSOR), WINSOR)
        self.correlation += MEMORY_RATE * (residual * self.residual - self.correlation)
        self.residual = residual
        rate = max(SCALE_RATE, 1 / (self.count + FAMILIAR))
        self.deviation += rate * (abs(residual) * sigma - self.deviation)
        self.recent = (*self.recent[-2:], y)
        self._follow(sorted(self.recent)[len(self.recent) // 2], sigma)

    def adopt(self, values: list[float], unit: float = 1.0) -> None:
        """Take a consistent new level as the usual one: the median of the values; the scale grows to their spread."""
        ys = sorted(self._y(value) for value in values if math.isfinite(value))
        if not ys:
            return
        middle = ys[len(ys) // 2]
        spread = sum(abs(y - middle) for y in ys) / len(ys)
        self.level = self.base = middle
        self.deviation = max(self.deviation, spread)
        self.count = max(self.count, 1)
        self.slope = self.residual = self.height = 0.0
        self.recent = (middle,)

    def state(self) -> dict[str, Any]:
        """Plain JSON; `restore` takes it back exactly."""
        return {
            "logarithmic": self.logarithmic,
            "count": self.count,
            "level": self.level,
            "slope": self.slope,
            "base": self.base,
            "deviation": self.deviation,
            "correlation": self.correlation,
            "residual": self.residual,
            "recent": list(self.recent),
            "height": self.height,
            "zero_step": self.zero_step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name in Channel(self.tuning).state():
            setattr(self, name, state[name])
        self.recent = tuple(state["recent"])

    def packed(self) -> bytes:
        """What the channel judges by, for a fingerprint."""
        return struct.pack(
            "<?2q9d",
            self.logarithmic,
            self.count,
            self.zero_step,
            self.level,
            self.slope,
            self.base,
            self.deviation,
            self.correlation,
            self.residual,
            self.height,
            self.recent[-1] if self.recent else 0.0,
            self.recent[0] if self.recent else 0.0,
        )

    @property
    def _expected(self) -> float:
        return self.level + self.slope

    def _follow(self, y: float, sigma: float) -> None:
        expected = self._expected
        level = expected + max(LEVEL_RATE, 2 / (self.count + 2)) * (y - expected)
        rate = max(SLOPE_RATE, 1 / (self.count + 2))
        self.slope = min(0.0, self.slope + rate * (level - self.level - self.slope))
        self.level = level
        base_rate = max(BASE_RATE, 2 / (self.count + 2))
        self.base = min(self.base + base_rate * (y - self.base), level + LEAST_LAG * sigma)

    def _y(self, value: float) -> float:
        if not self.logarithmic:
            return value
        least = LEAST_RATIO * math.exp(self.level) if self.count else 1e-12
        return math.log(max(value, least, 1e-300))

    def _value(self, y: float) -> float:
        return math.exp(min(y, 700.0)) if self.logarithmic else y

    def _become_linear(self) -> None:
        """A negative value has no logarithm: from here on this channel is judged on a linear scale."""
        size = math.exp(min(self.level, 700.0))
        if self.count:
            self.base, self.recent = math.exp(self.base), tuple(math.exp(y) for y in self.recent)
            self.level, self.slope, self.deviation = size, self.slope * size, self.deviation * size
        self.logarithmic = False
