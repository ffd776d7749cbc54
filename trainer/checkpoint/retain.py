"""Which checkpoints may go. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """A committed checkpoint of this run's history."""

    step: int
    healthy: bool
    """The steps after it are known to have been clean."""


def doomed(checkpoints: Sequence[Kept], keep: int, keep_every: int | None = None) -> list[int]:
    """Steps of the checkpoints to delete, ascending.

    Permanent ones, at multiples of `keep_every`, always stay. Of the others, the rolling ones, `keep` stay: the newest
    of all, then healthy ones before others, newer before older. The newest healthy one of all stays beyond that.
    """
    newest = max((one.step for one in checkpoints), default=None)
    safe = max((one.step for one in checkpoints if one.healthy), default=None)
    rolling = [one for one in checkpoints if not (keep_every and one.step % keep_every == 0)]
    ranked = sorted(rolling, key=lambda one: (one.step == newest, one.healthy, one.step), reverse=True)
    return sorted(one.step for one in ranked[keep:] if one.step not in (newest, safe))
