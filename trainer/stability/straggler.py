"""Ranks that are slow, step after step: all others wait for them. Floats only; the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.records import FloatArray
from trainer.stability.attribution import named

WINDOW = 20
"""Steps that are looked back on: what lasts shorter (a checkpoint, a garbage collection, a neighbour's job on the same
machine) costs little."""
SLOW_STEPS = 16
"""Of these in which a rank was slow, for it to be named. One that is so by chance in every fourth step is in 16 of 20
once in three million windows."""
EASED_STEPS = 5
"""Of these at most, once it was named, for it to have recovered."""
FACTOR = 1.3
"""Times the median of the others. All wait for the slowest rank: a run loses at least a fifth of its speed to it, which
is worth another node. Healthy GPUs of one kind are within a few percent of each other."""
SECONDS = 0.02
"""Slower by at least this in a step: below, what a process waits for a core decides."""
LASTING = 20.0
"""Seconds of computing from which on it is worth a word: where steps take milliseconds, 20 of them are over while a
neighbour's job holds a core."""
WARM_UP = 10
"""First steps, which do not count: memory is allocated, kernels are chosen and compiled, caches are cold."""
AGAIN = 1000
"""Steps after which a rank that is still slow is named again."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that has become slow, is still so, or no longer is."""

    rank: int
    recovered: bool
    """It was named before, and keeps up again."""
    slow_steps: int
    """In how many of the last `steps` it was slow."""
    steps: int
    ratio: float
    """Median over these of its seconds over the median of the other ranks'."""
    seconds: float
    """Median over these of the seconds that it took longer than that."""


def sentence(straggler: Straggler, hosts: Sequence[str]) -> str:
    """For a person; `hosts` of each rank, as far as they are known."""
    who = named([straggler.rank], hosts)
    if straggler.recovered:
        return f"{who} keeps up with the others again (computes {straggler.ratio:.2f} times as long as they do)"
    return (
        f"{who} is slow: in {straggler.slow_steps} of the last {straggler.steps} steps it computed clearly longer than "
        f"the others, {straggler.ratio:.2f} times as long as they do; all wait for it, {straggler.seconds:.2g} s a step"
    )


class Stragglers:
    """Names ranks that were slow in many of the last steps, once, and again where it lasts.

    Args:
        num_ranks: of the run.
        window: steps that are looked back on.
        slow_steps: of these in which a rank must have been slow.
        factor: times the median of the others that makes it slow in a step.
        seconds: longer than that median, besides.
        lasting: seconds, as its slowest rank computes, that it must have gone on.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        window: int = WINDOW,
        slow_steps: int = SLOW_STEPS,
        factor: float = FACTOR,
        seconds: float = SECONDS,
        lasting: float = LASTING,
    ) -> None:
        if not 0 < slow_steps <= window or factor < 1 or seconds < 0 or lasting < 0:
            text = f"slow in {slow_steps} of {window} steps, {factor} times, {seconds} s, for {lasting} s: not a rule"
            raise ValueError(text)
        self._window, self._slow_steps, self._factor = window, slow_steps, factor
        self._seconds, self._lasting = seconds, lasting
        self._eased = min(EASED_STEPS, slow_steps - 1)
        self._own = np.full((window, num_ranks), np.nan)
        """Seconds, a row a step."""
        self._others = np.full((window, num_ranks), np.nan)
        """Median of the other ranks' seconds."""
        self._slow = np.zeros((window, num_ranks), dtype=bool)
        self._counts: NDArray[np.int64] = np.zeros(num_ranks, dtype=np.int64)
        self._slow_for = np.zeros(num_ranks)
        """Seconds since a rank was last slow in few of the steps."""
        self._observed = 0
        self._named: dict[int, int] = {}
        """Rank → observation at which it was named last."""

    @property
    def slow(self) -> tuple[int, ...]:
        """Ranks that were named and have not recovered."""
        return tuple(sorted(self._named))

    def observe(self, seconds: FloatArray) -> list[Straggler]:
        """What is new with this step.

        Args:
            seconds: that each rank computed, [ranks]; 0 or not finite where it was not measured. Empty: nobody was.
        """
        if seconds.size != self._counts.size or seconds.size < 2:
            return []
        self._observed += 1
        if self._observed <= WARM_UP:
            return []
        measured = np.isfinite(seconds) & (seconds > 0)
        own = seconds if measured.all() else np.where(measured, seconds, np.nan)
        others = median_of_others(own)
        # a comparison with NaN is false: who was not measured, or has nobody to be compared with, is not slow
        slow = (own > self._factor * others) & (own - others > self._seconds)
        row = self._observed % self._window
        self._counts += slow
        self._counts -= self._slow[row]
        self._own[row], self._others[row], self._slow[row] = own, others, slow
        most = self._counts.max()
        if most <= self._eased and not self._named:
            self._slow_for[:] = 0.0
            return []
        longest = np.nanmax(own, initial=0.0)
        self._slow_for = np.where(self._counts > self._eased, self._slow_for + longest, 0.0)
        return self._news() if most >= self._slow_steps or self._named else []

    def _news(self) -> list[Straggler]:
        found = []
        slow = (self._counts >= self._slow_steps) & (self._slow_for >= self._lasting)
        for rank in np.flatnonzero(slow).tolist():
            if rank not in self._named or self._observed - self._named[rank] >= AGAIN:
                self._named[rank] = self._observed
                found.append(self._straggler(rank, recovered=False))
        for rank in self.slow:
            if self._counts[rank] <= self._eased:
                del self._named[rank]
                found.append(self._straggler(rank, recovered=True))
        return found

    def _straggler(self, rank: int, *, recovered: bool) -> Straggler:
        own, others = self._own[:, rank], self._others[:, rank]
        known = ~np.isnan(own) & ~np.isnan(others)
        # it is slow, or keeps up, in most of them: those alone tell how it is now
        alike = known & (self._slow[:, rank] != recovered)
        own, others = own[alike], others[alike]
        return Straggler(
            rank=rank,
            recovered=recovered,
            slow_steps=int(self._counts[rank]),
            steps=int(known.sum()),
            ratio=float(np.median(own / others)) if own.size else float("nan"),
            seconds=float(np.median(own - others)) if own.size else float("nan"),
        )


def median_of_others(values: FloatArray) -> FloatArray:
    """For each of values, [n], the median of all others; NaN stands for no value, [n]."""
    order = np.argsort(values)  # NaN last
    count = values.size - int(np.isnan(values).sum())
    result = np.full(values.size, np.nan)
    if count < 2:
        return result
    ordered, places = values[order[:count]], np.arange(count)
    # without the value at place p, the k-th is that at k, or at k + 1 from p on
    middle = (count - 1) // 2
    upper = ordered[middle + (places <= middle)]
    if count % 2:
        lower = ordered[middle - 1 + (places <= middle - 1)]
        result[order[:count]] = (lower + upper) / 2
    else:
        result[order[:count]] = upper
    return result
