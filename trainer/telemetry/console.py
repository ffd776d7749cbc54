"""A run on the terminal: one renderable built from ledger records. Free of torch.

`display.py` feeds it during the run, `trimtab watch` from the file.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.telemetry.ledger import Record, notice
from trainer.telemetry.plot import History, braille

_STYLES = {"info": "", "warning": "yellow", "error": "bold red"}
_RECENT_ATTEMPTS = 64
_PLOT_ROWS = 6


class RunView:
    """The state of a run, built from its ledger records in order. It may be fed and rendered in different threads."""

    def __init__(self, num_notices: int = 6) -> None:
        """`num_notices`: newest messages that are shown below the figures."""
        self._lock = threading.RLock()
        self.start: Record | None = None
        self.attempt: Record | None = None
        """The newest attempt that was applied."""
        self.newest: Record | None = None
        """The newest attempt."""
        self.evaluation: Record | None = None
        self.checkpoint: Record | None = None
        self.outcome: Record | None = None
        self.goodput: float | None = None
        """Time in standing steps over time allocated; None: nothing stands yet."""
        self.step = 0
        self._losses = History()
        self._recent: deque[Record] = deque(maxlen=_RECENT_ATTEMPTS)
        self._notices: deque[tuple[float, str, str]] = deque(maxlen=num_notices)

    def update(self, record: Record) -> None:
        """Takes in the next record."""
        with self._lock:
            self._take(record)

    def _take(self, record: Record) -> None:
        match record["kind"]:
            case "start":
                self.start, self.attempt, self.outcome = record, None, None
                self.newest = None
                self._recent.clear()
                self._go_back(record["resumed_step"])
            case "attempt":
                self.newest = record
                if record["applied"]:
                    self.attempt, self.step = record, record["step"]
                    self._losses.add(record["step"], record["loss"])
                    self._recent.append(record)
            case "rewind":
                self._go_back(record["to_step"])
            case "evaluation":
                self.evaluation = record
            case "checkpoint":
                self.checkpoint = record
            case "goodput":
                self.goodput = record["fraction"] or None
            case "outcome":
                self.outcome = record
        heard = notice(record)
        if heard:
            self._notices.append((record["time"], *heard))

    def _go_back(self, step: int) -> None:
        self.step = step
        self._losses.rewind(step)
        if self.checkpoint and self.checkpoint["step"] > step:
            self.checkpoint = None
        if self.evaluation and self.evaluation["step"] > step:
            self.evaluation = None

    @property
    def time_left(self) -> float | None:
        """Estimated seconds to the last step; None before the first."""
        if self.start is None:
            return None
        return seconds_left(self.start["steps"] - self.step, [record["seconds"] for record in self._recent])

    def line(self) -> str:
        """The newest step as one aligned line."""
        if self.start is None or self.attempt is None:
            return "no step yet"
        attempt, steps = self.attempt, self.start["steps"]
        parts = [
            f"step {self.step:>{len(str(steps))}}/{steps}",
            f"loss {attempt['loss']:7.4f}",
            f"norm {_compact(attempt['grad_norm']):>7}{'*' if attempt['clipped'] else ' '}",
            f"lr {attempt['lr']:.2e}",
            f"{_compact(self._mean('tokens_per_second')):>6} tokens/s",
        ]
        if attempt["flop_utilisation"] is not None:
            parts.append(f"FLOPs {self._mean('flop_utilisation'):4.0%}")
        parts += [f"data {self._waiting():5.1%}", f"left {_duration(self.time_left)}"]
        if self.goodput is not None:
            parts.append(f"goodput {self.goodput:.1%}")
        return "  ".join(parts)

    def __rich__(self) -> RenderableType:
        with self._lock:
            return self._rendered()

    def _rendered(self) -> RenderableType:
        if self.start is None:
            return Text("waiting for the first record of the run", style="dim")
        rows: list[RenderableType] = [self.header(self.start), self._progress(self.start)]
        if self.attempt is not None:
            rows += [self._figures(self.attempt), _Plot(self._losses.values())]
        rows += [notice_line(*heard) for heard in self._notices]
        return Group(*rows)

    @staticmethod
    def header(start: Record) -> Text:
        """Which run this is, on what."""
        facts = [f"{start['ranks']} × {start['device']}", start["precision"], f"on {start['hostname']}"]
        if start["start"] > 1:
            facts.append(f"start {start['start']}, resumed at step {start['resumed_step']}")
        return Text.assemble((start["name"], "bold"), "  ", (" · ".join(facts), "dim"))

    def _progress(self, start: Record) -> Table:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True)
        left = f"{_duration(self.time_left)} left" if self.outcome is None else self.outcome["reason"]
        if self.goodput is not None:
            left += f" · goodput {self.goodput:.1%}"
        steps = start["steps"]
        row.add_row(f"step {self.step} of {steps}", ProgressBar(steps, self.step), f"{self.step / steps:.0%}", left)
        return row

    def _figures(self, attempt: Record) -> Table:
        norm = Text(_compact(attempt["grad_norm"]), _alarm(attempt["grad_norm"]))
        if attempt["clipped"]:
            norm.append(f" → {attempt['clip']:g}", "yellow")
        norm.append(f"  (clipped {self._mean('clipped'):.0%})", "dim")
        newest = self.newest or attempt
        held_out = Text("–")
        if self.evaluation is not None:
            held_out = Text(f"{self.evaluation['loss']:.4f}", _alarm(self.evaluation["loss"]))
            held_out.append(f"  (step {self.evaluation['step']})", "dim")
            if best := self.evaluation.get("best"):
                held_out.append(f"  best {best['score']} {best['value']:.4f} (step {best['step']})", "green")
        utilisation = "–" if attempt["flop_utilisation"] is None else f"{self._mean('flop_utilisation'):.1%}"
        saved = "–" if self.checkpoint is None else f"step {self.checkpoint['step']}"
        cells: list[tuple[str, str | Text]] = [
            ("loss", Text(f"{attempt['loss']:.4f}", _alarm(attempt["loss"]) or "bold")),
            ("gradient norm", norm),
            ("held-out loss", held_out),
            ("learning rate", f"{attempt['lr']:.3e}"),
            ("tokens/s", f"{self._mean('tokens_per_second'):,.0f}"),
            ("waiting for data", f"{self._waiting():.1%}"),
            ("FLOP utilisation", utilisation),
            ("memory a rank", f"{attempt['memory_bytes'] / (1 << 30):.2f} GiB"),
            ("skipped", _loud(newest["num_skipped"])),
            ("epoch", str(attempt["epoch"])),
            ("incidents", _incidents(newest)),
            ("left out", _left_out(newest)),
            ("saved", saved),
            ("seconds a step", f"{self._mean('seconds'):.3g}"),
        ]
        table = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 5, None, 6):
            table.add_column(ratio=ratio, no_wrap=True)
        for (name, value), (other, also) in zip(cells[::2], cells[1::2], strict=True):
            table.add_row(Text(name, "dim"), value, Text(other, "dim"), also)
        return table

    def _mean(self, field: str) -> float:
        return math.fsum(record[field] for record in self._recent) / len(self._recent)

    def _waiting(self) -> float:
        """Fraction of the recent attempts' time that went into waiting for data."""
        return self._mean("seconds_data") / self._mean("seconds")


class _Plot:
    """The loss over the run as wide as the terminal, its highest and lowest value at the left."""

    def __init__(self, values: list[float]):
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        finite = [value for value in self._values if math.isfinite(value)]
        if len(finite) < 2:
            return
        labels = [""] * _PLOT_ROWS
        labels[0], labels[-1] = f"{max(finite):.2f}", f"{min(finite):.2f}"
        width = max(map(len, labels))
        if options.encoding.startswith("utf"):
            lines = braille(self._values, max(8, options.max_width - width - 2), _PLOT_ROWS)
            for label, line in zip(labels, lines, strict=True):
                yield Text.assemble((f"{label:>{width}} ", "dim"), (line.rstrip("\u2800"), "cyan"))


def seconds_left(num_steps_left: int, recent_seconds: Sequence[float]) -> float | None:
    """Steps left × the median of recent step times, which one slow step does not move; None while there are none."""
    return num_steps_left * statistics.median(recent_seconds) if recent_seconds else None


def notice_line(time_of: float, level: str, text: str) -> Text:
    """A message with its local time of day."""
    clock = time.strftime("%H:%M:%S", time.localtime(time_of))
    label = "" if level == "info" else f"{level}: "
    return Text.assemble((f"{clock} ", "dim"), (f"{label}{text}", _STYLES[level]))


def _loud(count: int) -> Text:
    return Text(str(count), "yellow" if count else "")


def _incidents(newest: Record) -> Text:
    text = _loud(max(newest.get("num_incidents", 0), newest.get("incident", 0)))
    if newest.get("incident"):
        text.append(", now open", "bold yellow")
    elif rollbacks := newest.get("num_rollbacks"):
        text.append(f", {rollbacks} rollback{'' if rollbacks == 1 else 's'}")
    return text


def _left_out(newest: Record) -> Text:
    count = newest.get("num_quarantined", 0)
    return Text(f"{count} batch{'' if count == 1 else 'es'}", "yellow" if count else "")


def _alarm(value: float) -> str:
    return "" if math.isfinite(value) else "bold red"


def _compact(value: float) -> str:
    """Three significant digits: 0.831, 12.3, 1.23e+05 as 123k."""
    for limit, factor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= abs(value) < limit * 1e3:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    """4 s · 3:12 · 2:03:12 · 4 d 02 h"""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
