"""Where faults can be put into a live step. The engine calls these at the moments that real faults strike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from trainer.engine.zero import Engine


class Injector:
    """Changes nothing. `trainer.faults` derives from it for the drill; ranks that train hold this one.

    Every method is called on every rank, in the order in which it stands here; the last two in threads of their own.
    """

    active = False
    """False: the engine may leave out calls that cost time."""
    teacher: Callable[[], Sequence[Tensor]] = staticmethod(tuple)
    """This rank's part of the weights that are learned from; none where there are none."""

    def begin(self, attempt: int, step: int, batch_index: int) -> None:
        """An attempt begins."""

    def local_gradient(self, parameter: int, gradient: Tensor) -> Tensor:  # noqa: ARG002
        """This rank's own gradient of a parameter (index) in one micro-batch, before any reduction."""
        return gradient

    def reduced(self, engine: Engine) -> None:
        """Gradients are reduced (`engine.shards.gradients()`), nothing was looked at yet."""

    def digest(self, value: int) -> int:
        """The digest of decisions that this rank sends."""
        return value

    def learning_rate(self, lr: float) -> float:
        """The rate of the update that follows."""
        return lr

    def updated(self, engine: Engine) -> None:
        """An update was applied: weights and moments may be changed."""

    def snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        """A snapshot was copied and checksummed."""

    def reading(self, batch_index: int) -> None:
        """A batch is about to be read. Called in the thread that reads ahead; what it raises ends that thread."""

    def moment(self, name: str, path: Path) -> None:
        """A checkpoint is being written: "begin" (its partial directory), "chunk" (in the middle of a file), "written"
        (a file), "commit" (the partial directory, just before it is renamed), "committed" (the directory). Called in
        the thread that writes; an OSError that it raises is one of that write."""
