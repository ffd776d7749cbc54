"""A teacher's predictions, made for a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from trainer.knowledge import DenseTargets, Head, LogitTargets, SparseTargets, Targets
from trainer.objectives.positions import Few, Scratch, Tile, Whole

Places = Tensor | slice
"""Which of all positions, flattened: their indices, or a slice."""


class Teaching(Protocol):
    """Asked chunk by chunk, and within a chunk tile by tile."""

    vocabulary: int | None
    """None: no limit of its own."""

    def begin(self, places: Places, count: int) -> None:
        """Make what the chunk needs."""
        ...

    def tile(self, part: slice) -> Tile:
        """Of the present chunk; may be overwritten by the next."""
        ...


@contextmanager
def teaching_of(
    targets: Targets | None, positions: int, limit: int | None, chunk: int, dtype: torch.dtype
) -> Iterator[Teaching]:
    """How `targets` are asked. Entering is a collective where the teacher is sharded.

    Args:
        positions: of the labels, flattened.
        limit: tokens wanted at most; logits beyond are not made.
        chunk: positions of a chunk at most.
        dtype: to compute in.
    """
    match targets:
        case None:
            yield _Nothing()
        case DenseTargets():
            with targets.whole():
                hidden = flattened(targets.hidden, positions, "hidden states")
                known = None if targets.known is None else targets.known.flatten()
                yield _FromHidden(hidden, targets.head, limit, chunk, dtype, known)
        case LogitTargets():
            yield _FromLogits(flattened(targets.logits, positions, "logits"), dtype)
        case SparseTargets():
            yield _FromTokens(
                flattened(targets.ids, positions, "token ids"),
                flattened(targets.log_probabilities, positions, "log-probabilities"),
                targets.kind == "sampled",
                dtype,
            )


def flattened(tensor: Tensor, positions: int, what: str) -> Tensor:
    """[..., W] → [positions, W], detached."""
    if tensor.numel() != positions * tensor.shape[-1]:
        raise ValueError(f"the {what} of the teacher have the shape {list(tensor.shape)} for {positions} labels")
    return tensor.detach().reshape(positions, tensor.shape[-1])


def into_logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden · weightᵀ + bias [n, V] in the weight's type, into `out`."""
    torch.mm(hidden, weight.t(), out=out)
    if bias is not None:
        out.add_(bias)


def cap_(x: Tensor, head: Head, slope: Tensor | None = None) -> None:
    """What follows the product: scale and soft cap, in place; ∂cap/∂(its input) into `slope`."""
    if head.scale != 1.0:
        x.mul_(head.scale)
    if head.softcap is not None:
        x.div_(head.softcap).tanh_()
        if slope is not None:
            torch.mul(x, x, out=slope).neg_().add_(1.0)
        x.mul_(head.softcap)


class _Nothing:
    vocabulary: int | None = None

    def begin(self, places: Places, count: int) -> None:
        pass

    def tile(self, part: slice) -> Tile:  # noqa: ARG002
        return None


class _FromHidden:
    def __init__(
        self, hidden: Tensor, head: Head, limit: int | None, chunk: int, dtype: torch.dtype, known: Tensor | None
    ) -> None:
        # read only now: a sharded weight has its values inside `whole`
        self._weight = head.weight.detach()[:limit]
        self._bias = None if head.bias is None else head.bias.detach()[:limit]
        self.vocabulary: int | None = self._weight.shape[0]
        self._hidden = hidden
        self._head = head
        self._buffer = hidden.new_empty(chunk, self._weight.shape[0], dtype=self._weight.dtype)
        self._scratch = Scratch(0, hidden, dtype)
        self._dtype = dtype
        self._known = known
        self._places: Places = slice(0)

    def begin(self, places: Places, count: int) -> None:
        self._places = places
        hidden = self._hidden[places].to(self._weight.dtype)
        into_logits(self._buffer[:count], hidden, self._weight, self._bias)

    def tile(self, part: slice) -> Tile:
        logits = self._buffer[part]
        if logits.dtype != self._dtype:
            logits = self._scratch.take(0, *logits.shape).copy_(logits)
        cap_(logits, self._head)
        known = None if self._known is None else self._known[within(self._places, part)]
        return Whole(logits, may_be_normalised=False, known=known)


class _FromLogits:
    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        self.vocabulary: int | None = logits.shape[1]
        self._logits = logits
        self._places: Places = slice(0)
        self._dtype = dtype

    def begin(self, places: Places, count: int) -> None:  # noqa: ARG002
        self._places = places

    def tile(self, part: slice) -> Tile:
        return Whole(self._logits[within(self._places, part)].to(self._dtype), may_be_normalised=True)


class _FromTokens:
    vocabulary: int | None = None

    def __init__(self, ids: Tensor, log_probabilities: Tensor, sampled: bool, dtype: torch.dtype) -> None:
        self._ids = ids
        self._log_probabilities = log_probabilities
        self._sampled = sampled
        self._places: Places = slice(0)
        self._dtype = dtype

    def begin(self, places: Places, count: int) -> None:  # noqa: ARG002
        self._places = places

    def tile(self, part: slice) -> Tile:
        places = within(self._places, part)
        return Few(self._ids[places], self._log_probabilities[places].to(self._dtype), self._sampled)


def within(places: Places, part: slice) -> Places:
    """The places of a part of them."""
    if isinstance(places, slice):
        return slice(places.start + part.start, places.start + part.stop)
    return places[part]
