"""The training loop: batch, look, verdict, step or not, record, upkeep. Every stage uses this one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from trainer.best import Best
from trainer.config.schema import RunConfig
from trainer.engine.stats import digest
from trainer.engine.zero import Engine
from trainer.errors import RunHaltedError, SaveFailedError
from trainer.heartbeat import Heartbeat
from trainer.records import Batch, Examine, Halt, Position, Replay, Rollback, Skip, Step, StepStats, Verdict
from trainer.recovery import Recovery, Stream
from trainer.saving import Saving
from trainer.stability.guard import Guard
from trainer.stop import StopRequest
from trainer.telemetry.recorder import Recorder
from trainer.telemetry.timing import StepTimer


class TeacherWatch(Protocol):
    """Knows until when the weights that are learned from were as they were loaded."""

    @property
    def verified_step(self) -> int:
        """The newest update that was certainly made with them unharmed."""
        ...

    def look(self, step: int, *, alarming: bool) -> str | None:
        """Compare them where it is due or there was an alarm, and put right what is not as it was. A collective.

        Args:
            step: that is attempted.

        Returns:
            What was found and put right, in one sentence; None: nothing. Equal on all ranks.
        """
        ...

    def went_back(self, step: int) -> None:
        """A rollback went to `step`."""
        ...


class NoTeacher:
    """Nothing is learned from but data."""

    verified_step = 0

    def look(self, step: int, *, alarming: bool) -> str | None:  # noqa: ARG002
        return None

    def went_back(self, step: int) -> None:
        pass


NO_TEACHER = NoTeacher()


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop works with. A stage builds these; nothing in the loop knows which stage it is."""

    config: RunConfig
    steps: int
    engine: Engine
    stream: Stream
    guard: Guard
    recovery: Recovery
    telemetry: Recorder
    timer: StepTimer
    stop: StopRequest
    learning_rate: Callable[[int], float]
    """Of the update that makes the given step."""
    evaluate: Callable[[int], float | None]
    """Held-out loss at a step; records it. None: given up, since a rank was asked to stop."""
    saver: Saving
    heartbeat: Heartbeat
    best: Best = field(default_factory=lambda: Best(None))
    """Compares the evaluations; `evaluate` tells it of each."""
    teacher: TeacherWatch = NO_TEACHER
    """Looks after the weights that are learned from."""
    notice: Callable[[StepStats], None] = lambda _: None
    """Looks at every attempt for what changes nothing, and is to be said: ranks that are slow."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Where and why the loop ended."""

    position: Position
    stopped: bool
    """Asked to stop before the end."""
    held_out_loss: float | None


@dataclass(slots=True)
class Progress:
    """Where the loop stands: kept outside of it, so that it is known after an error too."""

    position: Position


def train(parts: Parts, progress: Progress) -> Ending:
    """Train from where `progress` stands to the last step, or until asked to stop.

    Raises:
        RunHaltedError: the guard's diagnosis. What was saved before stays.
        SaveFailedError: the run cannot be saved any more.
        SupersededError: a newer start of the run has taken over.
    """
    guard, recovery, stream = parts.guard, parts.recovery, parts.stream
    position = progress.position
    decision = 0
    again: Batch | None = None
    recovery.snapshot(position)
    lacking = parts.best.lacks(position.step, parts.config.evaluation.every)
    stopped = lacking and evaluated(parts, position) is None
    while position.step < parts.steps and not stopped and not parts.best.spent:
        parts.timer.begin()
        parts.heartbeat.beat("computing", position.step)
        batch = again or take_batch(parts, position)
        stats = look(parts, batch, position, decision)
        verdict = guard.judge(stats)
        if (harm := parts.teacher.look(stats.step, alarming=not isinstance(verdict, Step | Skip))) is not None:
            parts.telemetry.message("error", harm)
            verdict = guard.teacher_harmed(stats, harm, parts.teacher.verified_step) or verdict
        if examined := isinstance(verdict, Examine):
            parts.engine.discard()
            verdict = guard.weigh(recovery.examine(batch, stats))
        decision = digest(stats.attempt, stats.step, verdict, guard.fingerprint())
        rate = parts.learning_rate(stats.step) * (verdict.lr_scale if isinstance(verdict, Step) else 1.0)
        applied = carry_out(verdict, stats, batch, rate, parts, dropped=examined)
        again = batch if isinstance(verdict, Replay) else None
        next_batch = stream.next_batch
        if again and batch.batch_index == next_batch - 1:
            # it was not consumed yet: a run that stops here begins with it
            next_batch = batch.batch_index
        position = Position(position.step + applied, stats.attempt, next_batch)
        parts.telemetry.record_attempt(
            stats,
            verdict,
            parts.timer.end(batch.seconds_waiting),
            lr=rate,
            epoch=batch.epoch,
            applied=applied,
            scores=guard.scores,
            incident=guard.incident,
        )
        parts.notice(stats)
        if isinstance(verdict, Rollback):
            went_back = recovery.perform(verdict, stats)
            if went_back is None:
                verdict = guard.cannot_roll_back(verdict, stats)
            else:
                position = went_back
                parts.teacher.went_back(position.step)
                parts.best.went_back(position.step)
        recovery.tell()
        parts.saver.look(applied=applied, in_incident=guard.incident > 0, step=position.step)
        progress.position = position
        if isinstance(verdict, Halt):
            with contextlib.suppress(SaveFailedError):
                parts.saver.settle()
            raise RunHaltedError(verdict.reason)
        stopped = stats.stop_votes > 0 and position.step < parts.steps
        if stopped:
            parts.telemetry.message("warning", f"asked to stop: saving at step {position.step}")
        elif applied:
            stopped = not upkeep(parts, position)
    recovery.fence()
    parts.heartbeat.beat("saving")
    parts.saver.finish(position, completed=not stopped)
    parts.heartbeat.beat("ending")
    loss = None if stopped else evaluated(parts, position)
    return Ending(position, loss is None, loss)


def take_batch(parts: Parts, position: Position) -> Batch:
    """The next one of the data, or in the last steps, where asked for, one that was left out before."""
    index = parts.guard.next_revisit(parts.steps - position.step)
    return next(parts.stream) if index is None else parts.stream.read(index)


def look(parts: Parts, batch: Batch, position: Position, decision: int) -> StepStats:
    """Compute a gradient, and what all ranks must know of it. Nothing is applied."""
    step, every = position.step + 1, parts.config.guard.checksum_every
    part_norms_every = parts.config.telemetry.part_norms_every
    if part_norms_every is not None and step % part_norms_every == 0 and (norms := parts.engine.part_norms(batch)):
        parts.telemetry.record_part_norms(step, norms)
    if measured(parts, step):
        parts.engine.observe_next()
    return parts.engine.accumulate(
        batch,
        attempt=position.attempt + 1,
        step=step,
        stop=parts.stop.requested,
        decision=decision,
        checksum=every is not None and position.step > 0 and position.step % every == 0,
        impossible=parts.recovery.impossible(),
    )


def measured(parts: Parts, step: int) -> bool:
    """Whether weights and slow signs are measured on the update that makes `step`."""
    every = parts.config.telemetry.weights_every
    return every is not None and step % every == 0


def carry_out(
    verdict: Verdict, stats: StepStats, batch: Batch, rate: float, parts: Parts, *, dropped: bool = False
) -> bool:
    """Apply or drop the gradient (`dropped`: that was done). Returns whether the weights were updated."""
    engine, telemetry, recovery = parts.engine, parts.telemetry, parts.recovery
    recovery.fence()
    match verdict:
        case Step(clip=clip, scales=scales):
            if not measured(parts, stats.step):
                applied = engine.apply(clip, rate, scales)
            else:
                applied, weights = engine.apply_measured(clip, rate, scales)
                structure = engine.structure(weights)
                telemetry.record_structure(stats.step, structure)
                for warning in parts.guard.observe(stats.step, structure):
                    telemetry.message("warning", warning)
            if applied:
                recovery.remember(batch, stats.loss)
            return applied
        case Skip(quarantine=quarantine):
            if quarantine:
                parts.stream.leave_out(batch.batch_index, batch.batch_index)
        case Halt():
            recovery.keep_evidence(batch, stats)
        case _:
            pass
    if not dropped:
        engine.discard()
    return False


def upkeep(parts: Parts, position: Position) -> bool:
    """Keep a snapshot, save and evaluate where it is due. Returns whether to go on."""
    if position.step == parts.steps:
        return True
    parts.recovery.snapshot(position)
    every = parts.config.evaluation.every
    if every and position.step % every == 0 and evaluated(parts, position) is None and parts.best.score:
        # the next start evaluates here: it must be here that it begins
        return False
    parts.saver.due(position)
    return True


def evaluated(parts: Parts, position: Position) -> float | None:
    """Held-out loss; where the evaluation is better than all before, the state is saved and kept. None: given up."""
    before, loss = parts.best.best, parts.evaluate(position.step)
    best = parts.best.best
    if best is not None and best != before and parts.best.score is not None:
        parts.saver.best(position, parts.best.score, best.value)
    return loss
