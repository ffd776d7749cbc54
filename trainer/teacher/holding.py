"""The weights of a frozen model as this rank holds them, whole or in part: filled from files, and filled again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.model.weights import Take
from trainer.teacher.digest import digest

Read = Callable[[Take], None]
"""Gives every weight in turn: (name in the model, value)."""


@dataclass(frozen=True, slots=True)
class Holders:
    """The ranks that hold one copy of a sharded model between them."""

    group: Any
    """Process group; None: all ranks."""
    first: int
    """The rank that reads."""


class Holding:
    """Names and places of all weights of a model, taken before any module of it is exchanged.

    Args:
        holders: who else holds a part of each parameter; None: this rank holds the model whole.
        alive: called with every weight that is put in: a sign of life for who waits for one.
    """

    def __init__(self, model: nn.Module, holders: Holders | None, alive: Callable[[], None] = lambda: None):
        self._alive = alive
        # tied weights have several names
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._by_name: dict[str, Tensor] = {**model.state_dict(keep_vars=True), **parameters}
        self._own = {id(tensor): name for name, tensor in reversed(self._by_name.items())}
        self._holders = holders
        self.num_parameters = sum(int(getattr(each, "ds_numel", each.numel())) for each in model.parameters())

    @property
    def is_sharded(self) -> bool:
        return self._holders is not None

    def tensors(self) -> list[Tensor]:
        """Views of what lies in this rank's memory, in one order on all ranks."""
        return [self._part(self._by_name[name]) for name in self._own.values()]

    def digests(self) -> list[int]:
        """Of :meth:`tensors`."""
        return [digest(tensor) for tensor in self.tensors()]

    def clear(self) -> None:
        """Let go of the memory. The model is of no more use."""
        for name in self._own.values():
            tensor: Any = self._by_name[name]
            held = tensor.ds_tensor if hasattr(tensor, "ds_id") else tensor
            held.data = held.data.new_empty(0)

    def _part(self, tensor: Any) -> Tensor:
        if not hasattr(tensor, "ds_id"):
            return tensor.data  # type: ignore[no-any-return]
        part: Tensor = tensor.ds_tensor.data
        # the last ranks hold padding behind the values
        begin = dist.get_rank(tensor.ds_process_group) * part.numel()
        return part[: max(0, min(part.numel(), tensor.ds_numel - begin))]

    def fill(self, read: Read) -> None:
        """Put the values of `read` in their places. A collective of the holders, whose first one reads.

        Raises:
            ConfigError: they cannot be read, or some are missing.
        """
        seen: dict[int, tuple[str, int | None]] = {}
        if self._holders is None:
            read(lambda name, value: self._put(name, value, seen))
            problem = self._missing(seen)
        elif dist.get_rank() == self._holders.first:
            problem = self._deal(read, seen)
        else:
            problem = self._receive()
        if problem is not None:
            raise ConfigError([problem])

    def _put(self, name: str, value: Tensor, seen: dict[int, tuple[str, int | None]]) -> None:
        if self._is_new(name, value, seen):
            with torch.no_grad():
                self._by_name[name].copy_(value)

    def _is_new(self, name: str, value: Tensor, seen: dict[int, tuple[str, int | None]]) -> bool:
        """Whether the value has a place that is not filled yet.

        Raises:
            ConfigError: weights that share one place differ.
        """
        self._alive()
        place = self._by_name[name]
        tied = sum(each is place for each in self._by_name.values()) > 1
        content = digest(value) if tied else None
        earlier, theirs = seen.setdefault(id(place), (name, content))
        if earlier != name and theirs != content:
            text = f"{earlier} and {name} differ, but the configuration ties them; set `tie_word_embeddings: false`"
            raise ConfigError([("model.overrides", text)])
        return earlier == name

    def _missing(self, seen: dict[int, Any]) -> tuple[str, str] | None:
        lacking = [
            name for key, name in self._own.items() if key not in seen and isinstance(self._by_name[name], nn.Parameter)
        ]
        if not lacking:
            return None
        text = f"lacks {len(lacking)} of the model's weights, {lacking[0]} among them: it can teach nothing"
        return ("model.pretrained", text)

    def _deal(self, read: Read, seen: dict[int, tuple[str, int | None]]) -> tuple[str, str] | None:
        """Read and hand out; the others are told before each weight which one comes, and at the end how it went."""

        def take(name: str, value: Tensor) -> None:
            if self._is_new(name, value, seen):
                self._tell((name, None))
                self._exchange(name, value)

        problem: tuple[str, str] | None
        try:
            read(take)
            problem = self._missing(seen)
        except ConfigError as error:
            problem = error.problems[0]
        except BaseException:
            # the others must not wait for more
            self._tell((None, ("model.pretrained", f"rank {dist.get_rank()}, which reads it, failed")))
            raise
        self._tell((None, problem))
        return problem

    def _receive(self) -> tuple[str, str] | None:
        while True:
            name: str | None
            problem: tuple[str, str] | None
            name, problem = self._tell(None)
            if name is None:
                return problem
            self._exchange(name, None)

    def _tell(self, message: Any) -> Any:
        assert self._holders is not None
        box = [message]
        dist.broadcast_object_list(box, src=self._holders.first, group=self._holders.group)
        return box[0]

    @torch.no_grad()
    def _exchange(self, name: str, value: Tensor | None) -> None:
        import deepspeed

        assert self._holders is not None
        self._alive()
        place = self._by_name[name]
        if hasattr(place, "ds_id"):
            # 0: the first of the parameter's own ranks
            with deepspeed.zero.GatheredParameters([place], modifier_rank=0):
                if value is not None:
                    place.copy_(value)
        else:
            if value is not None:
                place.copy_(value)
            dist.broadcast(place.data, src=self._holders.first, group=self._holders.group)


def nodes(local_rank: int, host: str) -> Iterator[list[int]]:
    """The ranks of each node, in order. A collective."""
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (host, local_rank))
    # two ranks of one number on one machine are of two nodes that it plays
    keys = [(place[0], places[:rank].count(place)) for rank, place in enumerate(places)]
    for key in dict.fromkeys(keys):
        yield [rank for rank, other in enumerate(keys) if other == key]
