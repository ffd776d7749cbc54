"""One copy of a rank's training state in host memory, and who holds it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from trainer.engine.audit import Found, Updates, Values
from trainer.errors import CheckpointError


@dataclass(slots=True, eq=False)
class Slot:
    """Memory for one snapshot, used again and again."""

    storage: dict[str, Tensor] = field(default_factory=dict)
    step: int = -1
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What of the storage belongs to this snapshot."""
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    checksum: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    """Largest absolute value of each fp32 tensor; the next audit builds on it."""
    found: Found = field(default_factory=Found)
    updates: Updates | None = None
    """What is applied to the live state since this snapshot; its identity tells whether the two still belong
    together."""
    asked: int = 0
    """How often :meth:`SnapshotRing.impossible` was asked since."""
    holders: int = 0
    """Who still reads it: until they release it, its memory is not used again."""
    job: Future[None] | None = None
    """The copying of it."""


class HeldSnapshot:
    """A copy of a rank's state that stays as it is until it is released."""

    def __init__(self, slot: Slot, give_back: Callable[[Slot], None]):
        self._slot = slot
        self._give_back: Callable[[Slot], None] | None = give_back

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `read_state` gives it, in host memory; waits until the copy is whole. For any thread.

        Raises:
            CheckpointError: the copy has changed since it was made.
        """
        if self._slot.job is not None:
            self._slot.job.result()
        if self._slot.checksum and checksum_of(self._slot.tensors) != self._slot.checksum:
            raise CheckpointError(
                f"the copy of step {self._slot.step} in the memory of {socket.gethostname()} has changed since it was "
                "made; nothing was saved from it"
            )
        return self._slot.tensors, self._slot.numbers

    def release(self) -> None:
        """Its memory may be used again. For any thread; once more does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self._slot)


def room(storage: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Memory for a copy of `like`, 1-D; allocated when it is not there yet."""
    room = storage.get(name)
    if room is None or room.numel() != like.numel() or room.dtype != like.dtype:
        room = torch.empty(like.numel(), dtype=like.dtype, pin_memory=like.device.type == "cuda")
        storage[name] = room
    return room.view(like.shape)


def array_of(tensor: Tensor) -> Values:
    """A 1-D view of a tensor in host memory: as numbers where numpy has the type, else as bytes."""
    flat = tensor.detach().reshape(-1)
    return (flat if flat.dtype == torch.float32 else flat.view(torch.uint8)).numpy()


def checksum_of(tensors: dict[str, Tensor]) -> int:
    digest = xxhash.xxh3_64()
    for tensor in tensors.values():
        digest.update(array_of(tensor).data)
    return digest.intdigest()
