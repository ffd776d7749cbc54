"""The runs of a folder at a glance, read from their files; of those that were submitted the scheduler is asked once."""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from launcher.details import details
from launcher.run_directory import LOCK_FILE, read_outcome
from launcher.slurm.standing import Standing, States, allocations, ask, standing_of
from launcher.words import visible
from trainer.checkpoint.manifest import committed_steps, name_of, read_manifest
from trainer.config.files import RunFiles
from trainer.errors import CheckpointError, RunDirectoryError
from trainer.starts import newest as newest_start
from trainer.starts import read_starts
from trainer.telemetry.books import account, newest_of
from trainer.telemetry.ledger import Record, last_record

SILENT_SECONDS = 600.0
"""A run that ended without an outcome is taken for dead when its ledger has been silent for so long, or for twenty of
its own steps if that is longer. Until then it may be running, perhaps on another machine."""

_STYLES = {
    "running": "cyan",
    "starting": "cyan",
    "queued": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "cancelled": "yellow",
    "prepared": "dim",
}
_ALIVE = ("running", "starting")

_TITLES = (
    *("run", "state", "job", "nodes", "start", "step", "loss", "held-out", "tokens/s", "saved", "goodput"),
    *("incidents", "left out", "last sign"),
)
_FIRST_TO_GO = ("start", "nodes", "saved", "held-out", "tokens/s", "left out", "last sign")
"""Columns that a narrow terminal does without, in this order."""
_FOLDED = 16
"""Letters of a name that stay on one line at least."""
_EXPLAINED = ("halted", "crashed", "refused", "cancelled")
"""States that nobody asked for, or that end a job: a sentence says why."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where one run stands."""

    name: str
    state: str
    """prepared · running · finished · stopped · halted · crashed · refused; of a run that was submitted also queued ·
    starting · cancelled"""
    step: int | None
    steps: int | None
    loss: float | None
    held_out_loss: float | None
    tokens_per_second: float | None
    checkpoint: str | None
    seconds_since: float | None
    """Since the last sign of life."""
    start: int = 0
    """How many times it was started."""
    incidents: int = 0
    incident_open: bool = False
    """The newest incident has not ended."""
    quarantined: int = 0
    """Batches that incidents left out."""
    job: str = ""
    """Its job in words; empty: it was never submitted."""
    nodes: str = ""
    """Of the job: a number, or before it begins a range."""
    goodput: float | None = None
    """Time in standing steps over time allocated; None: not known, or nothing stands yet."""
    why: str = ""
    """Why it ended, in a sentence."""


def runs_in(folder: Path) -> list[Path]:
    """The directories of the runs directly inside `folder`, by name; or of the one run that `folder` itself is.

    Raises:
        RunDirectoryError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunDirectoryError(f"there is no folder {folder}; name the folder that holds the runs")
    if RunFiles(folder).config.is_file():
        return [folder]
    return [path for path in sorted(folder.iterdir()) if RunFiles(path).config.is_file()]


def statuses(folder: Path, now: float | None = None, states: States | None = None) -> list[RunStatus]:
    """The runs of a folder; see `runs_in` and `status_of`."""
    now = time.time() if now is None else now
    return [status_of(path, now, states) for path in runs_in(folder)]


def overview(folder: Path) -> Group | None:
    """What `trimtab status` shows: the runs of a folder, of a single run also its jobs and its time; None: no runs.

    Raises:
        RunDirectoryError: there is no such folder.
    """
    roots, now = runs_in(folder), time.time()
    states, note = ask(roots)
    runs = [status_of(root, now, states) for root in roots]
    if not runs:
        return None
    more = details(folder, now, states, alive=runs[0].state in _ALIVE) if roots == [folder] else []
    lines = [*sentences(runs), *([visible(note)] if note else [])]
    return Group(Fitted(runs), *([Text("\n".join(["", *lines]))] if lines else []), *more)


def status_of(root: Path, now: float, states: States | None = None) -> RunStatus:
    """Where the run in `root` stands at `now` (Unix seconds).

    Args:
        states: what the scheduler says of its jobs; None: it was not asked, or did not answer.
    """
    files = RunFiles(root)
    standing = standing_of(root, states)
    outcome = read_outcome(root)
    newest = last_record(files.ledger, lambda _: True)
    attempt = last_record(files.ledger, lambda record: record["kind"] == "attempt" and record.get("applied", True))
    newest_attempt = last_record(files.ledger, lambda record: record["kind"] == "attempt") or {}
    start, evaluation = newest_of(files.ledger, "start"), newest_of(files.ledger, "evaluation")
    if outcome and newest and newest["kind"] != "outcome" and newest["time"] > files.outcome.stat().st_mtime:
        outcome = None  # of an earlier start
    seen = max((place.stat().st_mtime for place in (files.outcome, files.ledger) if place.exists()), default=None)
    since = None if seen is None else max(0.0, now - seen)
    ended = outcome or {}
    loss = attempt["loss"] if attempt else None
    held_out = ended.get("held_out_loss")
    state = _state(root, outcome, attempt, since)
    if standing is not None:
        state = standing.state_of_run(state, begun=_is_of(start, standing))
    time_spent = account(files.ledger, whole=False).goodput(_allocations(standing, state), now)
    return RunStatus(
        name=root.name,
        state=state,
        step=_first(ended.get("step"), attempt and attempt["step"], start and start.get("resumed_step")),
        steps=_first(ended.get("steps"), start and start.get("steps")),
        loss=loss,
        held_out_loss=_first(held_out, evaluation and evaluation.get("loss")),
        tokens_per_second=attempt.get("tokens_per_second") if attempt else None,
        checkpoint=newest_checkpoint(root),
        seconds_since=since,
        start=max(newest_start(files), start["start"] if start else 0),
        incidents=max(newest_attempt.get("num_incidents", 0), newest_attempt.get("incident", 0)),
        incident_open=newest_attempt.get("incident", 0) > 0,
        quarantined=newest_attempt.get("num_quarantined", 0),
        job=standing.words if standing else "",
        nodes=standing.nodes if standing else "",
        goodput=time_spent.fraction or None,
        why=_why(standing, str(ended.get("message") or ""), state),
    )


def _why(standing: Standing | None, message: str, state: str) -> str:
    """Why the run stands where it does, in a sentence, from who knows best.

    Args:
        message: of its outcome.
    """
    decision, end_of_job = (standing.decision, standing.end_of_job) if standing else ("", "")
    return decision or (message if state in _EXPLAINED else "") or end_of_job


def _is_of(start: Record | None, standing: Standing) -> bool:
    """Whether a start is one of the job that stands for the run now."""
    about = (start or {}).get("job") or {}
    return bool(about) and (about.get("job"), about.get("restart")) == (standing.job, standing.restarts)


def _allocations(standing: Standing | None, state: str) -> list[tuple[float, float | None]]:
    return allocations(standing.jobs, goes_on=state in _ALIVE) if standing else []


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _state(root: Path, outcome: dict[str, Any] | None, attempt: Record | None, since: float | None) -> str:
    if is_locked(root):
        return "running"
    if outcome is not None:
        reason = str(outcome["reason"])
        return "finished" if reason == "completed" else reason
    if since is None:
        return "prepared"
    patience = max(SILENT_SECONDS, 20 * float(attempt.get("seconds", 0.0)) if attempt else 0.0)
    return "running" if since < patience else "crashed"


def is_locked(root: Path) -> bool:
    """Whether a process on this machine runs it."""
    try:
        descriptor = os.open(root / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def newest_checkpoint(root: Path) -> str | None:
    """Name of the checkpoint that the next start goes on from, if its files are whole: the newest committed one of the
    run's history. `trimtab verify` looks into the files."""
    files = RunFiles(root)
    try:
        known = read_starts(files)
    except RunDirectoryError:
        return None
    for step in reversed(committed_steps(files.checkpoints)):
        try:
            manifest = read_manifest(files.checkpoints / name_of(step))
        except CheckpointError:
            continue
        if known.run in (None, manifest.run) and known.history.admits(manifest.start, step):
            return name_of(step)
    return None


def sentences(runs: list[RunStatus]) -> list[str]:
    """Why runs ended that did not end by themselves, a line each."""
    return [
        f"{visible(run.name)}: {run.state}: {visible(run.why)}" for run in runs if run.why and run.state != "finished"
    ]


class Fitted:
    """The table of runs, without columns for which a terminal is too narrow."""

    def __init__(self, runs: list[RunStatus]):
        self._runs = runs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number in range(len(_FIRST_TO_GO) + 1):
            found = table(self._runs, _FIRST_TO_GO[:number])
            if console.measure(found, options=options.update(max_width=10_000)).minimum <= options.max_width:
                break
        yield found


def table(runs: list[RunStatus], without: Collection[str] = ()) -> Table:
    """The runs as a table; incidents, jobs and goodput have columns where there are any.

    Args:
        without: titles of columns to leave out.
    """
    result = Table(box=None, header_style="bold", pad_edge=False)
    shown = [_row(run) for run in runs]
    there = {
        "job": any(run.job for run in runs),
        "nodes": any(run.job for run in runs),
        "goodput": any(run.goodput is not None for run in runs),
        "incidents": any(run.incidents or run.quarantined for run in runs),
        "left out": any(run.incidents or run.quarantined for run in runs),
    }
    titles = [title for title in _TITLES if there.get(title, True) and title not in without]
    for title in titles:
        width = max(len(title), *(row[title].cell_len for row in shown), 0)
        if title in ("run", "job"):
            result.add_column(title, overflow="fold", min_width=min(width, _FOLDED))
        else:
            side: Literal["left", "right"] = "left" if title == "state" else "right"
            result.add_column(title, justify=side, no_wrap=True, min_width=width)
    for row in shown:
        result.add_row(*(row[title] for title in titles))
    return result


def _row(run: RunStatus) -> dict[str, Text]:
    """The cells of a run by title."""
    left_out = f"{run.quarantined} batch{'' if run.quarantined == 1 else 'es'}" if run.quarantined else "–"
    return {
        "run": Text(visible(run.name)),
        "state": Text(run.state, style=_STYLES.get(run.state.partition(" ")[0], "red")),
        "job": Text(visible(run.job) or "–"),
        "nodes": Text(run.nodes or "–"),
        "start": Text(str(run.start) if run.start else "–"),
        "step": Text("–" if run.step is None else f"{run.step}/{run.steps if run.steps is not None else '?'}"),
        "loss": Text(_number(run.loss)),
        "held-out": Text(_number(run.held_out_loss)),
        "tokens/s": Text("–" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"),
        "saved": Text("–" if run.checkpoint is None else f"step {int(run.checkpoint.removeprefix('step-'))}"),
        "goodput": Text("–" if run.goodput is None else f"{run.goodput:.1%}"),
        "incidents": _incidents(run),
        "left out": Text(left_out),
        "last sign": Text("–" if run.seconds_since is None else f"{age(run.seconds_since)} ago"),
    }


def _incidents(run: RunStatus) -> Text:
    if not run.incidents:
        return Text("–")
    open_now = run.incident_open and run.state != "finished"
    return Text(f"{run.incidents}{', 1 open' if open_now else ''}", style="bold yellow" if open_now else "yellow")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if math.isfinite(value) else str(value).replace("nan", "NaN")


def age(seconds: float) -> str:
    """A duration in its largest unit: 42 s, 3 min, 5 h, 2 d."""
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {name}"
    return f"{int(seconds)} s"
