"""How far a gradient is clipped: to a fixed global norm, to what was usual lately (ZClip), or by tensor (AdaGC)."""

from __future__ import annotations

import math
import zlib
from typing import Any, Literal

import numpy as np

from trainer.records import FloatArray, StepStats

ZCLIP_ALPHA = 0.97
ZCLIP_THRESHOLD = 2.5
ZCLIP_WARMUP = 25
ZCLIP_EPSILON = 1e-6
"""Added to the standard deviation, as the authors' code does."""

ADAGC_RELATIVE = 1.05
ADAGC_BETA = 0.98
ADAGC_WARMUP = 100

_LARGEST = 1e150
"""Of a norm in the averages: its square is still finite."""

Limits = tuple[float, tuple[float, ...] | None]


class Clipper:
    """The limits of one gradient, from the gradients that were applied before it.

    `norm` clips the global norm to `clip`.

    `zclip` (Kumar et al. 2025, https://arxiv.org/abs/2504.02507) keeps exponential averages μ and σ² of the global norm
    g, and where z = (g − μ) / σ exceeds the threshold it clips to μ + (threshold² / z) · σ, its reciprocal rule: the
    further out, the closer to the mean. The clipped norm enters the averages. During the first 25 steps, from which μ
    and σ² start, and where z is small, only `clip` holds.

    `adagc` (Wang et al. 2025, https://arxiv.org/abs/2502.11034, Algorithm 1) keeps for each tensor an average γ of its
    clipped norm and scales its gradient by min(1, 1.05 γ / ‖g‖). During the first 100 steps the gradient is clipped to
    the global norm `clip`, and γ is the least clipped norm. After them we keep the global limit too: scales come
    first, the norm that is then clipped to `clip` is that of the scaled gradient. Unlike the paper, a tensor whose
    gradient was zero learns γ from the first norm that is not: with γ = 0 it would never move again.

    Args:
        clip: largest global norm; 0: no limit of its own.
        num_parameters: length of `StepStats.parameter_norms`.
    """

    def __init__(self, clip: float, clipping: Literal["norm", "zclip", "adagc"], num_parameters: int) -> None:
        self._clip = clip
        self._clipping = clipping
        self._count = 0
        """Accepted steps."""
        self._warmup: list[float] = []
        self._mean = 0.0
        self._variance = 0.0
        self._gamma: FloatArray = np.zeros(num_parameters if clipping == "adagc" else 0)

    def limits(self, stats: StepStats) -> Limits:
        """The global limit (0: none) and the factor on each parameter's gradient (None: all 1). Changes nothing."""
        if self._clipping == "zclip":
            limit = self._zclip(stats.grad_norm)
            if limit is not None:
                return (min(limit, self._clip) if self._clip > 0 else limit), None
        elif self._clipping == "adagc" and self._count >= ADAGC_WARMUP:
            scales = self._adagc(stats.parameter_norms)
            return self._clip, tuple(scales.tolist()) if bool((scales < 1.0).any()) else None
        return self._clip, None

    def accept(self, stats: StepStats) -> None:
        """The gradient was applied within these limits. Norms that are not finite never enter."""
        if self._clipping == "norm" or not math.isfinite(stats.grad_norm):
            return
        if self._clipping == "zclip":
            self._accept_zclip(min(stats.grad_norm, _LARGEST))
        else:
            self._accept_adagc(stats)
        self._count += 1

    def fingerprint(self) -> int:
        """32 bits of what it clips by."""
        head = repr((self._clip, self._clipping, self._count, self._mean, self._variance, self._warmup)).encode()
        return zlib.crc32(self._gamma.tobytes(), zlib.crc32(head))

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "clipping": self._clipping,
            "count": self._count,
            "warmup": list(self._warmup),
            "mean": self._mean,
            "variance": self._variance,
            "gamma": self._gamma.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; the state of another way of clipping says nothing and is left.

        Raises:
            ValueError: it is of another number of parameters.
        """
        if state["clipping"] != self._clipping:
            return
        gamma = np.array(state["gamma"], dtype=np.float64)
        if gamma.shape != self._gamma.shape:
            raise ValueError(f"clipping by tensor: {self._gamma.size} parameters, but the saved state has {gamma.size}")
        self._count, self._warmup = int(state["count"]), [float(norm) for norm in state["warmup"]]
        self._mean, self._variance, self._gamma = float(state["mean"]), float(state["variance"]), gamma

    def _zclip(self, norm: float) -> float | None:
        if self._count < ZCLIP_WARMUP or not math.isfinite(norm):
            return None
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / (deviation + ZCLIP_EPSILON)
        return self._mean + ZCLIP_THRESHOLD**2 / z * deviation if z > ZCLIP_THRESHOLD else None

    def _accept_zclip(self, norm: float) -> None:
        if self._count < ZCLIP_WARMUP:
            self._warmup.append(norm)
            if len(self._warmup) == ZCLIP_WARMUP:
                self._mean = sum(self._warmup) / ZCLIP_WARMUP
                self._variance = sum((seen - self._mean) ** 2 for seen in self._warmup) / ZCLIP_WARMUP
                self._warmup = []
            return
        limit = self._zclip(norm)
        clipped = norm if limit is None else limit
        self._mean = ZCLIP_ALPHA * self._mean + (1 - ZCLIP_ALPHA) * clipped
        self._variance = ZCLIP_ALPHA * self._variance + (1 - ZCLIP_ALPHA) * (clipped - self._mean) ** 2

    def _adagc(self, norms: FloatArray) -> FloatArray:
        limits = ADAGC_RELATIVE * self._gamma
        exceeding = (limits > 0.0) & (norms > limits) & np.isfinite(norms)
        return np.divide(limits, norms, out=np.ones(norms.shape), where=exceeding)

    def _accept_adagc(self, stats: StepStats) -> None:
        norms = stats.parameter_norms
        moved = (norms > 0.0) & np.isfinite(norms)
        if self._count < ADAGC_WARMUP:
            factor = min(1.0, self._clip / stats.grad_norm) if self._clip > 0 and stats.grad_norm > 0 else 1.0
            clipped = factor * norms
            new = np.where(self._gamma > 0.0, np.minimum(self._gamma, clipped), clipped)
        else:
            clipped = self._adagc(norms) * norms
            new = np.where(self._gamma > 0.0, ADAGC_BETA * self._gamma + (1 - ADAGC_BETA) * clipped, clipped)
        self._gamma = np.where(moved, new, self._gamma)
