"""What the loop tells, rank 0 to the ledger and its views; the other ranks hold a `NoTelemetry` and need no `if`s."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from trainer.config.schema import TelemetryConfig
from trainer.records import (
    Examine,
    FloatArray,
    Halt,
    IncidentEvent,
    Outcome,
    Position,
    Replay,
    Rewind,
    Rollback,
    Saved,
    Skip,
    Step,
    StepStats,
    Structure,
    Timing,
    Verdict,
)
from trainer.starts import NO_FENCE, Fence, NoFence
from trainer.telemetry.books import Books
from trainer.telemetry.display import console_view
from trainer.telemetry.ledger import FILE_NAME, Record, last_attempt, last_record, last_start
from trainer.telemetry.tensorboard import FOLDER, TensorBoardView
from trainer.telemetry.writer import Ledger, View, now, say

Level = Literal["info", "warning", "error"]

_NO_SCORES: Mapping[str, float] = {}

_SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What holds for a whole start of a run: the content of its `start` record."""

    name: str
    ranks: int
    device: str
    """What one rank computes on, as a person calls it: "cpu", "NVIDIA H100 80GB HBM3"."""
    precision: str
    parameter_names: tuple[str, ...]
    """In the order of all parameter norms of the run."""
    steps: int
    """The last step of the whole run."""
    tokens_per_step: int
    versions: Mapping[str, str]
    """Library → version."""
    config: str
    """The resolved configuration as YAML."""
    plan: Mapping[str, str | int | float]
    """What a person wants to see first about this run, by label: parameters, ZeRO stage, batch arithmetic."""
    began: float = 0.0
    """Unix seconds at which the process of this rank began."""
    seconds_loading: float = 0.0
    """That finding, checking and loading the state took."""
    relaunched: Mapping[str, str | float | None] | None = None
    """What `trimtab run` told of the failed start before this one (`trainer.heartbeat.RELAUNCHED_VARIABLE`)."""
    allocated: float = 0.0
    """Unix seconds from which the time of this start counts."""
    parts: tuple[str, ...] = ()
    """What a compound loss is made of; empty: it has one part."""
    job: Mapping[str, Any] | None = None
    """What a job of a scheduler told of itself (TRIMTAB_JOB)."""


class Recorder(Protocol):
    """What the loop sees."""

    def record_attempt(
        self,
        stats: StepStats,
        verdict: Verdict,
        timing: Timing,
        lr: float,
        epoch: int,
        applied: bool,
        scores: Mapping[str, float] = _NO_SCORES,
        incident: int = 0,
    ) -> None:
        """One pass through the loop. `applied`: whether the update was carried out. `scores`: what the guard's
        channels measured, by name. `incident`: the one that is open (0: none)."""

    def record_rewind(self, rewind: Rewind) -> None:
        """A rollback that was carried out; after the attempt that asked for it."""

    def record_incident(self, event: IncidentEvent) -> None:
        """One line of an incident's timeline."""

    def record_snapshot(self, step: int, seconds_blocked: float, num_bytes: int) -> None:
        """A copy of the training state in memory; `seconds_blocked` that the loop stood still for it."""

    def record_structure(self, step: int, structure: Structure) -> None:
        """Norms of weights and updates, and how large logits are."""

    def record_part_norms(self, step: int, norms: Mapping[str, float]) -> None:
        """Gradient norm of each part of a compound loss, before clipping."""

    def record_evaluation(
        self,
        step: int,
        loss: float,
        num_targets: int,
        seconds: float,
        scores: Mapping[str, float] = _NO_SCORES,
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Held-out loss in nats a target, and further scores by name.

        `best`: the best evaluation so far, this one included: `score`, `step` and `value`.
        """

    def record_predictions(self, step: int, closely: Mapping[str, Any]) -> None:
        """What an evaluation predicted, for a person (`Evaluation.closely`); after the evaluation."""

    def record_checkpoint(self, saved: Saved, seconds_blocked: float) -> None:
        """A committed checkpoint; `seconds_blocked` that the loop stood still for it."""

    def message(self, level: Level, text: str) -> None:
        """Something that a person must hear: console, ledger and TensorBoard."""

    def flush(self) -> None:
        """Waits until all of it is on disk: before a checkpoint is committed."""

    def close(self, outcome: Outcome) -> OSError | None:
        """Records the end and waits for the disk; the error where records are missing there."""


class Telemetry:
    """Turns what the loop tells into ledger records. The methods only note their arguments; a thread does the work."""

    def __init__(self, ledger: Ledger, start: int, norms_every: int, counts: Mapping[str, int], step: int):
        """`counts`: what `COUNTS` names, so far in the run's history."""
        self._ledger = ledger
        self._books = Books(ledger.path, start, say)
        self._start = start
        self._norms_every = norms_every
        self._counts = dict(counts)
        self._quarantined: set[int] = set()
        self._step = step

    @classmethod
    def open(
        cls,
        run_dir: Path,
        config: TelemetryConfig,
        facts: RunFacts,
        resumed_from: Position | None = None,
        fence: Fence = NO_FENCE,
    ) -> Telemetry:
        """Opens the ledger of a run with the views that the config asks for, and records the start.

        `fence`: gives the start its number, and ends the records once a newer start has taken over.

        Raises:
            RunDirectoryError: the run directory is not writable.
        """
        path = run_dir / FILE_NAME
        # without a fence the ledger counts the starts
        start = last_start(path) + 1 if isinstance(fence, NoFence) else fence.number
        position = resumed_from or Position()
        counts = _counts_at(path, position.attempt)
        ledger = Ledger(path, _views(run_dir, config), fence=fence)
        telemetry = cls(ledger, start, config.norms_every, counts, position.step)
        telemetry._write(
            lambda: {
                "kind": "start",
                **asdict(facts),
                "resumed_step": position.step,
                "resumed_attempt": position.attempt,
                "hostname": socket.gethostname(),
            }
        )
        telemetry._write(telemetry._books.record)
        return telemetry

    def record_attempt(
        self,
        stats: StepStats,
        verdict: Verdict,
        timing: Timing,
        lr: float,
        epoch: int,
        applied: bool,
        scores: Mapping[str, float] = _NO_SCORES,
        incident: int = 0,
    ) -> None:
        accepted = verdict if isinstance(verdict, Step) else None
        clipped = applied and accepted is not None and clips(accepted, stats.grad_norm)
        quarantined = isinstance(verdict, Skip) and verdict.quarantine
        self._counts["num_skipped"] += not applied
        self._counts["num_clipped"] += clipped
        if quarantined:
            self._leave_out(stats.batch_index, stats.batch_index)
        self._step = stats.step if applied else stats.step - 1
        counts, scores = dict(self._counts), dict(scores)
        # an attempt that was not applied is evidence: it is always whole
        whole = stats.step % self._norms_every == 0 or not applied
        norms = stats.parameter_norms.copy() if whole else None
        seconds = stats.ranks.seconds.copy()
        losses, grad_norms = stats.ranks.losses.copy(), stats.ranks.grad_norms.copy()

        def make() -> Record:
            record: Record = {
                "kind": "attempt",
                "attempt": stats.attempt,
                "step": stats.step,
                "batch": stats.batch_index,
                "epoch": epoch,
                "loss": float(stats.loss),
                "parts": {name: float(value) for name, value in stats.parts.items()},
                "measures": {name: float(value) for name, value in stats.measures.items()},
                "targets": stats.num_targets,
                "grad_norm": float(stats.grad_norm),
                "nonfinite": stats.num_nonfinite,
                "lr": float(lr),
                "lr_scale": 1.0 if accepted is None else float(accepted.lr_scale),
                "verdict": _VERDICTS[type(verdict)],
                "reason": None if isinstance(verdict, Step) else verdict.reason,
                "incident": incident,
                "scores": dict(zip(scores, rounded(np.array(list(scores.values()), dtype=np.float64)), strict=True)),
                "clip": None if accepted is None else accepted.clip,
                "clipped": clipped,
                "applied": applied,
                "quarantined": quarantined,
                **counts,
                "seconds": timing.seconds,
                "seconds_data": timing.seconds_data,
                "tokens_per_second": timing.tokens_per_second,
                "flop_utilisation": timing.flop_utilisation,
                "memory_bytes": timing.memory_bytes,
                "loss_scale": float(stats.loss_scale),
                "stop_votes": stats.stop_votes,
                "agree": stats.agree,
                "rank_seconds": rounded(seconds),
            }
            if not applied:
                record |= {"rank_losses": rounded(losses), "rank_grad_norms": rounded(grad_norms)}
            if norms is not None:
                record["parameter_norms"] = rounded(norms)
            return record

        self._write(make)

    def record_rewind(self, rewind: Rewind) -> None:
        self._counts["num_rollbacks"] += 1
        if rewind.quarantine is not None:
            self._leave_out(*rewind.quarantine)
        self._step = rewind.to_step
        counts = dict(self._counts)
        self._write(lambda: {"kind": "rewind", **asdict(rewind), **counts})

    def record_incident(self, event: IncidentEvent) -> None:
        self._counts["num_incidents"] = max(self._counts["num_incidents"], event.incident)
        fields = asdict(event)
        fields["batch"] = fields.pop("batch_index")
        fields["numbers"] = {name: float(value) for name, value in event.numbers.items()}
        self._write(lambda: {"kind": "incident", **fields})

    def record_snapshot(self, step: int, seconds_blocked: float, num_bytes: int) -> None:
        fields = {"step": step, "seconds": seconds_blocked, "num_bytes": num_bytes}
        self._write(lambda: {"kind": "snapshot", **fields})

    def record_structure(self, step: int, structure: Structure) -> None:
        attention, output = structure.attention_logits.copy(), float(structure.output_logits)
        norms, ratios = structure.parameter_norms.copy(), structure.update_ratios.copy()
        self._write(
            lambda: {
                "kind": "weights",
                "step": step,
                "parameter_norms": rounded(norms),
                "update_ratios": rounded(ratios),
                "attention_logits": rounded(attention),
                "output_logits": output,
            }
        )

    def record_part_norms(self, step: int, norms: Mapping[str, float]) -> None:
        fields = {name: float(value) for name, value in norms.items()}
        self._write(lambda: {"kind": "part_norms", "step": step, "norms": fields})

    def record_evaluation(
        self,
        step: int,
        loss: float,
        num_targets: int,
        seconds: float,
        scores: Mapping[str, float] = _NO_SCORES,
        best: Mapping[str, Any] | None = None,
    ) -> None:
        fields: Record = {"step": step, "loss": float(loss), "targets": num_targets, "seconds": seconds}
        fields |= {} if best is None else {"best": dict(best)}
        found = {name: float(value) for name, value in scores.items()}
        self._write(lambda: {"kind": "evaluation", **fields, "scores": found})

    def record_predictions(self, step: int, closely: Mapping[str, Any]) -> None:
        self._write(lambda: {"kind": "predictions", "step": step, **closely})

    def record_checkpoint(self, saved: Saved, seconds_blocked: float) -> None:
        fields = {
            "step": saved.step,
            "name": saved.name,
            "seconds": seconds_blocked,
            "seconds_written": saved.seconds,
            "num_bytes": saved.num_bytes,
        }
        self._write(lambda: {"kind": "checkpoint", **fields})
        self._write(self._books.record)

    def message(self, level: Level, text: str) -> None:
        step = self._step
        self._write(lambda: {"kind": "message", "step": step, "level": level, "text": text})

    def flush(self) -> None:
        self._ledger.flush()

    def close(self, outcome: Outcome) -> OSError | None:
        ended: Record = {"kind": "outcome", "time": now(), "reason": outcome.reason}
        # what it means for the accounts, but before it: it stays the last record of a start
        self._write(lambda: self._books.record(ended))
        self._write(lambda: {"kind": "outcome", **asdict(outcome)})
        return self._ledger.close()

    def _leave_out(self, first: int, last: int) -> None:
        batches = set(range(first, last + 1)) - self._quarantined
        self._quarantined |= batches
        self._counts["num_quarantined"] += len(batches)

    def _write(self, make: Callable[[], Record | None]) -> None:
        time, start = now(), self._start

        def stamped() -> Record | None:
            fields = make()
            if fields is None:
                return None
            record = {"kind": fields.pop("kind"), "time": time, "start": start} | fields | {"start": start}
            self._books.feed(record)
            return record

        self._ledger.write(stamped)


_VERDICTS: Mapping[type, str] = {
    Step: "step",
    Skip: "skip",
    Replay: "replay",
    Examine: "examine",
    Rollback: "rollback",
    Halt: "halt",
}

COUNTS = ("num_skipped", "num_clipped", "num_incidents", "num_rollbacks", "num_quarantined")
"""Counts over the history that led to the present weights: attempts that were not applied, updates that were clipped,
incidents, rollbacks, batches left out. A rollback does not take them back, since what it undid did happen; a start
that resumes from a checkpoint does take back what came after the checkpoint, since that will happen again."""


def clips(verdict: Step, grad_norm: float) -> bool:
    """Whether carrying out the verdict makes the gradient smaller."""
    return any(scale < 1 for scale in verdict.scales or ()) or 0 < verdict.clip < grad_norm


def rounded(values: FloatArray) -> list[float]:
    """The values with 5 significant digits: enough to see and to judge, a third of the bytes."""
    return [
        float(f"{value:.{_SIGNIFICANT_DIGITS - 1}e}") if math.isfinite(value) else value for value in values.tolist()
    ]


def next_attempt(run_dir: Path, resumed_from: Position | None) -> int:
    """The number of the next attempt: beyond every attempt of the ledger, also those after the checkpoint."""
    return 1 + max(last_attempt(run_dir / FILE_NAME), resumed_from.attempt if resumed_from else 0)


def _counts_at(path: Path, attempt: int) -> dict[str, int]:
    """The counts as they stood after an attempt."""
    newest = last_record(path, lambda record: "num_skipped" in record and record["attempt"] <= attempt)
    return {name: newest.get(name, 0) if newest else 0 for name in COUNTS}


def _views(run_dir: Path, config: TelemetryConfig) -> list[Callable[[], View]]:
    views: list[Callable[[], View]] = [lambda: console_view(config.console)]
    if config.tensorboard:
        views.append(lambda: TensorBoardView(run_dir / FOLDER))
    return views
