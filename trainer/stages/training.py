"""A start of any run that trains: builds the parts that its stage asks for and calls the loop."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from trainer.best import Best
from trainer.checkpoint.manifest import Manifest
from trainer.config.load import dump_config
from trainer.config.memory import copies
from trainer.config.resolve import arithmetic, fingerprint
from trainer.data.on_policy import OnPolicy
from trainer.data.order import Order, Quarantine
from trainer.data.samples import Samples
from trainer.data.stream import Stream as DataStream
from trainer.engine.state import optimizer_kind
from trainer.engine.zero import NO_INJECTION
from trainer.errors import ExitCode, TrimtabError
from trainer.faults import Fault, poisoned
from trainer.faults.inject import FaultInjector
from trainer.heartbeat import RELAUNCHED_VARIABLE
from trainer.knowledge import Teacher
from trainer.loop import NO_TEACHER, Ending, Parts, Progress, TeacherWatch, train
from trainer.model.configuration import decoder_start
from trainer.optim.schedule import learning_rate
from trainer.records import Outcome, Position, StepStats
from trainer.recovery import NoReports, Recovery, Stream
from trainer.report.incident import IncidentReports
from trainer.saving import Saver
from trainer.stability.straggler import Stragglers, sentence
from trainer.stages.augmenting import open_augmentation
from trainer.stages.build import Setting, build_engine, make_guard, make_timer
from trainer.stages.comparing import compare, told
from trainer.stages.comparing import ending as ending_of
from trainer.stages.held_out import evaluate_held_out
from trainer.stages.storage import Storage
from trainer.telemetry.books import JOB_VARIABLE
from trainer.telemetry.ledger import last_incident
from trainer.telemetry.recorder import Level, Recorder, RunFacts, Telemetry, next_attempt
from trainer.telemetry.silent import NoTelemetry

if TYPE_CHECKING:
    from trainer.stages.distill import Distillation

_REASONS = {ExitCode.HALTED: "halted", ExitCode.CRASHED: "crashed", ExitCode.SUPERSEDED: "superseded"}
_LIBRARIES = ("torch", "deepspeed", "accelerate", "transformers", "datasets", "tokenizers", "numpy")


class Training:
    """One start of a run.

    Args:
        faults: put into it on purpose.

    Attributes:
        progress: where it stands; moves while :meth:`run` goes on.
        telemetry: of this rank.
    """

    def __init__(
        self,
        setting: Setting,
        faults: Sequence[Fault] = (),
    ):
        self.setting = setting
        config, ranks = setting.config, setting.ranks
        self.numbers = arithmetic(config, ranks.world_size)
        self.injector = (
            FaultInjector(faults, ranks.rank, ranks.world_size, setting.fence.number, setting.files)
            if faults
            else NO_INJECTION
        )
        self._untold: list[tuple[Level, str]] | None = []
        self.teacher, objective = self._open_teacher()
        self.engine = build_engine(setting, self.numbers, self.injector, objective)
        if objective is not None:
            objective.attach(self.engine)
        self.engine.alive = partial(setting.heartbeat.beat, "computing")
        self.guard = make_guard(setting, self.engine)
        self._stragglers = Stragglers(ranks.world_size)
        self.telemetry: Recorder = NoTelemetry()
        self._saver: Saver | None = None
        self._best = Best(config.evaluation.best, config.evaluation.patience)
        self._held_out: tuple[int, float] | None = None
        """Step and loss of the newest evaluation of this start."""
        self.storage = Storage(setting, self.engine, self.injector, flush=lambda: self.telemetry.flush(), say=self._say)
        self._excluded = Quarantine(config.data.exclude_batches)
        self.resumed = self.storage.resume()
        self.progress = Progress(self._position())
        self.telemetry = self._open_telemetry()
        untold, self._untold = self._untold, None
        for level, text in untold:
            self.telemetry.message(level, text)
        self.reports = self._open_reports()
        classes = setting.prepared.classes
        num_classes = len(classes.names) if classes else 0
        self.stream: Stream = poisoned(self._open_stream(), faults, setting.prepared.vocabulary, num_classes)
        for fault in faults:
            if any(strike.start in (None, self._start) or strike.every_time for strike in fault.strikes):
                self.telemetry.message("warning", f"put into this run on purpose: {fault}")

    def run(self) -> Ending:
        """Train to the end or until asked to stop."""
        with self.parts() as parts:
            return train(parts, self.progress)

    @contextmanager
    def parts(self) -> Iterator[Parts]:
        """What the loop works with; threads and buffers end with the context."""
        config = self.setting.config
        snapshots, saving = copies(config)
        with ExitStack() as stack:
            if self.teacher is not None:
                stack.callback(self.teacher.close)
            stack.callback(self.reports.close)
            stack.callback(self.stream.close)
            ring = self.storage.make_ring()
            if ring is not None:
                stack.callback(ring.close)
            saver = self._saver = Saver(
                self.engine,
                self.storage.store,
                self.telemetry,
                config=config.checkpoint,
                memory=self.storage.memory,
                ring=ring if saving else None,
                describe=self._manifest,
                notes=lambda: {
                    "history": self.guard.history(),
                    "ladder": self.guard.ladder(),
                    "best": self._best.to_json(),
                },
                # a state that was in memory is not on disk yet
                resumed=self.progress.position if self.resumed and not self.resumed.from_memory else None,
                newest=self.resumed.newest if self.resumed else None,
                clean_steps=config.guard.clean_steps,
                beat=partial(self.setting.heartbeat.beat, "saving"),
            )
            stack.callback(saver.close)
            recovery = Recovery(
                self.engine,
                self.stream,
                self.guard,
                self.telemetry,
                self.reports,
                saver,
                ring=ring,
                every=config.snapshots.every if snapshots else None,
                load=self.storage.load_at_most,
            )
            yield Parts(
                config=config,
                steps=self.numbers.steps,
                engine=self.engine,
                stream=self.stream,
                guard=self.guard,
                recovery=recovery,
                telemetry=self.telemetry,
                timer=make_timer(self.setting, self.numbers),
                stop=self.setting.stop,
                learning_rate=partial(learning_rate, config.optim, config.schedule, self.numbers),
                evaluate=self._evaluate,
                saver=saver,
                heartbeat=self.setting.heartbeat,
                best=self._best,
                teacher=self._teacher_care(),
                notice=self._notice,
            )

    def outcome(self, ending: Ending) -> Outcome:
        """Why a start ended that ended well."""
        step, steps = ending.position.step, self.numbers.steps
        if ending.stopped:
            signal = self.setting.stop.signal_name or "another rank's signal"
            reason, code = "stopped", ExitCode.STOPPED
            message = f"stopped by {signal} at step {step} of {steps}, everything saved; the same command goes on"
        else:
            reason, code = "completed", ExitCode.COMPLETED
            message = ending_of(self._best, step, steps, ending.held_out_loss)
        return Outcome(reason, code, message, step, steps, self._newest(), ending.held_out_loss, self._start)

    def outcome_of(self, error: BaseException) -> Outcome:
        """Why a start ended that ended in an error."""
        known = isinstance(error, TrimtabError)
        code = error.exit_code if isinstance(error, TrimtabError) else ExitCode.CRASHED
        return Outcome(
            reason=_REASONS.get(code, "refused"),
            exit_code=code,
            message=str(error) if known else f"rank {self.setting.ranks.rank}: {type(error).__name__}: {error}",
            step=self.progress.position.step,
            steps=self.numbers.steps,
            checkpoint=self._newest(),
            start=self._start,
        )

    @property
    def _start(self) -> int:
        return self.setting.fence.number

    def _newest(self) -> str | None:
        """Name of the newest checkpoint, as far as this rank has heard."""
        if self._saver is not None:
            return self._saver.newest
        return self.resumed.newest if self.resumed else None

    def _position(self) -> Position:
        """Where this start begins; guard and quarantine are as they were there. A collective."""
        position = Position()
        if self.resumed is not None:
            manifest = self.resumed.manifest
            position = Position(manifest.step, manifest.attempt, manifest.next_batch)
            self.guard.restore(self.resumed.guard["history"], self.resumed.guard["ladder"])
            if not self._best.restore(self.resumed.guard.get("best")):
                # what was called best was so by another score
                self.storage.store.forget_best()
            shape = self.setting.ranks.world_size, self.engine.stage
            if (manifest.world_size, manifest.stage) != shape and (lost := self.guard.forget_ranks()):
                self._say("warning", lost)
            for first, last in manifest.quarantine:
                self._excluded = self._excluded.with_range(first, last)
        # the ledger may have seen attempts after the checkpoint, or before the first; rank 0 reads it for all
        box = [0, 0]
        if self.setting.ranks.is_first:
            box = [next_attempt(self.setting.files.root, position) - 1, last_incident(self.setting.files.ledger)]
        torch.distributed.broadcast_object_list(box, src=0)
        self.guard.number_incidents_after(box[1])
        return replace(position, attempt=box[0])

    def _say(self, level: Level, text: str) -> None:
        """Tell it, as soon as there is somebody to tell it to."""
        if self._untold is not None:
            self._untold.append((level, text))
        else:
            self.telemetry.message(level, text)

    def _open_reports(self) -> IncidentReports | NoReports:
        if not self.setting.ranks.is_first:
            return NoReports()
        samples = self._samples("train")
        return IncidentReports(self.setting.files.root, samples.describe, self.engine.names)

    def _open_telemetry(self) -> Recorder:
        setting, config = self.setting, self.setting.config
        if not setting.ranks.is_first:
            return NoTelemetry()
        began = psutil.Process().create_time()
        relaunched = json.loads(os.environ.get(RELAUNCHED_VARIABLE, "null"))
        job = json.loads(os.environ.get(JOB_VARIABLE, "null"))
        facts = RunFacts(
            name=config.name,
            ranks=setting.ranks.world_size,
            device=torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
            precision=setting.precision,
            parameter_names=self.engine.names,
            parts=self.engine.minimised,
            steps=self.numbers.steps,
            tokens_per_step=self.numbers.tokens_per_step,
            versions={library: importlib.metadata.version(library) for library in _LIBRARIES},
            config=dump_config(config),
            began=began,
            seconds_loading=self.resumed.seconds if self.resumed else 0.0,
            relaunched=relaunched,
            allocated=job["allocated"] if job else relaunched["ended"] if relaunched else began,
            job=job,
            plan={
                "parameters": setting.facts.num_parameters,
                "ZeRO stage": config.zero.stage,
                "batch": f"{self.numbers.samples} = {self.numbers.micro} micro × {self.numbers.accumulation} "
                f"accumulation × {self.numbers.ranks} ranks",
                "tokens": self.numbers.tokens,
            },
        )
        return Telemetry.open(
            setting.files.root,
            config.telemetry,
            facts,
            resumed_from=self.progress.position if self.progress.position.step else None,
            fence=setting.fence,
        )

    def _open_teacher(self) -> tuple[Teacher | None, Distillation | None]:
        """A collective."""
        setting, config = self.setting, self.setting.config
        if config.distill is None:
            return None, None
        # only here: seconds of imports that other runs need not wait for
        from trainer.stages.distill import Distillation
        from trainer.stages.teachers import note_scores, open_teacher
        from trainer.teacher.across import AcrossTokenizers
        from trainer.teacher.model import TeacherModel

        teacher = open_teacher(setting)
        model = teacher.model if isinstance(teacher, AcrossTokenizers) else teacher
        if self.injector.active and isinstance(model, TeacherModel):
            self.injector.teacher = model.tensors
        if (scores := note_scores(setting, teacher, self.numbers.micro)) is not None:
            self._say("info", f"the teacher on the held-out data: {scores}")
        prepared = setting.prepared
        return teacher, Distillation(teacher, config, vocabulary=prepared.vocabulary, end=prepared.eos_id)

    def _teacher_care(self) -> TeacherWatch:
        if self.teacher is None:
            return NO_TEACHER
        from trainer.stages.teachers import TeacherCare

        return TeacherCare(self.teacher, self.setting.config.guard.checksum_every, self.progress.position.step)

    def _on_policy(self, samples: Samples) -> OnPolicy | None:
        config = self.setting.config
        options = config.distill.on_policy if config.distill else None
        return None if options is None else OnPolicy(samples, options.fraction, options.tokens, config.seed)

    def _samples(self, split: Literal["train", "held_out"]) -> Samples:
        data, start = self.setting.config.data, decoder_start(self.setting.config)
        return self.setting.prepared.samples(split, data.sequence_length, data.boundaries, decoder_start=start)

    def _open_stream(self) -> DataStream:
        setting, config = self.setting, self.setting.config
        samples = self._samples("train")
        order = Order(config.seed, samples.sizes, samples.weights, config.data.shuffle)
        return DataStream(
            samples,
            order,
            batch=self.numbers.samples,
            micro=self.numbers.micro,
            rank=setting.ranks.rank,
            ranks=setting.ranks.world_size,
            objective=config.objective,
            seed=config.seed,
            next_batch=self.progress.position.next_batch,
            quarantine=self._excluded,
            prefetch=config.data.prefetch,
            reading=self.injector.reading,
            alike=config.batch.alike,
            annotate=None if self.teacher is None else self.teacher.annotate,
            on_policy=self._on_policy(samples),
            augment=open_augmentation(
                setting.files, config, setting.prepared, samples, is_first=setting.ranks.is_first, say=self._say
            ),
        )

    def _notice(self, stats: StepStats) -> None:
        if self.setting.config.telemetry.stragglers:
            for straggler in self._stragglers.observe(stats.ranks.seconds):
                level: Level = "info" if straggler.recovered else "warning"
                self.telemetry.message(level, sentence(straggler, self.guard.hosts))

    def _evaluate(self, step: int) -> float | None:
        setting = self.setting
        if self._held_out is not None and self._held_out[0] == step == self._best.newest:
            # early stopping ends where it was evaluated just now
            return self._held_out[1]
        began = time.perf_counter()
        found = evaluate_held_out(setting, self.engine, self.numbers.micro, step, self._say)
        if found is None:
            self.telemetry.message("warning", f"asked to stop: the evaluation at step {step} is given up")
            return None
        seconds = time.perf_counter() - began
        scores = found.scores
        better = compare(self._best, step, {"loss": found.loss, **scores}, self._say)
        best = told(self._best)
        self.telemetry.record_evaluation(step, found.loss, found.num_targets, seconds, scores, best)
        if found.closely is not None:
            self.telemetry.record_predictions(step, found.closely)
        if better:
            self.telemetry.message("info", f"the best so far: {self._best}")
        self._held_out = step, found.loss
        return found.loss

    def _manifest(self, position: Position) -> Manifest:
        return Manifest(
            step=position.step,
            attempt=position.attempt,
            next_batch=position.next_batch,
            quarantine=self.stream.quarantine.ranges,
            world_size=self.setting.ranks.world_size,
            stage=self.engine.stage,
            global_batch=self.numbers.samples,
            config_fingerprint=fingerprint(self.setting.config),
            data_fingerprint=self.setting.prepared.fingerprint,
            precision=self.setting.precision,
            optimizer=optimizer_kind(self.engine),
            parameters=self.engine.names,
            files=(),
        )
