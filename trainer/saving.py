"""When and from what a run is saved: a copy in host memory that a thread writes while training goes on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.store import CheckpointStore, Failed
from trainer.config.schema import CheckpointConfig
from trainer.engine.slot import HeldSnapshot
from trainer.engine.snapshot import SnapshotRing
from trainer.engine.state import read_state
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError, SaveFailedError, SupersededError
from trainer.records import Position, Saved
from trainer.telemetry.recorder import Recorder

State = tuple[dict[str, Any], dict[str, Any]]


class Saving(Protocol):
    """What the loop and a rollback see of it; :class:`Saver` tells the rest."""

    def due(self, position: Position) -> None:
        """A step was made: begin to save where it is time to. A collective."""

    def best(self, position: Position, score: str, value: float) -> None:
        """The state at `position` is better than all before: save it unless that was done; keep it. A collective."""

    def look(self, *, applied: bool, in_incident: bool, step: int) -> None:
        """An attempt is over."""

    def finish(self, position: Position, *, completed: bool) -> None:
        """The loop has ended here: save it. A collective."""

    def settle(self) -> None:
        """Wait for what is being written. A collective."""

    def waited(self, seconds: float) -> None:
        """An update had to wait for the copy that is being saved."""

    def went_back(self, step: int) -> None:
        """A rollback to `step` was carried out. A collective."""


class NoSaving:
    """Saves nothing: drills, benchmarks, a loop of your own."""

    def due(self, position: Position) -> None:
        pass

    def best(self, position: Position, score: str, value: float) -> None:
        pass

    def look(self, *, applied: bool, in_incident: bool, step: int) -> None:
        pass

    def finish(self, position: Position, *, completed: bool) -> None:
        pass

    def settle(self) -> None:
        pass

    def waited(self, seconds: float) -> None:
        pass

    def went_back(self, step: int) -> None:
        pass


@dataclass(slots=True)
class _Request:
    """What is being written."""

    position: Position
    seconds_blocked: float
    """That training stood still for it."""


class Saver:
    """Saves one run: all ranks call the same methods at the same steps.

    Args:
        store: the checkpoints on disk.
        memory: copies in the memory of the nodes; None: none are wanted.
        ring: where copies for saving come from; None: training waits until the live state is written.
        describe: the manifest of a position, without its files.
        notes: what is saved beside the tensors, under "guard".
        resumed: where the state stands that this start goes on from; None: it begins anew.
        newest: that checkpoint.
        clean_steps: steps without an incident after which a checkpoint counts as healthy.
        beat: called while there is nothing to do but wait.
    """

    def __init__(
        self,
        engine: Engine,
        store: CheckpointStore,
        telemetry: Recorder,
        *,
        config: CheckpointConfig,
        memory: MemoryTier | None,
        ring: SnapshotRing | None,
        describe: Callable[[Position], Manifest],
        notes: Callable[[], dict[str, Any]],
        resumed: Position | None,
        newest: str | None,
        clean_steps: int,
        beat: Callable[[], None],
    ):
        self._engine, self._store, self._telemetry = engine, store, telemetry
        self._config, self._memory, self._ring = config, memory, ring
        self._describe, self._notes, self._beat = describe, notes, beat
        self._saved = resumed
        self._request: _Request | None = None
        self._result: Saved | Failed | None = None
        self._num_failed = 0
        self._owed = False
        """There is nothing on disk that could be gone on from: save at the next step."""
        self._clean_steps = clean_steps
        self._num_clean = 0
        self._unproven = [resumed.step] if resumed is not None else []
        """Steps of checkpoints, in flight or committed, that may turn out healthy."""
        self.newest = newest
        """Name of the newest checkpoint that was committed, as far as this rank has heard."""

    def due(self, position: Position) -> None:
        """Begin to save where it is time to: returns as soon as the copy has begun. A collective.

        Raises:
            SaveFailedError: too many saves in a row have failed.
            SupersededError: a newer start of the run has taken over.
        """
        every, memory_every = self._config.every, self._config.memory_every
        if self._has(position):
            return
        if every and (position.step % every == 0 or self._owed):
            self._begin(position)
        elif self._memory is not None and memory_every and position.step % memory_every == 0:
            self._begin_in_memory(self._memory, position)

    def best(self, position: Position, score: str, value: float) -> None:
        """The state at `position` is better than all before by a score: save it, unless that was done, and keep it for
        as long as none is better. A collective; raises as :meth:`due`."""
        self._store.mark_best(position.step, score, value)
        if not self._has(position):
            self._begin(position)

    def look(self, *, applied: bool, in_incident: bool, step: int) -> None:
        """Once an attempt: hear of what was committed, and prove checkpoints healthy."""
        if self._result is None:
            self._hear(self._store.poll())
        if in_incident:
            self._num_clean = 0
        elif applied:
            self._num_clean += 1
        if self._num_clean < self._clean_steps:
            return
        for proven in [saved for saved in self._unproven if step - saved >= self._clean_steps]:
            self._store.mark_healthy(proven)
            self._unproven.remove(proven)

    def finish(self, position: Position, *, completed: bool) -> None:
        """Wait for what is being written, and save where the run stands unless that was done. A collective.

        Raises:
            SaveFailedError: that save has failed.
            SupersededError: see :meth:`due`.
        """
        self._settle()
        if self._saved != position:
            try:
                self._write_now(position)
            except CheckpointError as error:
                raise SaveFailedError(
                    f"the run could not be saved at step {position.step}: {error}; the last checkpoint is "
                    f"{self.newest or 'none'}, and the same command goes on from there"
                ) from error
        if completed and self._num_clean >= self._clean_steps:
            self._store.mark_healthy(position.step)
        if completed and self._memory is not None:
            self._memory.drain(self._beat)
            self._memory.clear()

    def settle(self) -> None:
        """Wait for what is being written. A collective; raises as :meth:`due`."""
        self._settle()
        self._give_up_when_spent()

    def waited(self, seconds: float) -> None:
        """An update had to wait for the copy that is being saved."""
        if self._request is not None:
            self._request.seconds_blocked += seconds

    def went_back(self, step: int) -> None:
        """A rollback to `step` was carried out: what was saved of later steps belongs to no run. A collective."""
        self._store.abandon_after(step)
        if self._memory is not None:
            self._memory.abandon_after(step)
        self._unproven = [saved for saved in self._unproven if saved <= step]
        self._num_clean = 0
        if self._saved is not None and self._saved.step > step:
            self._saved = None
        # killed before the next save, the run would begin anew
        self._owed = self._store.newest() is None

    def close(self) -> None:
        """End the threads; what is in flight is given up."""
        self._store.close()
        if self._memory is not None:
            self._memory.close()

    def _has(self, position: Position) -> bool:
        """Whether it is saved, or that has begun."""
        return position in (self._saved, self._request.position if self._request else None)

    def _begin(self, position: Position) -> None:
        began = time.perf_counter()
        self.settle()
        if self._ring is None or not self._config.background:
            try:
                self._write_now(position)
            except CheckpointError:
                self._give_up_when_spent()
            return
        held = self._ring.hold(position.step)
        notes = copy.deepcopy(self._notes())
        self._store.begin(lambda: _state_of(held, notes), self._describe(position), release=held.release)
        self._request = _Request(position, time.perf_counter() - began)
        self._unproven.append(position.step)

    def _begin_in_memory(self, memory: MemoryTier, position: Position) -> None:
        if self._ring is None:
            return
        memory.drain(self._beat)
        held = self._ring.hold(position.step)
        notes = copy.deepcopy(self._notes())
        memory.begin(lambda: _state_of(held, notes), self._describe(position), release=held.release)

    def _write_now(self, position: Position) -> None:
        """Save the live state while training waits.

        Raises:
            CheckpointError: it has failed, on all ranks; that was said and counted.
        """
        began = time.perf_counter()
        tensors, numbers = read_state(self._engine)
        notes = copy.deepcopy(self._notes())
        self._store.begin(lambda: (tensors, numbers | {"guard": notes}), self._describe(position))
        self._request = _Request(position, 0.0)
        result = self._store.drain(self._beat)
        self._request = _Request(position, time.perf_counter() - began)
        self._unproven.append(position.step)
        self._hear(result)
        self._take_in()
        if isinstance(result, Failed):
            raise CheckpointError(result.reason)

    def _settle(self) -> None:
        if self._result is None:
            self._hear(self._store.drain(self._beat))
        result = self._result
        self._take_in()
        if isinstance(result, Failed) and result.superseded:
            raise SupersededError(result.reason)

    def _give_up_when_spent(self) -> None:
        if self._num_failed > self._config.max_failures:
            raise SaveFailedError(
                f"{self._num_failed} saves in a row have failed (checkpoint.max_failures is "
                f"{self._config.max_failures}); the last checkpoint is {self.newest or 'none'}: make room or repair "
                "the disk, and the same command goes on"
            )

    def _hear(self, result: Saved | Failed | None) -> None:
        """Tell of a write that has ended; ranks hear of it at different steps, so nothing is decided here."""
        if result is None:
            return
        self._result = result
        request = self._request
        blocked = request.seconds_blocked if request else 0.0
        if isinstance(result, Saved):
            self.newest = f"checkpoints/{result.name}"
            self._telemetry.record_checkpoint(result, blocked)
        else:
            text = f"no checkpoint at step {result.step}, training goes on and the older ones stay: {result.reason}"
            self._telemetry.message("error", text)

    def _take_in(self) -> None:
        """Draw the consequences of the last write: at the same step on all ranks."""
        result, self._result = self._result, None
        request, self._request = self._request, None
        if isinstance(result, Saved):
            self._num_failed = 0
            self._owed = False
            self._saved = request.position if request else None
        elif isinstance(result, Failed):
            self._num_failed += 1
            self._unproven = [saved for saved in self._unproven if saved != result.step]


def _state_of(held: HeldSnapshot, notes: dict[str, Any]) -> State:
    tensors, numbers = held.state()
    return tensors, numbers | {"guard": notes}
