"""Requests to stop, from signals. The loop reads them; all ranks stop at the same step by vote."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """Remembers that this process was asked to stop, and by which signal.

    SIGINT (Ctrl-C), SIGTERM (schedulers, launchers) and SIGUSR1 (Slurm's warning) all mean: save and end within a step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._also: Callable[[], bool] = _never

    @property
    def requested(self) -> bool:
        return self.signal_name is not None or self._also()

    def when(self, condition: Callable[[], bool]) -> None:
        """Also stop when `condition` holds; it is asked once a step and must not wait."""
        self._also = condition

    def listen(self) -> StopRequest:
        """Take over the signals of this process."""
        for number in self.SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


def _never() -> bool:
    return False
