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
    best: bool = False
    """It was better than all before when it was evaluated."""


def doomed(checkpoints: Sequence[Kept], keep: int, keep_every: int | None = None) -> list[int]:
    """Steps of the checkpoints to delete, ascending.

    Permanent ones, at multiples of `keep_every`, always stay. Of the others, the rolling ones, the newest `keep` stay;
    beyond them the newest healthy one of all, and the oldest one after it: the next to be proven. Without that one, a
    run that saves more often than health is proven would go on with its first healthy checkpoint for ever.

    The newest of the best ones stays, and the newest healthy one of them: a rollback may take away the other.
    """
    safe = max((one.step for one in checkpoints if one.healthy), default=None)
    unproven = [one.step for one in checkpoints if not one.healthy and (safe is None or one.step > safe)]
    stay = {safe, min(unproven, default=None)}
    best = [one for one in checkpoints if one.best]
    for some in (best, [one for one in best if one.healthy]):
        stay.add(max((one.step for one in some), default=None))
    rolling = sorted((one.step for one in checkpoints if not (keep_every and one.step % keep_every == 0)), reverse=True)
    return sorted(step for step in rolling[keep:] if step not in stay)
