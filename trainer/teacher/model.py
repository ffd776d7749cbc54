"""A teacher in this process: a frozen model, whole on every rank or sharded over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.errors import DataError
from trainer.knowledge import BESIDE_INPUTS, DenseTargets, Knowledge, LogitTargets, Targets
from trainer.model.capture import Capture
from trainer.model.configuration import max_positions
from trainer.model.head import InterceptedHead, StandIn
from trainer.model.inner import Wanted
from trainer.records import IntArray
from trainer.teacher.holding import Holding, Read
from trainer.terms import Model


class TeacherModel:
    """Answers with the forward pass of a model. The logits of a language model are never made: its head is taken out.

    Args:
        model: frozen, in evaluation mode.
        call: what runs it: the model, or DeepSpeed's engine around it.
        head: of a language model; None: a classifier.
        wanted: what is kept of its inside.
        read: gives its weights again.
        device: of the collectives.
        kept: its id for each token of the run, [vocabulary]; None: the same.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Model,
        head: InterceptedHead | None,
        *,
        holding: Holding,
        wanted: Wanted,
        read: Read,
        device: torch.device,
        release: Callable[[], None] = lambda: None,
        kept: IntArray | None = None,
    ):
        self._model, self._call, self._head = model, call, head
        self._holding, self._wanted, self._read = holding, wanted, read
        self._device, self._release = device, release
        self._ids = None if kept is None else torch.from_numpy(kept).to(device)
        self._stand_in = None if head is None else StandIn.put_into(model, head)
        self._digests = holding.digests()

    @property
    def num_parameters(self) -> int:
        """Of the whole model; tied ones count once."""
        return self._holding.num_parameters

    @property
    def max_positions(self) -> int | None:
        """The longest text that its positions allow; None: no limit."""
        return max_positions(self._model.config)  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor]:
        """Its weights as they lie in this rank's memory."""
        return self._holding.tensors()

    def annotate(self, ids: IntArray, arrays: Mapping[str, IntArray]) -> dict[str, NDArray[Any]]:  # noqa: ARG002
        return {}

    @torch.no_grad()
    def knowledge(self, tensors: Mapping[str, Tensor]) -> Knowledge:
        inputs = {name: each for name, each in tensors.items() if name != "labels" and name not in BESIDE_INPUTS}
        if self._ids is not None:
            inputs["input_ids"] = self._ids[inputs["input_ids"]]
        if not self._wanted.layers and self._wanted.attention is None:
            return Knowledge(self._targets(self._call(**inputs)))
        with Capture(self._model, self._wanted.layers, self._wanted.attention) as seen:
            outputs = self._call(**inputs)
        return Knowledge(self._targets(outputs), seen.states, seen.attention)

    def _targets(self, outputs: Any) -> Targets:
        if self._head is None or self._stand_in is None:
            return LogitTargets(outputs.logits)
        return DenseTargets(self._stand_in.take(), self._head.weights(), self._whole)

    def _whole(self) -> AbstractContextManager[None]:
        assert self._head is not None
        head = self._head.weights()
        weights = [each for each in (head.weight, head.bias) if each is not None and hasattr(each, "ds_id")]
        if not weights:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(weights)
        return gathered

    def mend(self) -> str | None:
        """
        Raises:
            DataError: its files do not give the same weights any more.
        """
        damage = self._damage()
        if not any(damage):
            return None
        rank = dist.get_rank()
        if self._holding.is_sharded or damage[rank]:
            self._holding.fill(self._read)
        places = ", ".join(f"rank {rank} ({_tensors(number)})" for rank, number in enumerate(damage) if number)
        if any(self._damage()):
            raise DataError(
                f"weights of the teacher were not what was loaded on {places}, and loading them again gives others: "
                "its files have changed; put them back and start again"
            )
        return f"weights of the teacher were not what was loaded on {places}: loaded again"

    def _damage(self) -> Sequence[int]:
        """Tensors that differ from what was loaded, by rank. A collective."""
        now = self._holding.digests()
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self._device)
        counts[dist.get_rank()] = sum(a != b for a, b in zip(now, self._digests, strict=True))
        dist.all_reduce(counts)
        result: list[int] = counts.tolist()
        return result

    def close(self) -> None:
        """Give the memory back."""
        self._release()
        self._holding.clear()


def _tensors(number: int) -> str:
    return "1 tensor" if number == 1 else f"{number} tensors"
