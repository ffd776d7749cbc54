"""When ranks must be asked to stop so that they are saved before a job's time is over."""

from __future__ import annotations

from collections.abc import Callable

from trainer.config.files import RunFiles
from trainer.telemetry.ledger import last_record

MARGIN_SECONDS = 15.0
"""For ending in order: the last messages, the end of the processes, the requeue."""

LOOK_SECONDS = 60.0
"""Time between two looks into the ledger, and two questions about the limit: a site has many jobs and one scheduler."""


class Lead:
    """The seconds before a time limit at which to ask, from what steps, saves and evaluations took so far.

    Args:
        ends: the limit in Unix seconds, asked again and again since it can be changed; None: there is none.
        signal_seconds: what the site leaves, and what the scheduler itself signals by.
    """

    def __init__(self, files: RunFiles, ends: Callable[[], float | None], signal_seconds: float):
        self._files = files
        self._ask = ends
        self._ends: float | None = None
        self._signal_seconds = signal_seconds
        self._needed = 0.0
        self._looked = float("-inf")

    def due(self, now: float) -> str | None:
        """In words why it is time to ask (`now` in Unix seconds); None: it is not."""
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._needed = needed(self._files)
            self._ends = self._ask()
        if self._ends is None:
            return None
        lead = max(self._signal_seconds, self._needed)
        if now < self._ends - lead:
            return None
        text = f"{max(0.0, self._ends - now):.0f} s until the time limit of the job"
        if self._needed > self._signal_seconds:
            text += (
                f"; a step and a save need up to {self._needed:.0f} s here, more than signal_seconds "
                f"({self._signal_seconds:g}): raise it in the site's settings"
            )
        return text


def needed(files: RunFiles) -> float:
    """Seconds that stopping took lately: two steps, and twice the time until a checkpoint was whole (one may be in
    flight when the last is asked for)."""
    attempt = last_record(files.ledger, lambda record: record["kind"] == "attempt")
    saved = last_record(files.ledger, lambda record: record["kind"] == "checkpoint")
    step = float(attempt.get("seconds") or 0.0) if attempt else 0.0
    save = float(saved.get("seconds_written") or saved.get("seconds") or 0.0) if saved else 0.0
    return 2 * step + 2 * save + MARGIN_SECONDS
