"""Carries out what the guard decides beyond a step: looks closer, keeps snapshots, goes back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from trainer.data.order import Quarantine
from trainer.engine.snapshot import SnapshotRing
from trainer.engine.state import reset_moments
from trainer.engine.zero import Engine
from trainer.records import Batch, Evidence, Examination, IncidentEvent, Position, Rewind, Rollback, StepStats
from trainer.saving import Saving
from trainer.stability.guard import Guard
from trainer.telemetry.recorder import Recorder

_KNOWN = 8
"""Accepted batches that are kept to look at again: the newest and the oldest of them are."""

Notes = dict[str, Any]
"""Plain JSON that goes with a saved state: `position` and the guard's `history`."""


class Stream(Protocol):
    """Batches in order, and the index after the last one handed out."""

    @property
    def next_batch(self) -> int: ...

    @property
    def quarantine(self) -> Quarantine: ...

    def __next__(self) -> Batch: ...

    def seek(self, next_batch: int) -> None: ...

    def read(self, batch_index: int) -> Batch: ...

    def leave_out(self, first: int, last: int) -> None: ...

    def close(self) -> None: ...


class Reports(Protocol):
    """Where incidents are told to; rank 0 writes their folders."""

    def note(self, event: IncidentEvent) -> None: ...

    def keep(self, evidence: Evidence) -> None: ...

    def finish(self, incident: int) -> None: ...

    def close(self) -> None: ...


class NoReports:
    """Every rank but the first."""

    def note(self, event: IncidentEvent) -> None:
        pass

    def keep(self, evidence: Evidence) -> None:
        pass

    def finish(self, incident: int) -> None:
        pass

    def close(self) -> None:
        pass


class Recovery:
    """The memory of a run: what to go back to, and what was fine lately.

    Args:
        ring: copies in host memory; None: they do not fit, or are not wanted.
        every: steps between snapshots in the ring; None: it holds none, only copies that are being saved.
        load: restores the newest checkpoint on disk of at most a step into the engine, in place, and returns its notes;
            None: there is none. A collective.
    """

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        guard: Guard,
        telemetry: Recorder,
        reports: Reports,
        saver: Saving,
        *,
        ring: SnapshotRing | None,
        every: int | None,
        load: Callable[[int], Notes | None],
    ):
        self._engine, self._stream, self._guard = engine, stream, guard
        self._telemetry, self._reports, self._saver = telemetry, reports, saver
        self._ring, self._every, self._load = ring, every, load
        self._known: deque[tuple[Batch, float]] = deque(maxlen=_KNOWN)
        self._copying: int | None = None

    def remember(self, batch: Batch, loss: float) -> None:
        """An update from this batch stands; `loss` is what it was before."""
        self._known.append((batch, loss))

    def examine(self, batch: Batch, stats: StepStats) -> Examination:
        """Forward passes on an alarming batch and on batches that were accepted lately. A collective."""
        chosen = [self._known[-1], self._known[0]] if len(self._known) > 1 else list(self._known)
        known = tuple((then, self._engine.probe(earlier)) for earlier, then in chosen)
        losses = self._engine.sample_losses(batch)
        self.keep_evidence(batch, stats, losses)
        return Examination(known, batch.samples, losses)

    def keep_evidence(self, batch: Batch, stats: StepStats, losses: np.ndarray | None = None) -> None:
        """For the incident's folder."""
        self._reports.keep(
            Evidence(
                incident=self._guard.incident,
                attempt=stats.attempt,
                step=stats.step,
                batch_index=batch.batch_index,
                sample_ids=batch.samples,
                sample_losses=np.zeros(0) if losses is None else losses,
                parameter_norms=stats.parameter_norms,
                usual_norms=self._guard.usual_norms,
            )
        )

    def snapshot(self, position: Position) -> None:
        """Begin a snapshot where one is due, or where there is none; the copy is made while the next batch is
        computed."""
        if self._ring is None or self._every is None:
            return
        if not self._ring.steps() or position.step % self._every == 0 or position.step == self._guard.pin:
            self._ring.take(position.step, self.notes(position))
            self._copying = position.step

    def notes(self, position: Position) -> Notes:
        """What is saved beside the tensors."""
        return {
            "position": {"step": position.step, "next_batch": position.next_batch},
            "history": self._guard.history(),
        }

    def fence(self) -> None:
        """Wait until the live state may be changed."""
        if self._ring is None:
            return
        seconds = self._ring.fence()
        if self._copying is not None:
            self._telemetry.record_snapshot(self._copying, seconds, self._ring.num_bytes)
            self._copying = None
        elif seconds:
            self._saver.waited(seconds)

    def impossible(self) -> int:
        """Values in this rank's newest audited snapshot that training cannot have produced; asked once an attempt."""
        return 0 if self._ring is None else self._ring.impossible()

    def perform(self, verdict: Rollback, stats: StepStats) -> Position | None:
        """Go back. Returns where the run stands now; None: there is no state to go back to. A collective."""
        began = time.perf_counter()
        self.fence()
        self._saver.settle()
        box = [self._guard.ladder()]
        dist.broadcast_object_list(box, src=0)
        notes, source = self._from_memory(verdict.to_step), "memory"
        if notes is None:
            notes, source = self._load(verdict.to_step), "checkpoint"
        if notes is None:
            return None
        step, next_batch = notes["position"]["step"], notes["position"]["next_batch"]
        if self._ring is not None:
            self._ring.drop_after(step)
        if verdict.reset_moments:
            reset_moments(self._engine)
        if verdict.quarantine is not None:
            self._stream.leave_out(*verdict.quarantine)
        self._stream.seek(next_batch)
        self._known.clear()
        rewind = Rewind(
            incident=self._guard.incident,
            from_step=stats.step - 1,
            to_step=step,
            attempt=stats.attempt,
            next_batch=next_batch,
            quarantine=verdict.quarantine,
            source=source,
            seconds=time.perf_counter() - began,
            reason=verdict.reason,
        )
        self._guard.rolled_back(rewind, notes["history"], box[0])
        self._telemetry.record_rewind(rewind)
        self._saver.went_back(step)
        if self._ring is not None and self._every is not None and source != "memory":
            self._ring.take(step, notes)
        return Position(step=step, attempt=stats.attempt, next_batch=next_batch)

    def tell(self) -> None:
        """Pass on what the guard has to say about incidents."""
        for event in self._guard.drain():
            self._telemetry.record_incident(event)
            self._reports.note(event)
            if event.phase in ("recovered", "halted"):
                self._reports.finish(event.incident)

    def _from_memory(self, to_step: int) -> Notes | None:
        if self._ring is None:
            return None
        while (step := self._ring.newest(to_step)) is not None:
            notes = self._ring.restore(step)
            if notes is not None:
                return notes
            text = f"the snapshot of step {step} is damaged in the memory of a rank; an older one is used"
            self._telemetry.message("error", text)
        return None
