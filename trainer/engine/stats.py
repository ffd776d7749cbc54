"""The one small vector that is all-reduced in every step, and what all ranks read from it.

Layout, float64: the sums of the loss terms but the main one · ranks asked to stop · for each rank its own slots
(`SLOTS`), zero on all others · squared gradient norm of each parameter. A sum with zeros is exact, so slots come
through to the bit, and the main loss is their sum in the order of the ranks: the same number however the message
was reduced.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.gradients import Shards
from trainer.records import FloatArray, RankStats

SLOTS = ("seconds", "loss", "squared_norm", "squared_reduced", "digest", "checksum", "impossible")


@dataclass(frozen=True, slots=True)
class Own:
    """What this rank brings for its own slots."""

    seconds: float
    """That it computed for the previous attempt."""
    squared_norm: Tensor | None
    """Of its own gradients before any reduction, as the loss was scaled; 0-dim. None: nothing was seen."""
    digest: int
    """Of its previous decision (:func:`digest`)."""
    checksum: float = 0.0
    """Below 2⁵², so that it is exact."""
    impossible: int = 0


@dataclass(frozen=True, slots=True)
class Reduced:
    """The vector after the all-reduce, unpacked and unscaled; equal on all ranks."""

    loss: float
    """Mean over the global batch's targets, as are the terms."""
    terms: dict[str, float]
    stop_votes: int
    agree: bool
    ranks: RankStats
    parameter_norms: FloatArray
    grad_norm: float
    num_nonfinite: int


def digest(*parts: object) -> int:
    """16 bits that differ, most likely, where decisions differ."""
    return zlib.crc32(repr(parts).encode()) & 0xFFFF


class StepVector:
    """Packs, reduces and unpacks the vector of one step."""

    def __init__(
        self,
        shards: Shards,
        num_parameters: int,
        terms: Sequence[str],
        rank: int,
        world_size: int,
        device: torch.device,
    ):
        self._shards = shards
        self._terms = tuple(name for name in terms if name != "loss")
        self._world_size = world_size
        self._device = device
        self._num_parameters = num_parameters
        self._slots_at = len(self._terms) + 1
        self._own_at = self._slots_at + rank * len(SLOTS)
        self._norms_at = self._slots_at + world_size * len(SLOTS)
        self._replicated = world_size > 1 and any(not fragment.counted for fragment in shards.fragments)
        """ZeRO 0: every rank holds the whole reduced gradient, and each measures it."""
        self._counted = [index for index, fragment in enumerate(shards.fragments) if fragment.counted]
        self._parameter_of = torch.tensor(
            [self._norms_at + shards.fragments[index].parameter for index in self._counted],
            dtype=torch.int64,
            device=device,
        )

    def reduce(self, sums: dict[str, Tensor], own: Own, *, count: int, loss_scale: float, stop: bool) -> Reduced:
        """One all-reduce and one copy to the host. When the gradient's norm is not finite, a second all-reduce
        counts the elements that are not, in double precision.

        Args:
            sums: of this rank's loss terms, 0-dim tensors, `loss` among them.
            own: for this rank's slots.
            count: targets of the global batch, which the sums are divided by.
            loss_scale: what the gradients are still multiplied by.
            stop: this rank was asked to stop.
        """
        vector = torch.zeros(self._norms_at + self._num_parameters, dtype=torch.float64, device=self._device)
        for index, name in enumerate(self._terms):
            if name in sums:
                vector[index] = sums[name]
        vector[len(self._terms)] = float(stop)
        host = [own.seconds, 0.0, 0.0, 0.0, float(own.digest), own.checksum, float(own.impossible)]
        vector[self._own_at : self._own_at + len(SLOTS)] = torch.tensor(host, dtype=torch.float64)
        vector[self._own_at + SLOTS.index("loss")] = sums["loss"]
        if own.squared_norm is not None:
            vector[self._own_at + SLOTS.index("squared_norm")] = own.squared_norm
        gradients = self._shards.gradients()
        measured = range(len(gradients)) if self._replicated else self._counted
        if measured:
            norms = torch.stack(torch._foreach_norm([gradients[index] for index in measured], 2, torch.float32))
            squares_of = norms.to(self._device, torch.float64).square_()
            if self._replicated:
                vector[self._own_at + SLOTS.index("squared_reduced")] = squares_of.sum()
                squares_of = squares_of[self._counted]
            vector.index_add_(0, self._parameter_of, squares_of)
        dist.all_reduce(vector)
        values = vector.cpu().numpy()

        squares = values[self._norms_at :]
        num_nonfinite = 0
        if not np.isfinite(squares).all():
            squares, num_nonfinite = self._look_closely(gradients)
        slots = values[self._slots_at : self._norms_at].reshape(self._world_size, len(SLOTS))
        ranks = self._unpack(slots, count, loss_scale)
        return Reduced(
            loss=loss_of(slots[:, SLOTS.index("loss")], count),
            terms={name: float(values[index]) / count for index, name in enumerate(self._terms)},
            stop_votes=int(values[len(self._terms)]),
            agree=bool((ranks.digests == ranks.digests[0]).all()),
            ranks=ranks,
            parameter_norms=np.sqrt(squares) / loss_scale,
            grad_norm=math.sqrt(float(squares.sum())) / loss_scale if not np.isnan(squares).any() else math.nan,
            num_nonfinite=num_nonfinite,
        )

    def _unpack(self, slots: FloatArray, count: int, loss_scale: float) -> RankStats:
        columns = {name: slots[:, index].copy() for index, name in enumerate(SLOTS)}
        return RankStats(
            seconds=columns["seconds"],
            losses=columns["loss"] / count,
            # DeepSpeed has still to divide by the number of ranks: this is what the rank adds to the mean gradient
            grad_norms=np.sqrt(columns["squared_norm"]) / (loss_scale * self._world_size),
            reduced_norms=np.sqrt(columns["squared_reduced"]) / loss_scale,
            digests=columns["digest"],
            checksums=columns["checksum"],
            impossible=columns["impossible"],
        )

    def _look_closely(self, gradients: list[Tensor]) -> tuple[FloatArray, int]:
        vector = torch.zeros(self._num_parameters + 1, dtype=torch.float64, device=self._device)
        for index in self._counted:
            gradient = gradients[index].to(self._device, torch.float64)
            vector[0] += (~torch.isfinite(gradient)).sum()
            vector[1 + self._shards.fragments[index].parameter] += gradient.square().sum()
        dist.all_reduce(vector)
        values = vector.cpu().numpy()
        return values[1:], int(values[0])


def loss_of(sums: FloatArray, count: int) -> float:
    """Mean loss from the sums of the ranks, [ranks], added in their order."""
    total = 0.0
    for value in sums.tolist():
        total += value
    return total / count
