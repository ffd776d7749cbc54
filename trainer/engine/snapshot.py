"""Copies of this rank's training state in host memory, taken while the next forward and backward run."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from trainer.engine.audit import Adam, Found, Limits, Updates, Values, beyond, impossible_values, limits_of
from trainer.engine.slot import HeldSnapshot, Slot, array_of, checksum_of, room
from trainer.engine.state import read_state, write_state
from trainer.engine.zero import Engine

_CHUNK = 1 << 16
"""Elements that are hashed and looked through while they lie in the cache."""


@dataclass(frozen=True, slots=True)
class _Before:
    """What an audit compares with: the snapshot before, and what was applied since."""

    largest: dict[str, float]
    """Largest absolute value of each tensor."""
    tensors: dict[str, Tensor]
    """Empty where the new snapshot takes the memory of that one."""
    updates: Updates


class SnapshotRing:
    """The newest snapshots of one rank. All ranks call the same methods with the same steps.

    After :meth:`take`, a thread (on a GPU a side stream) copies the live state into memory that is kept for it, then
    checksums the copy and looks through it (:mod:`trainer.engine.audit`), all without the interpreter's lock.
    Training goes on meanwhile, up to where it would change the state: there the caller waits with :meth:`fence`.
    Errors of the thread are raised by the next call.

    Args:
        engine: whose state it is.
        keep: snapshots kept; the oldest gives its memory to the next.
        audit: look through each snapshot.
        spare: memory for so many copies more, for those who hold one (:meth:`hold`).
    """

    def __init__(self, engine: Engine, keep: int, audit: bool = True, spare: int = 0):
        self._engine = engine
        self._keep = keep
        self._looks = audit
        self._told = Found()
        self._slots: dict[int, Slot] = {}
        self._free = [Slot() for _ in range(keep + spare)]
        self._all = tuple(self._free)
        self._holding = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._job: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._newest: Slot | None = None
        """Taken or restored last: the live state descends from it."""
        self._stream: Any = None
        if engine.device.type == "cuda":
            self._stream = torch.cuda.Stream(engine.device)  # type: ignore[no-untyped-call]
        engine.settle = self.fence
        self._on_device: Any = None
        """Event after the copies of the side stream; None: there are none to wait for."""

    def take(self, step: int, notes: dict[str, Any]) -> None:
        """Begin to copy the state of `step`; a snapshot of the same step is replaced.

        Args:
            notes: plain JSON that comes back with it.
        """
        self._join()
        ancestor = self._ancestor()
        slot = self._claim(step)
        before = None
        if ancestor is not None:
            before = _Before(ancestor.largest, {} if ancestor is slot else ancestor.tensors, self._engine.updates)
        slot.notes, slot.asked = copy.deepcopy(notes), 0
        self._begin(slot, step, partial(self._look, before=before))
        self._engine.updates = slot.updates = Updates()
        with self._holding:
            self._slots[step] = slot
        self._newest = slot

    def hold(self, step: int) -> HeldSnapshot:
        """A copy of the live state, which is that of `step`, for somebody who reads it for a while.

        It is the newest snapshot where nothing was applied since, else a copy made like one, which is no snapshot.
        """
        slot = self._newest
        unchanged = slot is not None and slot.updates is self._engine.updates and not slot.updates.num
        if slot is None or not unchanged or slot.step != step:
            self._join()
            slot = self._unused()
            slot.notes, slot.updates, slot.checksum = {}, None, 0
            self._begin(slot, step, None)
        with self._holding:
            slot.holders += 1
        return HeldSnapshot(slot, self._give_back)

    def _give_back(self, slot: Slot) -> None:
        with self._holding:
            slot.holders -= 1
            if not slot.holders and slot not in self._slots.values():
                self._free.append(slot)

    def _begin(self, slot: Slot, step: int, look: Callable[[Slot], None] | None) -> None:
        """Begin to copy the live state; the thread ends with `look`."""
        tensors, slot.numbers = read_state(self._engine)
        slot.step, slot.found = step, Found()
        slot.tensors = {name: room(slot.storage, name, tensor) for name, tensor in tensors.items()}
        for name in [name for name in tensors if name.startswith("buffer.")]:
            # a forward pass may change these
            slot.tensors[name].copy_(tensors.pop(name))
        self._copied.clear()
        self._on_device = self._begin_device_copies(tensors, slot)
        self._job = slot.job = self._thread.submit(self._work, slot, tensors, look, self._on_device)

    def fence(self) -> float:
        """Wait until the live state may be changed. Returns the seconds waited."""
        if self._on_device is not None:
            # the device waits, not the host
            torch.cuda.current_stream(self._engine.device).wait_event(self._on_device)
            self._on_device = None
        began = time.perf_counter()
        waited = not self._copied.is_set()
        self._copied.wait()
        if self._job is not None and self._job.done():
            self._job.result()
        return time.perf_counter() - began if waited else 0.0

    def steps(self) -> list[int]:
        """Steps of the snapshots, ascending."""
        return sorted(self._slots)

    def newest(self, at_most: int) -> int | None:
        """The newest snapshot of at most this step."""
        return max((step for step in self._slots if step <= at_most), default=None)

    def restore(self, step: int) -> dict[str, Any] | None:
        """Put the snapshot of `step` into the live engine. A collective.

        Returns:
            Its notes. None: the copy of some rank is damaged; it is dropped on all ranks and nothing was changed.

        Raises:
            KeyError: there is no such snapshot.
        """
        self._join()
        slot = self._slots[step]
        whole = torch.tensor(float(checksum_of(slot.tensors) == slot.checksum), device=self._engine.device)
        dist.all_reduce(whole, op=dist.ReduceOp.MIN)
        if not whole.item():
            self._drop(step)
            return None
        write_state(self._engine, slot.tensors, slot.numbers)
        slot.updates = self._engine.updates
        slot.asked = 2
        self._newest = slot
        return copy.deepcopy(slot.notes)

    def drop_after(self, step: int) -> None:
        """Forget the snapshots of later steps."""
        self._join()
        for later in [taken for taken in self._slots if taken > step]:
            self._drop(later)

    def impossible(self) -> int:
        """Impossible values in the newest audited snapshot of this rank; 0 before there is one.

        When an audit's result arrives does not hang on the speed of a thread: the second call after :meth:`take` waits
        for it, as do the next :meth:`take` and :meth:`restore`.
        """
        newest = self._newest
        if newest is None:
            self._told = Found()
            return 0
        newest.asked += 1
        if newest.asked > 1:
            self._join()
            self._told = newest.found
        else:
            earlier = self.newest(newest.step - 1)
            self._told = self._slots[earlier].found if earlier is not None else Found()
        return self._told.num

    @property
    def audit(self) -> Found:
        """What :meth:`impossible` told last, with the place of the first value."""
        return self._told

    def close(self) -> None:
        """End the thread and give the memory back."""
        self._thread.shutdown(wait=True)
        self._slots.clear()
        self._free, self._all, self._newest = [], (), None

    @property
    def num_bytes(self) -> int:
        """Host memory that the snapshots of this rank hold."""
        return sum(tensor.nbytes for slot in self._all for tensor in slot.storage.values())

    def _join(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _ancestor(self) -> Slot | None:
        """The snapshot that the live state descends from, if it is still there."""
        newest = self._newest
        descends = newest is not None and newest.updates is self._engine.updates
        return newest if descends and newest in self._slots.values() else None

    def _claim(self, step: int) -> Slot:
        """Memory for a snapshot of `step`; the one of this step, or the oldest of many, is given up."""
        if step in self._slots or len(self._slots) >= self._keep:
            self._drop(step if step in self._slots else min(self._slots))
        return self._unused()

    def _unused(self) -> Slot:
        with self._holding:
            if not self._free:
                raise AssertionError("more copies are held than there is spare memory for")
            return self._free.pop()

    def _drop(self, step: int) -> None:
        with self._holding:
            slot = self._slots.pop(step)
            if not slot.holders:
                self._free.append(slot)
        if self._newest is slot:
            self._newest = None

    def _begin_device_copies(self, tensors: dict[str, Tensor], slot: Slot) -> Any:
        """Returns the event after them; None without a GPU."""
        if self._stream is None:
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._engine.device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.device.type == "cuda":
                    slot.tensors[name].copy_(tensor, non_blocking=True)
            return self._stream.record_event()

    def _work(
        self, slot: Slot, tensors: dict[str, Tensor], look: Callable[[Slot], None] | None, on_device: Any
    ) -> None:
        try:
            for name, tensor in tensors.items():
                if tensor.device.type == "cpu":
                    np.copyto(array_of(slot.tensors[name]), array_of(tensor))
        finally:
            self._copied.set()
        if on_device is not None:
            on_device.synchronize()
        if look is not None:
            look(slot)
            self._engine.injector.snapshot(slot.step, slot.tensors)

    def _look(self, slot: Slot, before: _Before | None) -> None:
        """Checksum and audit, chunk by chunk: memory is read once."""
        adam = Adam.of(self._engine.shards.inner.param_groups)
        digest = xxhash.xxh3_64()
        scratch = np.empty(_CHUNK, dtype=np.float32)
        num, first = 0, ""
        # a new one: the next audit may still hold the old
        slot.largest = {}
        for name, tensor in slot.tensors.items():
            values = array_of(tensor)
            if not self._looks or tensor.dtype != torch.float32 or tensor.numel() == 0:
                digest.update(values.data)
                continue
            limits, old = Limits(), None
            if name.startswith("flat."):
                largest, updates = (before.largest.get(name, 0.0), before.updates) if before else (None, None)
                limits = limits_of(name.rpartition(".")[2], largest, updates, adam)
                old = array_of(before.tensors[name]) if before and name in before.tensors else None
            found = self._look_through(slot, name, values, limits, old, digest, scratch)
            num, first = num + found.num, first or found.first
        slot.checksum = digest.intdigest()
        slot.found = Found(num, first)

    def _look_through(
        self,
        slot: Slot,
        name: str,
        values: Values,
        limits: Limits,
        old: Values | None,
        digest: Any,
        scratch: Values,
    ) -> Found:
        num, first, largest = 0, "", 0.0
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            digest.update(chunk.data)
            same = old[start : start + _CHUNK] if old is not None else None
            extremes = float(chunk.min()), float(chunk.max())
            largest = max(largest, -extremes[0], extremes[1])
            if beyond(chunk, extremes, limits, same, scratch):
                count, index = impossible_values(chunk, limits, same)
                num += count
                if not first:
                    first = _place(slot.numbers["fragments"], name, start + index, float(chunk[index]))
        slot.largest[name] = largest
        return Found(num, first)


def _place(fragments: list[dict[str, Any]], name: str, index: int, value: float) -> str:
    """Where an element of a state tensor lies, for a person."""
    if not name.startswith("flat."):
        return f"{name}[{index}] = {value:.4g}"
    _, flat, key = name.split(".", 2)
    for fragment in fragments:
        inside = index - fragment["offset"]
        if fragment["flat"] == int(flat) and 0 <= inside < fragment["num_elements"]:
            return f"{key} of {fragment['name']}, element {fragment['start'] + inside} = {value:.4g}"
    return f"{key} in the padding of part {flat}, element {index} = {value:.4g}"
