"""Pretraining: text → samples → next or masked token. Builds the parts and calls the loop."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from trainer.checkpoint.manifest import Manifest, name_of
from trainer.checkpoint.store import CheckpointStore, committed_steps
from trainer.config.load import dump_config
from trainer.config.memory import shortage, snapshot_bytes
from trainer.config.resolve import arithmetic, fingerprint
from trainer.data.order import Order, Quarantine
from trainer.data.samples import Samples
from trainer.data.stream import Stream as DataStream
from trainer.data.stream import evaluation_batches
from trainer.engine.snapshot import SnapshotRing
from trainer.engine.state import read_state, write_state
from trainer.engine.zero import NO_INJECTION
from trainer.errors import CheckpointError, ExitCode, TrimtabError
from trainer.faults import Fault, poisoned
from trainer.faults.inject import FaultInjector
from trainer.loop import Ending, Parts, Progress, train
from trainer.optim.schedule import learning_rate
from trainer.records import Outcome, Position
from trainer.recovery import NoReports, Notes, Recovery, Stream
from trainer.report.incident import IncidentReports
from trainer.stages.build import Setting, build_engine, make_guard, make_timer
from trainer.telemetry.ledger import last_incident
from trainer.telemetry.recorder import NoTelemetry, Recorder, RunFacts, Telemetry, next_attempt

_REASONS = {ExitCode.HALTED: "halted", ExitCode.CRASHED: "crashed"}
_LIBRARIES = ("torch", "deepspeed", "accelerate", "transformers", "datasets", "tokenizers", "numpy")


class Pretraining:
    """One start of a pretraining run.

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
        self.store = CheckpointStore(
            setting.files.checkpoints,
            rank=ranks.rank,
            world_size=ranks.world_size,
            keep=config.checkpoint.keep,
            replicated=config.zero.stage == 0,
        )
        self.injector = FaultInjector(faults, ranks.rank, ranks.world_size) if faults else NO_INJECTION
        self.engine = build_engine(setting, self.numbers, self.injector)
        self.guard = make_guard(setting, self.engine)
        self.newest_checkpoint: str | None = None
        self._excluded = Quarantine(config.data.exclude_batches)
        self.progress = Progress(self._resume())
        self.telemetry = self._open_telemetry()
        self.reports = self._open_reports()
        self.stream: Stream = poisoned(self._open_stream(), faults, setting.prepared.vocabulary)
        for fault in faults:
            self.telemetry.message("warning", f"put into this run on purpose: {fault}")

    def run(self) -> Ending:
        """Train to the end or until asked to stop."""
        with self.parts() as parts:
            return train(parts, self.progress)

    @contextmanager
    def parts(self) -> Iterator[Parts]:
        """What the loop works with; threads and buffers end with the context."""
        config = self.setting.config
        with ExitStack() as stack:
            stack.callback(self.reports.close)
            stack.callback(self.stream.close)
            ring = self._make_ring()
            if ring is not None:
                stack.callback(ring.close)
            recovery = Recovery(
                self.engine,
                self.stream,
                self.guard,
                self.telemetry,
                self.reports,
                ring=ring,
                every=config.snapshots.every or 1,
                load=self._load_at_most,
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
                save=self._save,
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
            message = f"completed {steps} steps, held-out loss {ending.held_out_loss:.4f}"
        return Outcome(reason, code, message, step, steps, self.newest_checkpoint, ending.held_out_loss)

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
            checkpoint=self.newest_checkpoint,
        )

    def _resume(self) -> Position:
        newest = self.store.newest()
        position = Position() if newest is None else self._load(newest)
        # the ledger may have seen attempts after the checkpoint, or before the first; rank 0 reads it for all
        box = [0, 0]
        if self.setting.ranks.is_first:
            box = [next_attempt(self.setting.files.root, position) - 1, last_incident(self.setting.files.ledger)]
        torch.distributed.broadcast_object_list(box, src=0)
        self.guard.number_incidents_after(box[1])
        return replace(position, attempt=box[0])

    def _load(self, newest: Path) -> Position:
        manifest, (tensors, numbers) = self.store.load(newest)
        config, data = fingerprint(self.setting.config), self.setting.prepared.fingerprint
        if manifest.config_fingerprint != config:
            raise CheckpointError(f"{newest} belongs to another config; use another name, or the config it began with")
        if manifest.data_fingerprint != data and not self.setting.config.data.accept_changed:
            raise CheckpointError(
                f"{newest} was trained on other data; restore the data, or set data.accept_changed=true"
            )
        write_state(self.engine, tensors, numbers)
        self.newest_checkpoint = f"checkpoints/{newest.name}"
        self.guard.restore(numbers["guard"]["history"], numbers["guard"]["ladder"])
        for first, last in manifest.quarantine:
            self._excluded = self._excluded.with_range(first, last)
        return Position(step=manifest.step, attempt=manifest.attempt, next_batch=manifest.next_batch)

    def _load_at_most(self, step: int) -> Notes | None:
        """Put the newest checkpoint of at most `step` into the live engine. A collective."""
        box: list[str | None] = [None]
        if self.setting.ranks.is_first:
            steps = [saved for saved in committed_steps(self.store.folder) if saved <= step]
            box = [name_of(steps[-1]) if steps else None]
        torch.distributed.broadcast_object_list(box, src=0)
        if box[0] is None:
            return None
        manifest, (tensors, numbers) = self.store.load(self.store.folder / box[0])
        write_state(self.engine, tensors, numbers)
        position = {"step": manifest.step, "next_batch": manifest.next_batch}
        return {"position": position, "history": numbers["guard"]["history"]}

    def _make_ring(self) -> SnapshotRing | None:
        """Snapshots, where they are wanted and fit into the host memory of every node. A collective."""
        config = self.setting.config
        if config.snapshots.every is None or config.guard.mode != "act":
            return None
        num_elements = sum(flat.numel() for flat in self.engine.shards.flats())
        on_node = int(os.environ.get("LOCAL_WORLD_SIZE", config.cluster.ranks_per_node))
        shortages: list[str | None] = [None] * self.setting.ranks.world_size
        torch.distributed.all_gather_object(shortages, shortage(snapshot_bytes(config, num_elements), on_node))
        for rank, text in enumerate(shortages):
            if text is not None:
                self.telemetry.message(
                    "warning",
                    f"snapshots do not fit beside rank {rank} ({text}): a rollback will go to a checkpoint on disk; "
                    "lower snapshots.keep to have them",
                )
                return None
        return SnapshotRing(self.engine, config.snapshots.keep, config.snapshots.audit)

    def _open_reports(self) -> IncidentReports | NoReports:
        if not self.setting.ranks.is_first:
            return NoReports()
        samples = self._samples("train")
        return IncidentReports(self.setting.files.root, samples.describe, self.engine.names)

    def _open_telemetry(self) -> Recorder:
        setting, config = self.setting, self.setting.config
        if not setting.ranks.is_first:
            return NoTelemetry()
        facts = RunFacts(
            name=config.name,
            ranks=setting.ranks.world_size,
            device=torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
            precision=setting.precision,
            parameter_names=self.engine.names,
            steps=self.numbers.steps,
            tokens_per_step=self.numbers.tokens_per_step,
            versions={library: importlib.metadata.version(library) for library in _LIBRARIES},
            config=dump_config(config),
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
        )

    def _samples(self, split: Literal["train", "held_out"]) -> Samples:
        data = self.setting.config.data
        return self.setting.prepared.samples(split, data.sequence_length, data.boundaries)

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
        )

    def _evaluate(self, step: int) -> float:
        setting, config = self.setting, self.setting.config
        began = time.perf_counter()
        batches = evaluation_batches(
            self._samples("held_out"),
            micro=self.numbers.micro,
            rank=setting.ranks.rank,
            ranks=setting.ranks.world_size,
            max_samples=config.evaluation.max_samples,
            objective=config.objective,
            seed=config.seed,
        )
        loss, num_targets = self.engine.evaluate(batches)
        self.telemetry.record_evaluation(step, loss, num_targets, time.perf_counter() - began)
        return loss

    def _save(self, position: Position) -> None:
        began = time.perf_counter()
        self.telemetry.flush()
        tensors, numbers = read_state(self.engine)
        numbers["guard"] = {"history": self.guard.history(), "ladder": self.guard.ladder()}
        saved = self.store.save((tensors, numbers), lambda: self._manifest(position))
        self.newest_checkpoint = f"checkpoints/{saved.name}"
        self.telemetry.record_checkpoint(position.step, saved.name, time.perf_counter() - began, saved.num_bytes)

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
            parameters=self.engine.names,
            files=(),
        )
