"""Synthetic loss curves with the shapes and the noise of real ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.records import FloatArray
from trainer.stability.watch import Alarm, Watch

Noise = Callable[[np.random.Generator, int], FloatArray]


def normal(rng: np.random.Generator, n: int) -> FloatArray:
    return rng.standard_normal(n)


def heavy_tailed(rng: np.random.Generator, n: int) -> FloatArray:
    """Student's t with 5 degrees of freedom, at unit variance."""
    return rng.standard_t(5, n) / np.sqrt(5 / 3)


def autocorrelated(rng: np.random.Generator, n: int) -> FloatArray:
    """AR(1) with ρ = 0.5, at unit variance: documents in their order."""
    steps = rng.standard_normal(n) * np.sqrt(0.75)
    noise = np.zeros(n)
    noise[0] = rng.standard_normal()
    for i in range(1, n):
        noise[i] = 0.5 * noise[i - 1] + steps[i]
    return noise


NOISES: dict[str, Noise] = {"normal": normal, "heavy-tailed": heavy_tailed, "autocorrelated": autocorrelated}


def power_law(n: int) -> FloatArray:
    """Log loss: a slow first phase of the warm-up, the steep fall to unigrams, then a power law."""
    t = np.arange(n, dtype=np.float64)
    return np.log(1.9 + 9.0 * np.exp(-((t / 40) ** 1.5)) + 3.0 * (1 + t / 40) ** -0.5)


def induction_drop(n: int) -> FloatArray:
    """A plateau, a fall of a fifth within 30 steps in its middle, a plateau."""
    t = np.arange(n, dtype=np.float64)
    return power_law(n) - 0.2 / (1 + np.exp(-(t - n / 2) / 6))


def decay(n: int) -> FloatArray:
    """Warm-up, stable, decay: the loss falls faster again over the last fifth."""
    t = np.arange(n, dtype=np.float64)
    return power_law(n) - 0.15 * np.clip((t - 0.8 * n) / (0.2 * n), 0, 1)


def plateau(n: int) -> FloatArray:
    return np.full(n, np.log(3.0))


SHAPES: dict[str, Callable[[int], FloatArray]] = {
    "power law": power_law,
    "induction": induction_drop,
    "decay": decay,
    "plateau": plateau,
}


def curve(shape: str, noise: str, sigma: float, seed: int, n: int) -> tuple[FloatArray, FloatArray]:
    """Losses and gradient norms, each [n]. The noise of the loss grows from nothing as the model learns."""
    rng = np.random.default_rng(seed)
    grown = 1.0 if shape == "plateau" else 1 - np.exp(-np.arange(n) / 60)
    losses = np.exp(SHAPES[shape](n) + sigma * grown * NOISES[noise](rng, n))
    norms = np.exp(0.3 * heavy_tailed(rng, n) - 0.5 * np.log1p(np.arange(n) / 50))
    return losses, norms


def alarms_of(watch: Watch, losses: FloatArray, norms: FloatArray, first: int = 1) -> list[tuple[int, Alarm]]:
    """What a run of these values would have alarmed, as (step, worst alarm); alarming values are left out."""
    found = []
    for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), first):
        alarms = watch.look(step, loss, norm)
        if alarms:
            found.append((step, alarms[0]))
            watch.reject(step, loss, norm)
        else:
            watch.accept(step, loss, norm)
    return found
