"""What the loop tells, rank 0 to the ledger and its views; the other ranks hold a `NoTelemetry` and need no `if`s."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from trainer.config.schema import TelemetryConfig
from trainer.records import FloatArray, Halt, Outcome, Position, Skip, Step, StepStats, Timing, Verdict
from trainer.telemetry.display import console_view
from trainer.telemetry.ledger import FILE_NAME, Record, last_attempt, last_record, last_start
from trainer.telemetry.tensorboard import FOLDER, TensorBoardView
from trainer.telemetry.writer import Ledger, View, now

Level = Literal["info", "warning", "error"]

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


class Recorder(Protocol):
    """What the loop sees."""

    def record_attempt(
        self, stats: StepStats, verdict: Verdict, timing: Timing, lr: float, epoch: int, applied: bool
    ) -> None:
        """One pass through the loop. `applied`: whether the update was carried out."""

    def record_weights(self, step: int, parameter_norms: FloatArray, update_ratios: FloatArray) -> None:
        """Norm of every parameter [parameters], and of its last update over that norm [parameters]."""

    def record_evaluation(self, step: int, loss: float, num_targets: int, seconds: float) -> None:
        """Held-out loss in nats a target."""

    def record_checkpoint(self, step: int, name: str, seconds: float, num_bytes: int) -> None:
        """A committed checkpoint; `seconds` that the loop stood still for it."""

    def message(self, level: Level, text: str) -> None:
        """Something that a person must hear: console, ledger and TensorBoard."""

    def flush(self) -> None:
        """Waits until all of it is on disk: before a checkpoint is committed."""

    def close(self, outcome: Outcome) -> OSError | None:
        """Records the end and waits for the disk; the error where records are missing there."""


class NoTelemetry:
    """Records nothing: every rank but the first."""

    def record_attempt(self, *_: object, **__: object) -> None:
        pass

    def record_weights(self, *_: object, **__: object) -> None:
        pass

    def record_evaluation(self, *_: object, **__: object) -> None:
        pass

    def record_checkpoint(self, *_: object, **__: object) -> None:
        pass

    def message(self, *_: object, **__: object) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, *_: object, **__: object) -> OSError | None:
        return None


class Telemetry:
    """Turns what the loop tells into ledger records. The methods only note their arguments; a thread does the work."""

    def __init__(self, ledger: Ledger, start: int, norms_every: int, num_skipped: int, num_clipped: int, step: int):
        self._ledger = ledger
        self._start = start
        self._norms_every = norms_every
        self._num_skipped = num_skipped
        self._num_clipped = num_clipped
        self._step = step

    @classmethod
    def open(
        cls, run_dir: Path, config: TelemetryConfig, facts: RunFacts, resumed_from: Position | None = None
    ) -> Telemetry:
        """Opens the ledger of a run with the views that the config asks for, and records the start.

        Raises:
            RunDirectoryError: the run directory is not writable.
        """
        path = run_dir / FILE_NAME
        start = last_start(path) + 1
        position = resumed_from or Position()
        before = _newest_standing(path, position.step)
        telemetry = cls(
            Ledger(path, _views(run_dir, config)),
            start,
            config.norms_every,
            before["num_skipped"] if before else 0,
            before["num_clipped"] if before else 0,
            position.step,
        )
        telemetry._write(
            lambda: {
                "kind": "start",
                **asdict(facts),
                "resumed_step": position.step,
                "resumed_attempt": position.attempt,
                "hostname": socket.gethostname(),
            }
        )
        return telemetry

    def record_attempt(
        self, stats: StepStats, verdict: Verdict, timing: Timing, lr: float, epoch: int, applied: bool
    ) -> None:
        clip = verdict.clip if isinstance(verdict, Step) else None
        clipped = applied and clip is not None and 0 < clip < stats.grad_norm
        self._num_skipped += not applied
        self._num_clipped += clipped
        self._step = stats.step if applied else stats.step - 1
        num_skipped, num_clipped = self._num_skipped, self._num_clipped
        # an attempt that was not applied is evidence: it is always whole
        whole = stats.step % self._norms_every == 0 or not applied
        norms = stats.parameter_norms.copy() if whole else None
        ranks = stats.rank_seconds.copy()

        def make() -> Record:
            record: Record = {
                "kind": "attempt",
                "attempt": stats.attempt,
                "step": stats.step,
                "batch": stats.batch_index,
                "epoch": epoch,
                "loss": float(stats.loss),
                "parts": {name: float(value) for name, value in stats.parts.items()},
                "targets": stats.num_targets,
                "grad_norm": float(stats.grad_norm),
                "nonfinite": stats.num_nonfinite,
                "lr": float(lr),
                "verdict": _VERDICTS[type(verdict)],
                "reason": None if isinstance(verdict, Step) else verdict.reason,
                "clip": clip,
                "clipped": clipped,
                "applied": applied,
                "num_skipped": num_skipped,
                "num_clipped": num_clipped,
                "seconds": timing.seconds,
                "seconds_data": timing.seconds_data,
                "tokens_per_second": timing.tokens_per_second,
                "flop_utilisation": timing.flop_utilisation,
                "memory_bytes": timing.memory_bytes,
                "loss_scale": float(stats.loss_scale),
                "stop_votes": stats.stop_votes,
                "agree": stats.agree,
                "rank_seconds": rounded(ranks),
            }
            if norms is not None:
                record["parameter_norms"] = rounded(norms)
            return record

        self._write(make)

    def record_weights(self, step: int, parameter_norms: FloatArray, update_ratios: FloatArray) -> None:
        norms, ratios = parameter_norms.copy(), update_ratios.copy()
        self._write(
            lambda: {
                "kind": "weights",
                "step": step,
                "parameter_norms": rounded(norms),
                "update_ratios": rounded(ratios),
            }
        )

    def record_evaluation(self, step: int, loss: float, num_targets: int, seconds: float) -> None:
        fields = {"step": step, "loss": float(loss), "targets": num_targets, "seconds": seconds}
        self._write(lambda: {"kind": "evaluation", **fields})

    def record_checkpoint(self, step: int, name: str, seconds: float, num_bytes: int) -> None:
        fields = {"step": step, "name": name, "seconds": seconds, "num_bytes": num_bytes}
        self._write(lambda: {"kind": "checkpoint", **fields})

    def message(self, level: Level, text: str) -> None:
        step = self._step
        self._write(lambda: {"kind": "message", "step": step, "level": level, "text": text})

    def flush(self) -> None:
        self._ledger.flush()

    def close(self, outcome: Outcome) -> OSError | None:
        self._write(lambda: {"kind": "outcome", **asdict(outcome)})
        return self._ledger.close()

    def _write(self, make: Callable[[], Record]) -> None:
        time, start = now(), self._start

        def stamped() -> Record:
            fields = make()
            return {"kind": fields.pop("kind"), "time": time, "start": start} | fields

        self._ledger.write(stamped)


_VERDICTS: Mapping[type, str] = {Step: "step", Skip: "skip", Halt: "halt"}


def rounded(values: FloatArray) -> list[float]:
    """The values with 5 significant digits: enough to see and to judge, a third of the bytes."""
    return [
        float(f"{value:.{_SIGNIFICANT_DIGITS - 1}e}") if math.isfinite(value) else value for value in values.tolist()
    ]


def next_attempt(run_dir: Path, resumed_from: Position | None) -> int:
    """The number of the next attempt: beyond every attempt of the ledger, also those after the checkpoint."""
    return 1 + max(last_attempt(run_dir / FILE_NAME), resumed_from.attempt if resumed_from else 0)


def _newest_standing(path: Path, step: int) -> Record | None:
    """The record of the attempt that became `step` in the present weights."""
    if step == 0:
        return None
    return last_record(
        path, lambda record: record["kind"] == "attempt" and record["applied"] and record["step"] <= step
    )


def _views(run_dir: Path, config: TelemetryConfig) -> list[Callable[[], View]]:
    views: list[Callable[[], View]] = [lambda: console_view(config.console)]
    if config.tensorboard:
        views.append(lambda: TensorBoardView(run_dir / FOLDER))
    return views
