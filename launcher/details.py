"""One run in detail: its jobs, what became of its time, and how long its last start took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from launcher.slurm.history import Job
from launcher.slurm.standing import States, allocations, queued_seconds, standing_of
from launcher.words import visible
from trainer.config.files import RunFiles
from trainer.telemetry.books import account, first_attempt
from trainer.telemetry.goodput import Goodput
from trainer.telemetry.ledger import Record

_WORDS = {
    "steps": "steps that stand",
    "data": "waiting for data in them",
    "checkpoints": "held up by saving",
    "rolled_back": "dropped or rolled back",
    "lost": "lost to crashes",
}


def details(root: Path, now: float, states: States | None, *, alive: bool) -> list[RenderableType]:
    """Tables about the run in `root` at `now` (Unix seconds): those that there is something to say in.

    Args:
        states: see `standing_of`.
        alive: whether it runs.
    """
    files = RunFiles(root)
    standing = standing_of(root, states)
    jobs = list(standing.jobs) if standing else []
    spent = account(files.ledger).goodput(allocations(jobs, goes_on=alive), now)
    shown: list[RenderableType] = []
    if jobs:
        shown += [Text(""), jobs_table(jobs, now, goes_on=alive)]
    if spent.allocated:
        shown += [Text(""), time_table(spent, queued_seconds(jobs), node_seconds(jobs, now, goes_on=alive))]
    start, first = first_attempt(files.ledger)
    if start is not None and (split := start_up(start, first)):
        shown += [Text(""), start_table(start["start"], split, whole=first is not None)]
    return shown


def jobs_table(jobs: list[Job], now: float, *, goes_on: bool) -> Table:
    """Each start in a job. `goes_on`: the last one is alive, if it has no end."""
    result = _table("job", "nodes", "began", "ran", "reached step", "ended", "then", "why")
    for job in jobs:
        alive = goes_on and job is jobs[-1] and job.ended is None
        until = now if alive else job.ended
        result.add_row(
            Text(visible(job.job) + (f", requeued {job.restart}×" if job.restart else "")),
            Text(visible(",".join(job.nodes))),
            Text(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.began))),
            Text("–" if until is None else lasted(until - job.began)),
            Text("–" if job.reached is None else str(job.reached)),
            Text("runs" if alive else visible(job.reason) or "–"),
            Text(visible(job.then) or "–"),
            Text(visible(job.why)),
        )
    return result


def time_table(spent: Goodput, queued: float, nodes: float) -> Table:
    """What became of the time allocated. `queued` and `nodes` (node seconds): shown where there were any."""
    result = _table(f"goodput {spent.fraction:.1%}", "time", "share")
    for part, seconds in spent.parts.items():
        if seconds:
            words = _WORDS.get(part, part)
            result.add_row(Text(words), Text(lasted(seconds)), Text(f"{spent.share(part):.1%}"))
    result.add_row(Text("allocated", "bold"), Text(lasted(spent.allocated), "bold"), Text("100.0%", "bold"))
    if nodes:
        result.add_row(Text("node hours"), Text(f"{nodes / 3600:.1f}"), Text(""))
    if queued:
        result.add_row(Text("waiting in the queue"), Text(lasted(queued)), Text("not allocated", "dim"))
    return result


def node_seconds(jobs: list[Job], now: float, *, goes_on: bool) -> float:
    """Seconds of the jobs × their nodes, together."""
    spans = allocations(jobs, goes_on=goes_on)
    width = {job.began: len(job.nodes) for job in jobs}
    return sum(((now if ended is None else ended) - began) * width[began] for began, ended in spans)


def start_up(start: Record, first: Record | None) -> dict[str, float]:
    """Seconds from where the time of a start counts to the end of its first attempt, by part, in order; empty where its
    ledger does not say when it began.

    Args:
        start: its `start` record.
        first: its first attempt; None: there is none yet, and that part is left out.
    """
    began = start.get("began")
    if not began:
        return {}
    about: Mapping[str, Any] = start.get("job") or {}
    parts = {name: float(seconds) for name, seconds in (about.get("parts") or {}).items()}
    names = {"prepare": "preparing"}
    found = {names.get(name, name): seconds for name, seconds in parts.items()}
    found["launching"] = began - (start.get("allocated") or began) - sum(parts.values())
    loading = float(start.get("seconds_loading", 0.0))
    found["imports and building"] = start["time"] - began - loading
    found["loading"] = loading
    if first is not None:
        found["first step"] = first["time"] - start["time"]
    # two clocks, one of them in whole ticks
    return {name: max(0.0, seconds) for name, seconds in found.items()}


def start_table(number: int, split: Mapping[str, float], *, whole: bool) -> Table:
    """How long a start took to its first step."""
    result = _table(f"start {number}", "time")
    for name, seconds in split.items():
        result.add_row(Text(visible(name)), Text(f"{seconds:.1f} s"))
    so_far = "to the first step" if whole else "so far"
    result.add_row(Text(so_far, "bold"), Text(f"{sum(split.values()):.1f} s", "bold"))
    return result


def lasted(seconds: float) -> str:
    """4.2 s · 3:12 · 2:03:12"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _table(first: str, *others: str) -> Table:
    result = Table(box=None, header_style="bold", pad_edge=False)
    result.add_column(first, overflow="fold")
    for title in others:
        of_text = title in ("nodes", "ended", "then", "why")
        result.add_column(title, justify="left" if of_text else "right", overflow="fold" if of_text else "ellipsis")
    return result
