"""Shows a run on the console while it goes on, from a thread of its own.

A slow or stopped terminal holds up neither training nor the ledger.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from itertools import starmap
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trainer.telemetry.console import RunView, notice_line
from trainer.telemetry.ledger import Record, notice

Mode = Literal["auto", "live", "lines", "quiet"]

# rendering takes about 10 ms of one core
_REFRESH_SECONDS = 1.0
_LINE_EVERY_SECONDS = 5.0
_TOLD = ("perplexity", "accuracy", "f1_macro", "f1_micro", "f1", "exact_match", "matthews", "pearson", "mae")
_MOST_SCORES = 4
_FIRST_LINES = 3


class ConsoleView:
    """Shows a run on a console while it goes on. `update` only notes the record; a thread prints, once a second."""

    def __init__(self, mode: Mode, console: Console):
        self._console = console
        live = mode == "live" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal)
        self._quiet = mode == "quiet"
        # messages scroll by as lines of their own
        self._view = RunView(num_notices=0)
        self._live = Live(self._view, console=console, auto_refresh=False) if live else None
        self._lock = threading.Lock()
        self._lines: list[Text] = []
        self._last_words: list[Text] = []
        self._changed = False
        self._num_lines = 0
        self._next_line = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="console", daemon=True)
        self._thread.start()

    def update(self, record: Record) -> None:
        self._view.update(record)
        with self._lock:
            self._changed = True
            heard = notice(record)
            if heard and not (self._quiet and heard[0] == "info" and record["kind"] != "outcome"):
                lines = self._last_words if record["kind"] == "outcome" else self._lines
                lines.append(notice_line(record["time"], *heard))
            if self._live is None and not self._quiet:
                self._line_of(record)

    def close(self) -> None:
        self._closed.set()
        # a terminal that takes nothing (Ctrl-S) must not hold up the end of the run
        self._thread.join(timeout=5)

    def _line_of(self, record: Record) -> None:
        match record["kind"]:
            case "start":
                self._lines.append(self._view.header(record))
            case "attempt" if record["applied"]:
                assert self._view.start is not None
                last = record["step"] == self._view.start["steps"]
                if last or self._num_lines < _FIRST_LINES or time.monotonic() >= self._next_line:
                    self._lines.append(Text(self._view.line()))
                    self._num_lines += 1
                    self._next_line = time.monotonic() + _LINE_EVERY_SECONDS
            case "rewind":
                self._num_lines = 0
            case "evaluation":
                shown = [f"held-out loss {record['loss']:.4f}", *_scores(record.get("scores", {}))]
                self._lines.append(Text("  ".join([*shown, f"at step {record['step']}"]), "bold"))
            case "checkpoint":
                self._lines.append(Text(f"saved {record['name']} in {record['seconds_written']:.1f} s", "dim"))

    def _work(self) -> None:
        if self._live is not None:
            self._live.start()
        while not self._closed.wait(_REFRESH_SECONDS):
            self._show()
        self._show()
        if self._live is not None:
            self._live.stop()
        self._print(self._last_words)

    def _show(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
            changed, self._changed = self._changed, False
        self._print(lines)
        if self._live is not None and changed:
            self._live.refresh()

    def _print(self, lines: list[Text]) -> None:
        for line in lines:
            self._console.print(line, soft_wrap=True, highlight=False)


def _scores(scores: Mapping[str, float]) -> list[str]:
    """Those that are told first; how many more the ledger has."""
    told = sorted(scores.items(), key=lambda item: _TOLD.index(item[0]) if item[0] in _TOLD else len(_TOLD))
    more = len(told) - _MOST_SCORES
    return [*starmap(_score, told[:_MOST_SCORES]), *([f"({more} more in the ledger)"] if more > 0 else [])]


def _score(name: str, value: float) -> str:
    return f"{name} {value:.1%}" if name == "accuracy" else f"{name} {value:.2f}"


def console_view(mode: Mode) -> ConsoleView:
    """Shows the run on standard output, live on a terminal and as lines elsewhere where the mode is `auto`."""
    return ConsoleView(mode, Console(file=sys.stdout))
