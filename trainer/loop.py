"""The training loop: batch, look, verdict, step or not, record, upkeep. Every stage uses this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from trainer.config.schema import RunConfig
from trainer.engine.stats import digest
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError, RunHaltedError
from trainer.records import Batch, Halt, Position, Skip, Step, StepStats, Verdict
from trainer.stability.guard import Guard
from trainer.stop import StopRequest
from trainer.telemetry.recorder import Recorder
from trainer.telemetry.timing import StepTimer


class Stream(Protocol):
    """Batches in order, and the index after the last one handed out."""

    @property
    def next_batch(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop works with. A stage builds these; nothing in the loop knows which stage it is."""

    config: RunConfig
    steps: int
    engine: Engine
    stream: Stream
    guard: Guard
    telemetry: Recorder
    timer: StepTimer
    stop: StopRequest
    learning_rate: Callable[[int], float]
    """Of the update that makes the given step."""
    evaluate: Callable[[int], float]
    """Held-out loss at a step; records it."""
    save: Callable[[Position], None]
    """Write and commit a checkpoint; records it. Raises CheckpointError on all ranks alike."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Where and why the loop ended."""

    position: Position
    stopped: bool
    """Asked to stop before the last step."""
    held_out_loss: float | None


@dataclass(slots=True)
class Progress:
    """Where the loop stands: kept outside of it, so that it is known after an error too."""

    position: Position


def train(parts: Parts, progress: Progress) -> Ending:
    """Train from where `progress` stands to the last step, or until asked to stop.

    Raises:
        RunHaltedError: the guard's diagnosis. What was saved before stays.
    """
    engine, guard, telemetry = parts.engine, parts.guard, parts.telemetry
    position = progress.position
    decision, saved_step, stopped = 0, position.step, False
    while position.step < parts.steps and not stopped:
        parts.timer.begin()
        batch = next(parts.stream)
        stats = engine.accumulate(
            batch,
            attempt=position.attempt + 1,
            step=position.step + 1,
            stop=parts.stop.requested,
            decision=decision,
        )
        verdict = guard.judge(stats)
        decision = digest(stats.attempt, stats.step, verdict)
        rate = parts.learning_rate(stats.step)
        applied = carry_out(verdict, stats, rate, parts)
        position = Position(step=position.step + applied, attempt=stats.attempt, next_batch=parts.stream.next_batch)
        progress.position = position
        telemetry.record_attempt(
            stats, verdict, parts.timer.end(batch.seconds_waiting), lr=rate, epoch=batch.epoch, applied=applied
        )
        if isinstance(verdict, Halt):
            raise RunHaltedError(verdict.reason)
        stopped = stats.stop_votes > 0 and position.step < parts.steps
        if stopped:
            telemetry.message("warning", f"asked to stop: saving at step {position.step}")
        elif applied:
            saved_step = upkeep(parts, position, saved_step)
    if position.step != saved_step or stopped:
        parts.save(position)
    return Ending(position, stopped, None if stopped else parts.evaluate(position.step))


def carry_out(verdict: Verdict, stats: StepStats, rate: float, parts: Parts) -> bool:
    """Apply or drop the gradient. Returns whether the weights were updated; telemetry says so where they were not."""
    engine, telemetry = parts.engine, parts.telemetry
    match verdict:
        case Step(clip=clip):
            every = parts.config.telemetry.weights_every
            if every is None or stats.step % every:
                applied = engine.apply(clip, rate)
            else:
                applied, weights = engine.apply_measured(clip, rate)
                telemetry.record_weights(stats.step, weights.parameter_norms, weights.update_ratios)
            return applied
        case Skip() | Halt():
            engine.discard()
            return False


def upkeep(parts: Parts, position: Position, saved_step: int) -> int:
    """Evaluate and save where it is due. Returns the step of the newest checkpoint."""
    config = parts.config
    if position.step == parts.steps:
        return saved_step
    if config.evaluation.every and position.step % config.evaluation.every == 0:
        parts.evaluate(position.step)
    if config.checkpoint.every and position.step % config.checkpoint.every == 0:
        try:
            parts.save(position)
        except CheckpointError as error:
            parts.telemetry.message("error", f"no checkpoint at step {position.step}, training goes on: {error}")
            return saved_step
        return position.step
    return saved_step
