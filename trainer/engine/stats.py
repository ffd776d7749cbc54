"""The one small vector that is all-reduced in every step, and what all ranks read from it.

Layout, float64: the sums of the loss terms · ranks asked to stop · digest of the previous decision and its square ·
seconds of each rank (one slot a rank) · squared gradient norm of each parameter.
A sum of digests d over n ranks with n·Σd² = (Σd)² means that all digests are equal (Cauchy–Schwarz), so one
sum tells agreement; digests have 16 bits, which keeps all of it exact in float64.
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
from trainer.records import FloatArray


@dataclass(frozen=True, slots=True)
class Reduced:
    """The vector after the all-reduce, unpacked and unscaled; equal on all ranks."""

    terms: dict[str, float]
    stop_votes: int
    agree: bool
    rank_seconds: FloatArray
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
        self._terms = tuple(terms)
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._num_parameters = num_parameters
        self._votes_at = len(self._terms)
        self._seconds_at = self._votes_at + 3
        self._norms_at = self._seconds_at + world_size
        self._counted = [index for index, fragment in enumerate(shards.fragments) if fragment.counted]
        self._parameter_of = torch.tensor(
            [self._norms_at + shards.fragments[index].parameter for index in self._counted],
            dtype=torch.int64,
            device=device,
        )

    def reduce(
        self,
        terms: dict[str, Tensor],
        *,
        loss_scale: float,
        stop: bool,
        decision: int,
        seconds: float,
    ) -> Reduced:
        """One all-reduce and one copy to the host. When the gradient's norm is not finite, a second all-reduce
        counts the elements that are not, in double precision.

        Args:
            terms: sums of this rank's loss terms, 0-dim tensors.
            loss_scale: what the gradients are still multiplied by.
            stop: this rank was asked to stop.
            decision: :func:`digest` of the previous decision.
            seconds: what this rank computed for the previous attempt.
        """
        vector = torch.zeros(self._norms_at + self._num_parameters, dtype=torch.float64, device=self._device)
        for index, name in enumerate(self._terms):
            if name in terms:
                vector[index] = terms[name]
        host = [float(stop), float(decision), float(decision) ** 2]
        vector[self._votes_at : self._seconds_at] = torch.tensor(host, dtype=torch.float64)
        vector[self._seconds_at + self._rank] = seconds
        gradients = self._shards.gradients()
        if self._counted:
            norms = torch.stack(torch._foreach_norm([gradients[index] for index in self._counted], 2, torch.float32))
            vector.index_add_(0, self._parameter_of, norms.to(self._device, torch.float64).square_())
        dist.all_reduce(vector)
        values = vector.cpu().numpy()

        squares = values[self._norms_at :]
        num_nonfinite = 0
        if not np.isfinite(squares).all():
            squares, num_nonfinite = self._look_closely(gradients)
        votes, first, second = values[self._votes_at : self._seconds_at]
        return Reduced(
            terms={name: float(values[index]) for index, name in enumerate(self._terms)},
            stop_votes=int(votes),
            agree=bool(self._world_size * second == first * first),
            rank_seconds=values[self._seconds_at : self._norms_at].copy(),
            parameter_norms=np.sqrt(squares) / loss_scale,
            grad_norm=math.sqrt(float(squares.sum())) / loss_scale if not np.isnan(squares).any() else math.nan,
            num_nonfinite=num_nonfinite,
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
