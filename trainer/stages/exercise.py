"""One short run with faults in it, watched: what the drill, its benchmark and the tests of the promises are made of."""

from __future__ import annotations

import gc
import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.config.files import RunFiles
from trainer.engine.injection import Injector
from trainer.engine.state import read_state
from trainer.engine.zero import Engine
from trainer.errors import ExitCode, RunHaltedError
from trainer.faults import Fault
from trainer.faults.inject import FaultInjector
from trainer.faults.poison import strikes_of_data
from trainer.faults.sentence import Kind
from trainer.loop import Parts
from trainer.records import (
    IncidentEvent,
    Outcome,
    Position,
    Replay,
    Rewind,
    Rollback,
    Skip,
    Step,
    StepStats,
    Timing,
    Verdict,
)
from trainer.saving import NoSaving, Saving
from trainer.stages.build import Setting
from trainer.stages.training import Training
from trainer.telemetry.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is kept of one pass through the loop."""

    stats: StepStats
    verdict: Verdict
    applied: bool
    at: float
    """Seconds since the run began."""

    @property
    def alarmed(self) -> bool:
        return not isinstance(self.verdict, Step)


@dataclass(slots=True)
class Run:
    """A run that was watched from its first step to its end."""

    ended: str = "completed"
    """completed · halted"""
    message: str = ""
    """The diagnosis of a halt."""
    held_out_loss: float = math.nan
    seconds: float = 0.0
    digest: str = ""
    """Of the whole training state over all ranks, to the bit."""
    quarantine: tuple[tuple[int, int], ...] = ()
    struck: int | None = None
    """The first attempt that the fault struck; None: it never did."""
    attempts: list[Attempt] = field(default_factory=list)
    rewinds: list[Rewind] = field(default_factory=list)
    events: list[IncidentEvent] = field(default_factory=list)

    @property
    def alarms(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.alarmed]

    @property
    def cooled(self) -> bool:
        """Whether the learning rate was ever lowered."""
        return any(isinstance(a.verdict, Step) and a.verdict.lr_scale != 1 for a in self.attempts)

    @property
    def lost(self) -> int:
        """Attempts of which nothing stands in the final weights: left out, replayed or undone."""
        stands = sum(attempt.applied for attempt in self.attempts)
        return len(self.attempts) - stands + sum(rewind.from_step - rewind.to_step for rewind in self.rewinds)

    def decisions(self) -> list[str]:
        """What this rank saw and decided, attempt by attempt: the same lines on every rank."""
        return [
            f"{a.stats.attempt} {a.stats.step} {a.stats.batch_index} {a.stats.loss!r} {a.stats.grad_norm!r} "
            f"{a.verdict!r} {a.applied}"
            for a in self.attempts
        ] + [f"{replace(rewind, seconds=0)!r}" for rewind in self.rewinds]


class Watched:
    """A recorder that remembers, on every rank, and passes on."""

    def __init__(self, inner: Recorder, run: Run):
        self._inner = inner
        self._run = run
        self._began = time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def record_attempt(
        self,
        stats: StepStats,
        verdict: Verdict,
        timing: Timing,
        lr: float,
        epoch: int,
        applied: bool,
        scores: Mapping[str, float],
        incident: int,
    ) -> None:
        self._run.attempts.append(Attempt(stats, verdict, applied, time.perf_counter() - self._began))
        self._inner.record_attempt(stats, verdict, timing, lr, epoch, applied, scores, incident)

    def record_rewind(self, rewind: Rewind) -> None:
        self._run.rewinds.append(rewind)
        self._inner.record_rewind(rewind)

    def record_incident(self, event: IncidentEvent) -> None:
        self._run.events.append(event)
        self._inner.record_incident(event)


class OnlyAt(NoSaving):
    """Saves one step of a run, and nothing else.

    Args:
        step: None: not even that.
    """

    def __init__(self, inner: Saving, step: int | None):
        self._inner = inner
        self._step = step

    def due(self, position: Position) -> None:
        if position.step == self._step:
            self._inner.due(position)

    def finish(self, position: Position, *, completed: bool) -> None:
        self._inner.settle()
        if position.step == self._step:
            self._inner.finish(position, completed=completed)


class Unsaved(Training):
    """Training that saves nothing, or one step only."""

    keep_step: int | None = None

    @contextmanager
    def parts(self) -> Iterator[Parts]:
        with super().parts() as parts:
            yield replace(parts, saver=OnlyAt(parts.saver, self.keep_step))


def exercise(
    setting: Setting,
    faults: Sequence[Fault] = (),
    *,
    name: str,
    start: Path | None = None,
    keep_step: int | None = None,
    leave_out: Sequence[tuple[int, int]] = (),
) -> Run:
    """Train `setting.config` to its last step, with the faults, and tell what happened.

    The ledger and the incidents lie in the folder `name` of the run directory, which is made anew. A collective.

    Args:
        start: a checkpoints folder to go on from; by default it begins with the first step.
        keep_step: save a checkpoint at this step, and at no other.
        leave_out: batches in quarantine from the beginning, first … last.
    """
    ranks = setting.ranks
    root = setting.files.root / name
    if ranks.is_first:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if start is not None:
            RunFiles(root).checkpoints.symlink_to(start)
    dist.barrier()
    setting = replace(setting, files=RunFiles(root))
    if keep_step is not None:
        config = setting.config
        every = config.checkpoint.model_copy(update={"every": keep_step})
        setting = replace(setting, config=config.model_copy(update={"checkpoint": every}))
    stage = Unsaved(setting, faults)
    stage.keep_step = keep_step
    for first, last in leave_out:
        stage.stream.leave_out(first, last)
    if leave_out:
        # what was read ahead does not know of it
        stage.stream.seek(stage.stream.next_batch)
    run = Run()
    telemetry = stage.telemetry
    stage.telemetry = Watched(telemetry, run)  # type: ignore[assignment]
    began = time.perf_counter()
    try:
        ending = stage.run()
        run.held_out_loss = ending.held_out_loss if ending.held_out_loss is not None else math.nan
        outcome = stage.outcome(ending)
    except RunHaltedError as error:
        run.ended, run.message = "halted", str(error)
        outcome = Outcome("halted", ExitCode.HALTED, str(error), 0, stage.numbers.steps, None)
    run.seconds = time.perf_counter() - began
    telemetry.close(outcome)
    run.digest = state_digest(stage.engine)
    run.quarantine = stage.stream.quarantine.ranges
    run.struck = first_strike(stage.injector, faults, run)
    release(stage.engine)
    dist.barrier()
    if start is not None and ranks.is_first:
        RunFiles(root).checkpoints.unlink()
    return run


def first_strike(injector: Injector, faults: Sequence[Fault], run: Run) -> int | None:
    """The first attempt that a fault struck on any rank. A damaged snapshot counts only where nothing else does."""
    corrupted = Kind.CORRUPT_SNAPSHOT.value
    told: list[list[tuple[int, str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, injector.struck if isinstance(injector, FaultInjector) else [])
    struck = [(attempt, corrupted in sentence) for of_rank in told for attempt, sentence in of_rank]
    strikes = strikes_of_data(faults)
    for attempt in run.attempts:
        if any(strike.covers(attempt.stats.batch_index) for strike in strikes):
            struck.append((attempt.stats.attempt, False))
            break
    visible = [attempt for attempt, hidden in struck if not hidden]
    return min(visible or [attempt for attempt, _ in struck], default=None)


def state_digest(engine: Engine) -> str:
    """Of master weights and optimizer state of all ranks, to the bit; the same on every rank. A collective."""
    tensors, _ = read_state(engine)
    own = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        own.update(name.encode())
        own.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    of_ranks = [""] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own.hexdigest())
    return hashlib.blake2b(" ".join(of_ranks).encode(), digest_size=16).hexdigest()


def release(engine: Engine) -> None:
    """Give the memory of an engine back, so that the next one finds room."""
    engine.deepspeed.destroy()
    gc.collect()
    # what is left are the libraries: the next collection need not walk through them again
    gc.freeze()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def rungs(run: Run) -> tuple[str, ...]:
    """What was done about alarms, in the order of first use."""
    words = {Replay: "replay", Skip: "skip", Rollback: "rollback"}
    used: list[str] = []
    for attempt in run.alarms:
        if isinstance(attempt.verdict, Rollback):
            word = "rollback" if attempt.verdict.quarantine is None else "rollback + quarantine"
        else:
            word = words.get(type(attempt.verdict), "halt")
        if word not in used:
            used.append(word)
    return tuple(used)
