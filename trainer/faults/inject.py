"""Faults of the hardware and of the run, put into live steps at the moments at which real ones strike."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.engine.injection import Injector
from trainer.errors import ConfigError
from trainer.faults.process import ProcessFaults
from trainer.faults.sentence import OF_PROCESS, OF_TOKENS, Fault, Kind, Strike

if TYPE_CHECKING:
    from trainer.config.files import RunFiles
    from trainer.engine.zero import Engine

_BITS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float32: (torch.int32, 30),
    torch.bfloat16: (torch.int16, 14),
    torch.float16: (torch.int16, 14),
    torch.float64: (torch.int64, 62),
}
"""Of each type: the integer of its size, and its top exponent bit."""


@dataclass(slots=True)
class _Watched:
    """A strike, and what became of it."""

    strike: Strike
    visits: int = 0
    """Attempts at its first step so far."""
    struck_at: int | None = None
    """Step at which it struck first."""
    over: bool = False


class FaultInjector(Injector):
    """Carries out the faults of one run; built on every rank with the same faults.

    Attributes:
        struck: the attempts at which something was done on this rank, each with its sentence.
    """

    active = True

    def __init__(
        self,
        faults: Sequence[Fault],
        rank: int,
        world_size: int,
        start: int = 1,
        files: RunFiles | None = None,
    ):
        """
        Args:
            start: of the run, from 1.
            files: of the run; faults of its processes need them.

        Raises:
            ConfigError: a fault names a rank that there is not, or cannot happen here.
        """
        strikes = [strike for fault in faults for strike in fault.strikes if strike.kind not in OF_TOKENS]
        for strike in strikes:
            if strike.rank is not None and strike.rank >= world_size:
                raise ConfigError(
                    [("faults", f"{strike} names a rank that is not there: ranks are 0 to {world_size - 1}")]
                )
        self._rank = rank
        ordinary = [strike for strike in strikes if strike.kind not in OF_PROCESS]
        self._watched = [_Watched(strike) for strike in ordinary if strike.start in (None, start)]
        self._process = ProcessFaults(
            [strike for strike in strikes if strike.kind in OF_PROCESS and self._here(strike)], rank, start, files
        )
        self._due: list[_Watched] = []
        self._attempt = self._step = 0
        self.struck: list[tuple[int, str]] = []

    def begin(self, attempt: int, step: int, batch_index: int) -> None:
        self._attempt, self._step = attempt, step
        self._process.begin(step)
        self._due = []
        for watched in self._watched:
            strike = watched.strike
            watched.visits += step == strike.first
            if watched.struck_at is not None and step <= watched.struck_at and not strike.every_time:
                # a transient fault is not there when the same step is done again
                watched.over = True
            if strike.kind is Kind.DATA_IS_NAN:
                due = strike.covers(batch_index)
            else:
                due = strike.covers(step) and watched.visits >= strike.visit and not watched.over
            if due and self._here(strike):
                self._due.append(watched)
        for strike in self._strikes(Kind.FLIP_BIT_IN_TEACHER):
            if flip_one(self.teacher(), _seed(strike, self._rank)) == (-1, -1):
                raise ConfigError([("faults", f"{strike} needs a teacher in this process: replica or zero3")])

    def local_gradient(self, parameter: int, gradient: Tensor) -> Tensor:  # noqa: ARG002
        for _ in self._strikes(Kind.GRADIENT_IS_NAN, Kind.DATA_IS_NAN):
            gradient = torch.full_like(gradient, math.nan)
        for strike in self._strikes(Kind.GRADIENT_TIMES):
            gradient = gradient * strike.factor
        return gradient

    def reduced(self, engine: Engine) -> None:
        for strike in self._strikes(Kind.FLIP_BIT_IN_GRADIENT):
            flip_one(engine.shards.gradients(), _seed(strike, self._rank))

    def digest(self, value: int) -> int:
        for _ in self._strikes(Kind.DISAGREE):
            value ^= 1
        return value

    def learning_rate(self, lr: float) -> float:
        for strike in self._strikes(Kind.LEARNING_RATE_TIMES):
            lr *= strike.factor
        return lr

    @torch.no_grad()
    def updated(self, engine: Engine) -> None:
        for strike in self._strikes(Kind.FLIP_BIT_IN_WEIGHT):
            flip_one(engine.shards.flats(), _seed(strike, self._rank))
        for kind, name in ((Kind.FLIP_BIT_IN_MOMENT, "exp_avg"), (Kind.FLIP_BIT_IN_SECOND_MOMENT, "exp_avg_sq")):
            for strike in self._strikes(kind):
                states = [engine.shards.optimizer_state(index) for index in range(len(engine.shards.flats()))]
                flip_one([state[name] for state in states], _seed(strike, self._rank))
        for strike in self._strikes(Kind.FLIP_BIT_IN_REPLICA):
            if engine.stage == 3:
                raise ConfigError([("faults", f"{strike} needs weights that all ranks hold alike: ZeRO 0, 1 or 2")])
            weights = [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad]
            flip_one(weights, _seed(strike, self._rank), lowest=True)

    def snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        for watched in self._watched:
            strike = watched.strike
            due = strike.kind is Kind.CORRUPT_SNAPSHOT and step >= strike.first
            if due and self._here(strike) and (watched.struck_at is None or strike.every_time):
                self._note(watched)
                flip_one(list(tensors.values()), _seed(strike, self._rank))

    def reading(self, batch_index: int) -> None:  # noqa: ARG002
        self._process.reading()

    def moment(self, name: str, path: Path) -> None:  # noqa: ARG002
        self._process.moment()

    def _strikes(self, *kinds: Kind) -> Iterator[Strike]:
        """Those of these kinds that strike this rank in this attempt; they are noted as having struck."""
        for watched in self._due:
            if watched.strike.kind in kinds:
                self._note(watched)
                yield watched.strike

    def _here(self, strike: Strike) -> bool:
        return strike.rank is None or strike.rank == self._rank

    def _note(self, watched: _Watched) -> None:
        if watched.struck_at is None:
            watched.struck_at = self._step
        note = (self._attempt, str(watched.strike))
        if note not in self.struck:
            self.struck.append(note)


@torch.no_grad()
def flip_one(tensors: Sequence[Tensor], seed: int, *, lowest: bool = False) -> tuple[int, int]:
    """Flip one bit of one element, in place.

    The element is drawn from those of ordinary size, 2⁻¹⁰⁰ ≤ |x| < 1; its top exponent bit (bit 30 of fp32, 14 of bf16
    and fp16) is not set, and setting it multiplies the value by 2¹²⁸ (fp16: 2¹⁶).

    Args:
        lowest: flip the lowest bit of the mantissa instead, which nothing but a comparison of bits notices.

    Returns:
        Index of the tensor and of the element in it; (−1, −1) where there is no such element.
    """
    generator = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(tensors), generator=generator).tolist():
        tensor = tensors[index]
        if tensor.dtype not in _BITS:
            continue
        size = tensor.view(-1).abs().float()
        ordinary = torch.nonzero((size >= 2.0**-100) & (size < 1)).flatten()
        if not len(ordinary):
            continue
        element = int(ordinary[int(torch.randint(len(ordinary), (), generator=generator))])
        integer, top = _BITS[tensor.dtype]
        view = tensor.view(-1)[element : element + 1].view(integer)
        view ^= 1 if lowest else 1 << top
        return index, element
    return -1, -1


def _seed(strike: Strike, rank: int) -> int:
    return zlib.crc32(f"{strike.kind.value} {strike.first} {rank}".encode())
