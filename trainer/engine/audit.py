"""Values that AdamW cannot have produced from the gradients that were applied: traces of corrupted memory.

The bounds. Let G be the largest norm of a gradient as it was applied (after clipping), α the learning rates, S = Σ α,
λ the weight decay, and m₀, v₀, w₀ the largest absolute values in the snapshot before. Both moments are averages with
weights that add up to at most 1, so

    |m| ≤ max(m₀, G)        0 ≤ v ≤ max(v₀, G²).

One step changes a weight by α·|m̂|/(√v̂ + ε) + α·λ·|w|. With r = β₁²/β₂ the Cauchy–Schwarz inequality gives

    |m_t| = (1−β₁)·|Σ β₁ⁱ g_{t−i}| ≤ (1−β₁)/√(1−β₂) · √(Σ_{i<t} rⁱ) · √v_t,

so |m̂|/√v̂ ≤ C = (1−β₁)/√((1−β₂)·(1−r)): the corrections of the bias change nothing, as
(1−rᵗ)·(1−β₂ᵗ) ≤ (1−β₁ᵗ)². For a gradient that comes after zeros alone it is (1−β₁)/√(1−β₂), the bound of Kingma and
Ba (2015, section 2.1, https://arxiv.org/abs/1412.6980); a history before it can exceed that one. So

    |w − w₀| ≤ S·(C + λ·max|w|).

The audit allows `MARGIN` times that, and `MOMENT_MARGIN` times the bounds of the moments: room for rounding, not for an
exponent's high bit. Where there is no snapshot before, only what is not finite or negative under a root is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARGIN = 4.0
MOMENT_MARGIN = 2.0
_ULP = 2.0**-23
_SMALLEST_EPS = 1e-15
"""Below it a second moment that underflows to 0 in fp32 lets a weight move further than the bound says."""

Values = NDArray[Any]


class Updates:
    """What was applied since the training state was last put in or copied.

    Attributes:
        num: updates.
        total_rate: Σ of their learning rates.
        largest_gradient: largest norm of a gradient as it was applied (after clipping): no element exceeds it.
    """

    def __init__(self) -> None:
        self.num = 0
        self.total_rate = 0.0
        self.largest_gradient = 0.0

    def add(self, lr: float, norm: float) -> None:
        """One update with the rate `lr` from a gradient of `norm`."""
        self.num += 1
        self.total_rate += lr
        self.largest_gradient = max(self.largest_gradient, norm)


@dataclass(frozen=True, slots=True)
class Adam:
    """The optimizer's numbers that bound an update."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """The largest of all parameter groups."""

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]]) -> Adam:
        """From the parameter groups of torch's AdamW or DeepSpeed's CPU Adam."""
        first, second = groups[0]["betas"]
        return cls(
            (float(first), float(second)),
            min(float(group["eps"]) for group in groups),
            max(float(group["weight_decay"]) for group in groups),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tensor's elements may be."""

    low: float = -math.inf
    high: float = math.inf
    change: float = math.inf
    """Largest absolute difference to the snapshot before."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the audit of one snapshot, or of one tensor, found."""

    num: int = 0
    """Impossible values."""
    first: str = ""
    """Where the first of them lies, for a person."""


def update_bound(betas: tuple[float, float], eps: float) -> float:
    """C above: the largest |m̂|/(√v̂ + ε) that any gradients can give; infinite where β₁² ≥ β₂ (then nothing bounds it)
    and where ε is too small to cover underflow."""
    first, second = betas
    if first * first >= second or eps < _SMALLEST_EPS:
        return math.inf
    return (1 - first) / math.sqrt((1 - second) * (1 - first * first / second))


def limits_of(key: str, largest_before: float | None, updates: Updates | None, adam: Adam) -> Limits:
    """Limits of the elements of a tensor of the training state.

    Args:
        key: `master`, `exp_avg`, `exp_avg_sq`; of anything else only finiteness is asked.
        largest_before: largest absolute value in the snapshot before; for a moment 0 where it did not exist yet.
        updates: what was applied since; None: there is no snapshot before.
    """
    lowest = 0.0 if key == "exp_avg_sq" else -math.inf
    if updates is None or largest_before is None or not math.isfinite(largest_before):
        return Limits(low=lowest)
    if key == "exp_avg":
        high = MOMENT_MARGIN * max(largest_before, updates.largest_gradient)
        return Limits(-high, high)
    if key == "exp_avg_sq":
        return Limits(0.0, MOMENT_MARGIN * max(largest_before, updates.largest_gradient**2))
    if key != "master":
        return Limits()
    bound = update_bound(adam.betas, adam.eps)
    if updates.num and math.isinf(bound):
        return Limits()
    # where nothing was applied, infinity times a rate of 0 must not be asked for
    free = updates.total_rate * bound if updates.total_rate else 0.0
    largest = largest_before + MARGIN * free
    rounding = 2 * updates.num * _ULP * largest
    change = MARGIN * (free + updates.total_rate * adam.weight_decay * largest) + rounding
    high = largest_before + change
    return Limits(-high, high, change)


def beyond(
    values: Values, extremes: tuple[float, float], limits: Limits, before: Values | None, scratch: Values
) -> bool:
    """Whether any element breaks the limits.

    Args:
        values: [n] fp32, a chunk that lies in the cache.
        extremes: its smallest and its largest element.
        before: the same elements in the snapshot before.
        scratch: [≥ n] fp32, overwritten.
    """
    if not _within(*extremes, limits.low, limits.high):
        return True
    if before is None or math.isinf(limits.change):
        return False
    difference = scratch[: len(values)]
    np.subtract(values, before, out=difference)
    return not _within(float(difference.min()), float(difference.max()), -limits.change, limits.change)


def _within(smallest: float, largest: float, low: float, high: float) -> bool:
    # minimum and maximum of values with a NaN among them are NaN; infinities are never within
    return math.isfinite(smallest) and math.isfinite(largest) and smallest >= low and largest <= high


def impossible_values(values: Values, limits: Limits, before: Values | None) -> tuple[int, int]:
    """(number of elements that break the limits, index of the first). The slow look, once :func:`beyond` says so."""
    with np.errstate(invalid="ignore", over="ignore"):
        good = np.isfinite(values) & (values >= limits.low) & (values <= limits.high)
        if before is not None and math.isfinite(limits.change):
            good &= np.abs(values - before) <= limits.change
    bad = ~good
    return int(bad.sum()), int(bad.argmax())
