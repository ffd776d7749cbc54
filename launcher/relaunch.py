"""Whether a run that has ended is started again, and when. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.schema import SupervisionConfig

MAX_BACKOFF_SECONDS = 300.0

WORTH_ANOTHER_START = frozenset({"crashed"})
"""Reasons of an outcome. The others would end the same way (completed, halted, refused), or are meant (stopped,
superseded)."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How one start ended."""

    reason: str
    """Of its outcome."""
    position: int
    """Step that the next start can go on from; 0: the beginning."""
    stop_requested: bool = False
    """Somebody asked the run to stop."""


@dataclass(frozen=True, slots=True)
class Relaunch:
    """Start again."""

    after_seconds: float
    fruitless: int
    """Starts in a row that ended without getting the run on."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Do not start again."""

    why: str = ""
    """Empty: the way it ended says it."""


def decide(began_at: int, endings: Sequence[Ending], config: SupervisionConfig) -> Relaunch | Leave:
    """What follows from the starts so far.

    Args:
        began_at: step that the first of them could go on from.
        endings: in order, at least one.

    A start got the run on if the next one can go on from a later step than any before could. Steps that are no longer
    on disk do not count, however many there were: without a checkpoint the next start would only do them again.
    """
    last = endings[-1]
    if last.stop_requested or last.reason not in WORTH_ANOTHER_START or config.restarts == 0:
        return Leave()
    fruitless = count_fruitless(began_at, endings)
    if fruitless > config.restarts:
        return Leave(
            f"gave up: {fruitless} starts in a row brought no new checkpoint (supervision.restarts={config.restarts})"
        )
    return Relaunch(backoff(fruitless, config.backoff_seconds), fruitless)


def count_fruitless(began_at: int, endings: Sequence[Ending]) -> int:
    """How many of the last starts in a row did not get the run on."""
    best, fruitless = began_at, 0
    for ending in endings:
        fruitless = 0 if ending.position > best else fruitless + 1
        best = max(best, ending.position)
    return fruitless


def backoff(fruitless: int, first_seconds: float) -> float:
    """Seconds to wait after so many starts in a row without progress: doubles each time, at most five minutes."""
    if fruitless == 0:
        return 0.0
    return min(MAX_BACKOFF_SECONDS, first_seconds * 2.0 ** min(fruitless - 1, 64))
