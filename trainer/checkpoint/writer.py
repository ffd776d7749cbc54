"""Writes in the background: one at a time, in a thread, whose result is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from trainer.errors import SupersededError
from trainer.records import Saved


@dataclass(frozen=True, slots=True)
class Failed:
    """A write that has failed: nothing of it is left behind, what was committed before stays."""

    step: int
    reason: str
    """One sentence or more: on which rank, what, where."""
    superseded: bool = False
    """A newer start of the run has taken over."""


class Writer:
    """At most one write at a time."""

    def __init__(self, name: str):
        self.progress = 0
        """Bytes written since the beginning: goes on while a write does."""
        self._name = name
        self._thread: threading.Thread | None = None
        self._step = 0
        self._result: Saved | Failed | None = None

    @property
    def in_flight(self) -> bool:
        """From :meth:`begin` until :meth:`poll` or :meth:`drain` has given the result."""
        return self._thread is not None

    def count(self, num_bytes: int) -> None:
        """Called by the thread for what it has written."""
        self.progress += num_bytes

    def begin(self, step: int, work: Callable[[], Saved | Failed]) -> None:
        """Run `work` in a thread. The one before must have been drained."""
        assert self._thread is None, "one write at a time: drain the one before"

        def run() -> None:
            try:
                self._result = work()
            except Exception as error:  # noqa: BLE001 - told by poll and drain; training must hear of it
                self._result = Failed(step, f"{type(error).__name__}: {error}")

        self._result = None
        self._step = step
        # a daemon: a process that is ended must not wait for a message of ranks that are gone
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def poll(self) -> Saved | Failed | None:
        """The result of a write that has ended, once. Never waits.

        That a newer start has taken over is left to :meth:`drain`: all ranks end there together.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        if isinstance(self._result, Failed) and self._result.superseded:
            return None
        return self._take()

    def drain(self, beat: Callable[[], None], seen: Callable[[], int], every: float = 1.0) -> Saved | Failed | None:
        """Wait for the result; None: nothing is in flight.

        Args:
            beat: called while the write gets on.
            seen: bytes written so far, by whomever it waits for.
            every: seconds between looks at that.

        Raises:
            SupersededError: a newer start of the run has taken over.
        """
        if self._thread is None:
            return None
        last = -1
        while self._thread.is_alive():
            if (now := seen()) != last:
                beat()
                last = now
            self._thread.join(every)
        result = self._take()
        if isinstance(result, Failed) and result.superseded:
            raise SupersededError(result.reason)
        return result

    def close(self) -> None:
        """What is in flight is given up: its thread ends with the process."""
        self._thread = None

    def _take(self) -> Saved | Failed:
        self._thread = None
        assert self._result is not None
        return self._result
