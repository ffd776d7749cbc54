"""One channel of the detector: is this value sudden, is it the end of a slow rise? Floats only.

Every number is judged against values that were *accepted* before it. Nothing here remembers a rejected one.
`docs/detector.md` says why, and how often it is wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

NEAR = (1 / 12, 1 / 32, 1.0, 4)
"""For sudden alarms and the scale: rate of the level, rate of its slope, the fraction of the slope that is expected to
go on, and how quickly the first values are followed (the n-th at a rate of 4 / (n + 4)). Short enough to follow a
warm-up, long enough that the level's own noise is a fifth of the values'."""
FAR = (1 / 20, 1 / 100, 0.5, 2)
"""For drift. A curve flattens: with the whole slope the prediction undershoots every bend, and the bend looks like a
drift; with none the level lags above a fall and hides one."""
FIRST_SLOPES = 3
"""The n-th slope is followed at a rate of 3 / (n + 4) at least. The slope of a power law is as 1 / n: an average that
reaches back further keeps too much of the steep beginning."""
FLATTENING = 2.0
"""A fall is forgotten twice as quickly as it is learned: where it ends in a plateau of little noise, the rest of the
slope would look like a drift."""
BASE_RATE = 1 / 200
"""Of the level that drift is measured from: of a rise over 40 steps it takes up a tenth."""
BASE_MARGIN = 0.3
"""The base stays at most 0.3 σ above the far level, so that a rise after a fall shows soon. That is twice the far
level's own noise: with less, noise would ratchet the base down."""
SCALE_RATE = 1 / 64
"""Of the robust scale: about 128 values count, which tells it to a tenth."""
CORRELATION_RATE = 1 / 128
"""Of the correlation of neighbouring residuals."""
MAX_CORRELATION = 0.8
"""That the CUSUM allows for: a drift correlates residuals too and must not hide itself."""
ASSUMED = 4
"""Values that the assumed scale counts as, beside those seen."""
FAMILIAR = 128
"""Values after which the assumed scale is no longer a floor, which sinks linearly until then. In the first steps all
batches are equally hard for a model that knows nothing; their differences show, and the scale grows, as it learns."""
WIDENING = 4
"""Thresholds are (1 + 4 / values seen) times as wide: no blind steps, but little trust in little knowledge."""
WINSOR = 4.0
"""Residuals beyond 4 σ count as 4 σ in the scale and in the CUSUM: one outlier widens nothing and is no drift."""
SLACK = 0.5
"""The CUSUM's allowance a step, in σ: best for a shift of one σ (Page 1954). With a height of 12, independent normal
noise gives one false alarm in a million steps (Siegmund 1985: (e^(2k(h + 1.166)) − 2k(h + 1.166) − 1) / 2k²)."""
LEAST_RATIO = 1e-3
"""On a logarithmic scale any value below a thousandth of the usual one, 0 included, counts as that thousandth."""
LARGEST = 1e150
"""On a linear scale larger values count as this: nothing overflows."""
SIGMAS_OF_DEVIATION = math.sqrt(math.pi / 2)
"""Standard deviation of a normal distribution over its mean absolute deviation."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What differs between kinds of channels. σ is that of the log of the value, or of the value over the unit."""

    scale: Literal["log", "linear"]
    floor: float
    """Least σ."""
    first: float
    """σ that is assumed before any value was seen."""
    spread: float
    """Mean absolute deviation, in the units of σ, up to which rejected values may be called consistent."""


class Follower:
    """A level that follows its values, and the slope of their fall. A fall is expected to go on, a rise never is."""

    def __init__(self, rates: tuple[float, float, float, float]) -> None:
        self._rate, self._slope_rate, self._damping, self._quick = rates
        self.level = 0.0
        self.slope = 0.0

    @property
    def expected(self) -> float:
        """The next value."""
        return self.level + self._damping * self.slope

    def follow(self, y: float, count: int) -> None:
        """Take the `count`-th value; the first ones weigh more."""
        first = self._quick / (count + self._quick)
        level = self.expected + max(self._rate, first) * (y - self.expected)
        slope_rate = max(self._slope_rate, FIRST_SLOPES / (count + 4))
        change = level - self.level - self.slope
        self.slope = min(0.0, self.slope + (FLATTENING if change > 0 else 1.0) * slope_rate * change)
        self.level = level


class Channel:
    """Level, scale and CUSUM of one series of numbers.

    A logarithmic channel becomes linear for good with the first negative value that it accepts; a zero (a batch with
    nothing to predict) says nothing and leaves it as it is. The `unit` of the methods makes linear values comparable:
    the usual loss, for what is added to it.
    """

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.logarithmic = tuning.scale == "log"
        self.count = 0
        """Accepted values."""
        self.near = Follower(NEAR)
        self.far = Follower(FAR)
        self.base = 0.0
        self.deviation = tuning.first / SIGMAS_OF_DEVIATION
        """Average absolute residual."""
        self.correlation = 0.0
        self.residual = 0.0
        """The last one, in σ."""
        self.recent: tuple[float, ...] = ()
        """The last three values: the far level follows their median, the near one too where a value is beyond 4 σ. So
        one freak, however far, moves nothing, and a change that lasts is followed at once."""
        self.height = 0.0
        """Of the CUSUM."""
        self.zero_step = 0
        """Step at which the CUSUM was last 0."""
        self.sampling = 0.0
        """Relative standard error of the present value where it is a mean of few; σ is not believed to be less."""

    @property
    def usual(self) -> float:
        """The value that is expected next; NaN before anything is known."""
        return self._value(self.near.expected) if self.count else math.nan

    @property
    def usual_before_drift(self) -> float:
        """What a drift is measured from; NaN before anything is known."""
        return self._value(self.base) if self.count else math.nan

    def sigma(self, unit: float = 1.0) -> float:
        """Robust standard deviation now in force, of the log or of the value itself."""
        assumed = self.tuning.first * max(0.0, 1 - self.count / FAMILIAR)
        least = max(self.tuning.floor, assumed, self.sampling)
        return max(SIGMAS_OF_DEVIATION * self.deviation, least * self._per(unit))

    def score(self, value: float, unit: float = 1.0) -> float:
        """Robust standard deviations above what was expected; 0 while nothing is known, NaN for what is not finite."""
        if not math.isfinite(value):
            return math.nan
        return (self._y(value) - self.near.expected) / self._width(unit) if self.count else 0.0

    def rise(self, value: float, unit: float = 1.0) -> float:
        """How far a finite value is above what was expected: as logs, or values in units; 0 if unknown."""
        return (self._y(value) - self.near.expected) / self._per(unit) if self.count else 0.0

    def climb(self, value: float, unit: float = 1.0) -> float:
        """Height of the CUSUM with this value; NaN for what is not finite."""
        if not math.isfinite(value):
            return math.nan
        if not self.count:
            return 0.0
        # the variance of a sum of correlated values: as of a first-order autoregression
        correlation = min(max(self.correlation, 0.0), MAX_CORRELATION)
        width = self._width(unit) * math.sqrt((1 + correlation) / (1 - correlation))
        return max(0.0, self.height + _winsorised((self._y(value) - self.base) / width) - SLACK)

    def accept(self, step: int, value: float, unit: float = 1.0, *, highest: float = math.inf) -> None:
        """Take a value into the history; one that is not finite never enters.

        Args:
            highest: of the CUSUM, where its alarm is overruled: else it would alarm for as long as it was high.
        """
        if not math.isfinite(value) or (self.logarithmic and value == 0):
            return
        if self.logarithmic and value < 0:
            self._become_linear()
        y = self._y(value)
        if not self.count:
            self._start(y, unit)
            self.zero_step = step
            return
        self.height = min(self.climb(value, unit), highest)
        if self.height == 0.0:
            self.zero_step = step
        sigma = self.sigma(unit)
        self.count += 1
        residual = _winsorised((y - self.near.expected) / sigma)
        self.correlation += CORRELATION_RATE * (residual * self.residual - self.correlation)
        self.residual = residual
        self.deviation += max(SCALE_RATE, 1 / (self.count + ASSUMED)) * (abs(residual) * sigma - self.deviation)
        self.recent = (*self.recent[-2:], y)
        middle = _median(self.recent)
        self.near.follow(y if abs(residual) < WINSOR else middle, self.count)
        self.far.follow(middle, self.count)
        self.base += max(BASE_RATE, 2 / (self.count + 2)) * (middle - self.base)
        self.base = min(self.base, self.far.level + BASE_MARGIN * sigma)

    def consistent(self, values: Sequence[float], unit: float = 1.0) -> bool:
        """Whether values are finite, close to each other and not rising: a level, not a run that diverges."""
        if not all(math.isfinite(value) for value in values):
            return False
        ys = [self._y(value) for value in values]
        middle = _median(ys)
        allowed = max(self.tuning.spread * self._per(unit), 2 * self.deviation)
        half = len(ys) // 2
        rise = _median(ys[half:]) - _median(ys[:half])
        return sum(abs(y - middle) for y in ys) / len(ys) <= allowed and rise <= allowed

    def adopt(self, values: Sequence[float], unit: float = 1.0) -> None:
        """Take the median of values as the usual level; the scale grows to their spread."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return
        if self.logarithmic and min(finite) < 0:
            self._become_linear()
        ys = [self._y(value) for value in finite]
        middle = _median(ys)
        if not self.count:
            self._start(middle, unit)
        self.deviation = max(self.deviation, sum(abs(y - middle) for y in ys) / len(ys))
        self.near.level = self.far.level = self.base = middle
        self.near.slope = self.far.slope = self.residual = self.height = 0.0
        self.recent = (middle,)

    def pardon(self) -> None:
        """The drift was refuted: the CUSUM starts anew, from the present level."""
        self.height, self.base = 0.0, max(self.base, self.far.level)

    def state(self) -> dict[str, Any]:
        """Plain JSON of finite numbers; `restore` takes it back exactly."""
        return {
            "logarithmic": self.logarithmic,
            "count": self.count,
            "zero_step": self.zero_step,
            "near": [self.near.level, self.near.slope],
            "far": [self.far.level, self.far.slope],
            "base": self.base,
            "deviation": self.deviation,
            "correlation": self.correlation,
            "residual": self.residual,
            "height": self.height,
            "recent": list(self.recent),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.logarithmic, self.count, self.zero_step = state["logarithmic"], state["count"], state["zero_step"]
        self.near.level, self.near.slope = state["near"]
        self.far.level, self.far.slope = state["far"]
        self.base, self.deviation, self.correlation = state["base"], state["deviation"], state["correlation"]
        self.residual, self.height, self.recent = state["residual"], state["height"], tuple(state["recent"])

    def packed(self) -> bytes:
        """All that it judges by, for a fingerprint."""
        floats = (
            *(self.near.level, self.near.slope, self.far.level, self.far.slope, self.base, self.deviation),
            *(self.correlation, self.residual, self.height, *self.recent),
        )
        return struct.pack(f"<?2q{len(floats)}d", self.logarithmic, self.count, self.zero_step, *floats)

    def _start(self, y: float, unit: float) -> None:
        self.count, self.recent = 1, (y,)
        self.near.level = self.far.level = self.base = y
        self.deviation = self.tuning.first * self._per(unit) / SIGMAS_OF_DEVIATION

    def _per(self, unit: float) -> float:
        return 1.0 if self.logarithmic else unit

    def _width(self, unit: float) -> float:
        return self.sigma(unit) * (1 + WIDENING / self.count)

    def _y(self, value: float) -> float:
        if not self.logarithmic:
            return min(max(value, -LARGEST), LARGEST)
        least = math.exp(min(self.near.level, 700.0)) * LEAST_RATIO if self.count else 0.0
        return math.log(max(value, least, 1e-300))

    def _value(self, y: float) -> float:
        return math.exp(min(y, 700.0)) if self.logarithmic else y

    def _become_linear(self) -> None:
        if self.count:
            level, base = self._value(self.near.level), self._value(self.base)
            self.near.slope *= level
            self.far.level, self.far.slope = self._value(self.far.level), self.far.slope * level
            self.near.level, self.base, self.deviation = level, base, self.deviation * level
            self.recent = tuple(self._value(y) for y in self.recent)
        self.logarithmic = False


def _winsorised(residual: float) -> float:
    return min(max(residual, -WINSOR), WINSOR)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
