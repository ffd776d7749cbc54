"""What goes wrong, where and when, as a sentence: `at(step=40, rank=1).gradient_is_nan()`.

Faults of the hardware and of the run are placed by step, faults of the data by batch index. A fault placed by step is
transient: it is there the first time that the run comes to its step, and a replay, or the same steps done again after
a rollback, do not meet it; `.every_time()` makes it stay. A fault of the data is part of the data: whenever the
batch is computed, it is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Kind(Enum):
    """What goes wrong; the value is the word for it in a sentence."""

    GRADIENT_IS_NAN = "gradient_is_nan"
    GRADIENT_TIMES = "gradient_times"
    FLIP_BIT_IN_GRADIENT = "flip_bit_in_gradient"
    FLIP_BIT_IN_WEIGHT = "flip_bit_in_weight"
    FLIP_BIT_IN_MOMENT = "flip_bit_in_moment"
    FLIP_BIT_IN_SECOND_MOMENT = "flip_bit_in_second_moment"
    FLIP_BIT_IN_REPLICA = "flip_bit_in_replica"
    LEARNING_RATE_TIMES = "learning_rate_times"
    CORRUPT_SNAPSHOT = "corrupt_snapshot"
    DISAGREE = "disagree"
    DATA_IS_NAN = "data_is_nan"
    RANDOM_TOKENS = "random_tokens"
    ONE_TOKEN = "one_token"  # noqa: S105 (of text)
    SHUFFLED_LABELS = "shuffled_labels"
    DRIFT = "drift"


BY_BATCH = frozenset({Kind.DATA_IS_NAN, Kind.RANDOM_TOKENS, Kind.ONE_TOKEN, Kind.SHUFFLED_LABELS, Kind.DRIFT})
"""Placed by batch index."""

OF_TOKENS = BY_BATCH - {Kind.DATA_IS_NAN}
"""In what the stream hands out; all others are in the step itself."""

_ON_ALL_RANKS = BY_BATCH | {Kind.LEARNING_RATE_TIMES}
_WITH_FACTOR = frozenset({Kind.GRADIENT_TIMES, Kind.LEARNING_RATE_TIMES, Kind.DRIFT})


@dataclass(frozen=True, slots=True)
class Strike:
    """One thing that goes wrong."""

    kind: Kind
    first: int
    """Step, or batch index, at which it begins."""
    last: int | None
    """The last one, inclusive; None: for ever."""
    rank: int | None
    """Where; None: on every rank."""
    factor: float = 1.0
    """Of `gradient_times`, `learning_rate_times`; the share of labels that `drift` adds with every batch."""
    visit: int = 1
    """It is there the visit-th time that an attempt at its step begins: 2 is a replay, or the way back after a
    rollback."""
    every_time: bool = False
    """Not only that once."""

    def covers(self, place: int) -> bool:
        """Whether a step, or a batch index, lies in it."""
        return self.first <= place and (self.last is None or place <= self.last)

    def __str__(self) -> str:
        if self.kind in BY_BATCH:
            where = f"from_batch({self.first})" if self.last is None else f"batches({self.first}, {self.last})"
        else:
            rank = "" if self.rank is None else f", rank={self.rank}"
            visit = f", visit={self.visit}" if self.visit != 1 else ""
            where = f"at(step={self.first}{rank}{visit})"
        short = f"{self.factor:g}"
        factor = short if float(short) == self.factor else repr(self.factor)
        arguments = factor if self.kind in _WITH_FACTOR else ""
        if self.kind is Kind.LEARNING_RATE_TIMES and self.last is not None:
            arguments += f", steps={self.last - self.first + 1}"
        return f"{where}.{self.kind.value}({arguments}){'.every_time()' if self.every_time else ''}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing, or several, that go wrong in one run; `str` gives the sentence back."""

    strikes: tuple[Strike, ...]

    def every_time(self) -> Fault:
        """The same fault, met again by replays and by the same steps done again."""
        return Fault(tuple(replace(strike, every_time=True) for strike in self.strikes))

    def __str__(self) -> str:
        if len(self.strikes) == 1:
            return str(self.strikes[0])
        return f"all_of({', '.join(map(str, self.strikes))})"


@dataclass(frozen=True, slots=True)
class Moment:
    """When and where; its methods say what goes wrong. Made by :func:`at`, :func:`batches` and :func:`from_batch`."""

    steps: tuple[int, int] | None = None
    batches: tuple[int, int | None] | None = None
    rank: int | None = None
    visit: int = 1

    def gradient_is_nan(self) -> Fault:
        """The gradient that one rank computes, before any reduction, is NaN."""
        return self._fault(Kind.GRADIENT_IS_NAN)

    def gradient_times(self, factor: float) -> Fault:
        """The gradient that one rank computes, before any reduction, is so many times what it should be."""
        return self._fault(Kind.GRADIENT_TIMES, factor)

    def flip_bit_in_gradient(self) -> Fault:
        """The top exponent bit of one element of a rank's part of the reduced gradient."""
        return self._fault(Kind.FLIP_BIT_IN_GRADIENT)

    def flip_bit_in_weight(self) -> Fault:
        """The top exponent bit of one of a rank's fp32 master weights, after the update."""
        return self._fault(Kind.FLIP_BIT_IN_WEIGHT)

    def flip_bit_in_moment(self) -> Fault:
        """The top exponent bit of one element of Adam's first moment on a rank, after the update."""
        return self._fault(Kind.FLIP_BIT_IN_MOMENT)

    def flip_bit_in_second_moment(self) -> Fault:
        """The top exponent bit of one element of Adam's second moment on a rank, after the update."""
        return self._fault(Kind.FLIP_BIT_IN_SECOND_MOMENT)

    def flip_bit_in_replica(self) -> Fault:
        """The lowest bit of one weight that a rank computes with and that all ranks should hold alike (ZeRO 0, 1 and
        2), after the update: nothing is ever seen of it in a loss."""
        return self._fault(Kind.FLIP_BIT_IN_REPLICA)

    def learning_rate_times(self, factor: float, steps: int = 1) -> Fault:
        """So many updates in a row are made at so many times the learning rate."""
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, but is {steps}")
        return self._fault(Kind.LEARNING_RATE_TIMES, factor, steps)

    def corrupt_snapshot(self) -> Fault:
        """A bit flips in the first snapshot that is taken at this step or later, after its checksum was taken."""
        return self._fault(Kind.CORRUPT_SNAPSHOT)

    def disagree(self) -> Fault:
        """One rank believes that it decided otherwise than the others."""
        return self._fault(Kind.DISAGREE)

    def data_is_nan(self) -> Fault:
        """Data that gives a gradient of NaN whenever it is computed."""
        return self._fault(Kind.DATA_IS_NAN)

    def random_tokens(self) -> Fault:
        """Every token is drawn from the whole vocabulary."""
        return self._fault(Kind.RANDOM_TOKENS)

    def one_token(self) -> Fault:
        """Every token is the same one."""
        return self._fault(Kind.ONE_TOKEN)

    def shuffled_labels(self) -> Fault:
        """The targets of each sample change places."""
        return self._fault(Kind.SHUFFLED_LABELS)

    def drift(self, rate: float) -> Fault:
        """A share of the targets of each sample change places, which grows by `rate` with every batch."""
        if not 0 < rate <= 1:
            raise ValueError(f"the rate of drift must lie in (0, 1], but is {rate:g}")
        return self._fault(Kind.DRIFT, rate)

    def _fault(self, kind: Kind, factor: float = 1.0, steps: int = 1) -> Fault:
        span: tuple[int, int | None]
        if kind in BY_BATCH:
            if self.batches is None or self.rank is not None or self.visit != 1:
                raise ValueError(f"{kind.value} is in the data: place it with batches(first, last) or at(batch=…)")
            span = self.batches
        else:
            if self.steps is None:
                raise ValueError(f"{kind.value} happens at a step: place it with at(step=…)")
            span = (self.steps[0], self.steps[0] + steps - 1)
        if factor != factor:
            raise ValueError(f"the factor of {kind.value} must be a number")
        rank = self.rank if kind in _ON_ALL_RANKS else (self.rank or 0)
        return Fault((Strike(kind, *span, rank, float(factor), self.visit),))


def at(*, step: int | None = None, batch: int | None = None, rank: int | None = None, visit: int = 1) -> Moment:
    """At a step (counted from 1), or a batch index (from 0).

    Args:
        rank: where; by default rank 0, and every rank for the learning rate.
        visit: which attempt at the step meets it, counted from 1: 2 is a replay, or the way back after a rollback.

    Raises:
        ValueError: one sentence.
    """
    if (step is None) == (batch is None):
        raise ValueError("at(…) takes either step or batch")
    _whole("rank", rank, 0)
    _whole("visit", visit, 1)
    _whole("step", step, 1)
    _whole("batch", batch, 0)
    if step is not None:
        return Moment(steps=(step, step), rank=rank, visit=visit)
    assert batch is not None
    return Moment(batches=(batch, batch), rank=rank, visit=visit)


def batches(first: int, last: int) -> Moment:
    """In the batches first … last.

    Raises:
        ValueError: it is no range.
    """
    _whole("first", first, 0)
    _whole("last", last, 0)
    if last < first:
        raise ValueError(f"batches({first}, {last}) is empty: the first comes before the last")
    return Moment(batches=(first, last))


def from_batch(first: int) -> Moment:
    """In all batches from this one on."""
    _whole("first", first, 0)
    return Moment(batches=(first, None))


def all_of(*faults: Fault) -> Fault:
    """Several faults in one run."""
    if not faults:
        raise ValueError("all_of(…) takes at least one fault")
    return Fault(tuple(strike for fault in faults for strike in fault.strikes))


def _whole(name: str, value: int | None, least: int) -> None:
    if value is not None and (not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value}")
