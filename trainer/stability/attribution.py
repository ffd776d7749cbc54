"""Whose fault it was: ranks whose numbers do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from trainer.records import FloatArray, RankStats, StepStats


def changed_ranks(first: StepStats, again: StepStats) -> list[int]:
    """Ranks that computed something else the first time than in the replay of the same batch.

    Where no rank's own numbers differ, the difference arose in the reduction or in the reduced gradient.
    """
    ranks: set[int] = set()
    for before, after in (
        (first.ranks.losses, again.ranks.losses),
        (first.ranks.grad_norms, again.ranks.grad_norms),
        (first.ranks.reduced_norms, again.ranks.reduced_norms),
    ):
        if before.shape == after.shape:
            ranks |= {int(rank) for rank in np.flatnonzero(~_same(before, after))}
    return sorted(ranks)


def odd_ranks(values: FloatArray) -> list[int]:
    """Ranks that differ from the majority; all of them where there is no majority."""
    counts = Counter(values.tolist())
    (common, votes), *others = counts.most_common()
    if others and votes * 2 <= len(values):
        return list(range(len(values)))
    return [rank for rank, value in enumerate(values.tolist()) if value != common]


def bad_ranks(ranks: RankStats) -> list[int]:
    """Ranks whose own loss or own gradient is not finite."""
    bad = ~np.isfinite(ranks.losses) if ranks.losses.size else np.zeros(ranks.grad_norms.shape, dtype=bool)
    if ranks.grad_norms.shape == bad.shape:
        bad = bad | np.isinf(ranks.grad_norms) | np.isnan(ranks.grad_norms)
    return [int(rank) for rank in np.flatnonzero(bad)]


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """ "rank 3 on node07", "ranks 0 on a, 1 on b"."""
    words = [f"{rank} on {hosts[rank]}" if rank < len(hosts) else str(rank) for rank in ranks]
    return ("rank " if len(words) == 1 else "ranks ") + ", ".join(words)


def _same(left: FloatArray, right: FloatArray) -> np.ndarray:
    # two kernels may round differently; a fault is not a rounding
    return np.isclose(left, right, rtol=1e-3, atol=0.0, equal_nan=True)
