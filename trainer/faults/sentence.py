"""What goes wrong, where and when, as a sentence: `at(step=40, rank=1).gradient_is_nan()`.

Faults of the hardware and of the run are placed by step, faults of the data by batch index. A fault placed by step is
transient: it is there the first time that the run comes to its step, and a replay, or the same steps done again after
a rollback, do not meet it; `.every_time()` makes it stay. A fault of the data is part of the data: whenever the
batch is computed, it is there. A fault of the processes (they die, stand still, cannot write) strikes in one start of
the run, by default its first: what is started afterwards does not remember it.
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
    FLIP_BIT_IN_TEACHER = "flip_bit_in_teacher"
    LEARNING_RATE_TIMES = "learning_rate_times"
    CORRUPT_SNAPSHOT = "corrupt_snapshot"
    DISAGREE = "disagree"
    DATA_IS_NAN = "data_is_nan"
    RANDOM_TOKENS = "random_tokens"
    ONE_TOKEN = "one_token"  # noqa: S105 (of text)
    SHUFFLED_LABELS = "shuffled_labels"
    DRIFT = "drift"
    KILL = "kill"
    KILL_EVERYTHING = "kill_everything"
    KILL_WHILE_SAVING = "kill_while_saving"
    KILL_EVERYTHING_WHILE_SAVING = "kill_everything_while_saving"
    STOP = "stop"
    TERMINATE = "terminate"
    WARN = "warn"
    DAMAGE_CHECKPOINT = "damage_checkpoint"
    TRUNCATE_CHECKPOINT = "truncate_checkpoint"
    DELETE_CHECKPOINT_FILE = "delete_checkpoint_file"
    DISK_IS_FULL = "disk_is_full"
    CHECKPOINTS_ARE_READ_ONLY = "checkpoints_are_read_only"
    DATA_WORKER_DIES = "data_worker_dies"
    SLOW = "slow"
    WARN_WHILE_SAVING = "warn_while_saving"


BY_BATCH = frozenset({Kind.DATA_IS_NAN, Kind.RANDOM_TOKENS, Kind.ONE_TOKEN, Kind.SHUFFLED_LABELS, Kind.DRIFT})
"""Placed by batch index."""

OF_TOKENS = BY_BATCH - {Kind.DATA_IS_NAN}
"""In what the stream hands out; all others are in the step itself."""

OF_CHECKPOINT = frozenset({Kind.DAMAGE_CHECKPOINT, Kind.TRUNCATE_CHECKPOINT, Kind.DELETE_CHECKPOINT_FILE})
"""In the files of the newest checkpoint."""

REQUESTS = frozenset({Kind.TERMINATE, Kind.WARN, Kind.WARN_WHILE_SAVING})
"""Not faults at all: the run must save and end in order."""

OF_PROCESS = (
    OF_CHECKPOINT
    | REQUESTS
    | {
        Kind.KILL,
        Kind.KILL_EVERYTHING,
        Kind.KILL_WHILE_SAVING,
        Kind.KILL_EVERYTHING_WHILE_SAVING,
        Kind.STOP,
        Kind.DISK_IS_FULL,
        Kind.CHECKPOINTS_ARE_READ_ONLY,
        Kind.DATA_WORKER_DIES,
        Kind.SLOW,
    }
)
"""Of the processes, their disk and their checkpoints; all others leave the processes as they are."""

WHILE_SAVING = frozenset({Kind.KILL_WHILE_SAVING, Kind.KILL_EVERYTHING_WHILE_SAVING, Kind.WARN_WHILE_SAVING})
"""At a moment of the writing of a checkpoint."""

_ON_ALL_RANKS = BY_BATCH | {
    Kind.LEARNING_RATE_TIMES,
    Kind.KILL_EVERYTHING,
    Kind.DISK_IS_FULL,
    Kind.CHECKPOINTS_ARE_READ_ONLY,
}
_WITH_FACTOR = frozenset({Kind.GRADIENT_TIMES, Kind.LEARNING_RATE_TIMES, Kind.DRIFT, Kind.SLOW}) | WHILE_SAVING
_WITH_STEPS = frozenset({Kind.LEARNING_RATE_TIMES, Kind.DISK_IS_FULL, Kind.CHECKPOINTS_ARE_READ_ONLY, Kind.SLOW})


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
    """Of `gradient_times`, `learning_rate_times`; the share of labels that `drift` adds with every batch; which moment
    of a save `…_while_saving` waits for; the seconds that `slow` adds to a step."""
    visit: int = 1
    """It is there the visit-th time that an attempt at its step begins: 2 is a replay, or the way back after a
    rollback."""
    every_time: bool = False
    """Not only that once; a fault of the processes: in every start."""
    start: int | None = None
    """Which start of the run meets it; None: every one."""

    def covers(self, place: int) -> bool:
        """Whether a step, or a batch index, lies in it."""
        return self.first <= place and (self.last is None or place <= self.last)

    def __str__(self) -> str:
        if self.kind in BY_BATCH:
            where = f"from_batch({self.first})" if self.last is None else f"batches({self.first}, {self.last})"
        else:
            rank = "" if self.rank is None else f", rank={self.rank}"
            visit = f", visit={self.visit}" if self.visit != 1 else ""
            usual = 1 if self.kind in OF_PROCESS else None
            start = f", start={self.start}" if self.start != usual else ""
            where = f"at(step={self.first}{rank}{visit}{start})"
        short = f"{self.factor:g}"
        arguments = []
        if self.kind in _WITH_FACTOR:
            arguments.append(short if float(short) == self.factor else repr(self.factor))
        if self.kind in _WITH_STEPS and self.last is not None:
            arguments.append(f"steps={self.last - self.first + 1}")
        return f"{where}.{self.kind.value}({', '.join(arguments)}){'.every_time()' if self.every_time else ''}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing, or several, that go wrong in one run; `str` gives the sentence back."""

    strikes: tuple[Strike, ...]

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(strike.kind for strike in self.strikes)

    def every_time(self) -> Fault:
        """The same fault, met again by replays, by the same steps done again, and by later starts."""
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
    start: int | None = None

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

    def flip_bit_in_teacher(self) -> Fault:
        """The top exponent bit of one of the teacher's weights on a rank, before the step (distillation from `replica`
        and `zero3`)."""
        return self._fault(Kind.FLIP_BIT_IN_TEACHER)

    def learning_rate_times(self, factor: float, steps: int = 1) -> Fault:
        """So many updates in a row are made at so many times the learning rate."""
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

    def kill(self) -> Fault:
        """One rank is killed (SIGKILL)."""
        return self._fault(Kind.KILL)

    def kill_everything(self) -> Fault:
        """All ranks and their agent are killed; on every machine, unless a rank is named: then on its machine."""
        return self._fault(Kind.KILL_EVERYTHING)

    def kill_while_saving(self, moment: int = 2) -> Fault:
        """A rank is killed while it writes a checkpoint, at this step or later: at the first moment of a save, the
        second (in the middle of its first file), and so on; counted on over saves."""
        return self._fault(Kind.KILL_WHILE_SAVING, _whole("moment", moment, 1))

    def warn_while_saving(self, moment: int = 2) -> Fault:
        """A rank gets SIGUSR1, a scheduler's warning, while it writes a checkpoint: at a moment as before."""
        return self._fault(Kind.WARN_WHILE_SAVING, _whole("moment", moment, 1))

    def kill_everything_while_saving(self, moment: int = 2) -> Fault:
        """As before, and with the rank all ranks on its machine and their agent."""
        return self._fault(Kind.KILL_EVERYTHING_WHILE_SAVING, _whole("moment", moment, 1))

    def stop(self) -> Fault:
        """A rank stands still (SIGSTOP): alive, and of no use."""
        return self._fault(Kind.STOP)

    def terminate(self) -> Fault:
        """A rank is asked to end (SIGTERM), as schedulers do."""
        return self._fault(Kind.TERMINATE)

    def warn(self) -> Fault:
        """A rank is told that its time is nearly over (SIGUSR1), as Slurm does."""
        return self._fault(Kind.WARN)

    def damage_checkpoint(self) -> Fault:
        """One bit of a rank's file in the newest checkpoint flips, then everything is killed."""
        return self._fault(Kind.DAMAGE_CHECKPOINT)

    def truncate_checkpoint(self) -> Fault:
        """A rank's file in the newest checkpoint loses its second half, then everything is killed."""
        return self._fault(Kind.TRUNCATE_CHECKPOINT)

    def delete_checkpoint_file(self) -> Fault:
        """A rank's file in the newest checkpoint is gone, then everything is killed."""
        return self._fault(Kind.DELETE_CHECKPOINT_FILE)

    def disk_is_full(self, steps: int) -> Fault:
        """For so many steps no file can grow beyond its first page: what is written fails, in the middle."""
        return self._fault(Kind.DISK_IS_FULL, steps=steps)

    def checkpoints_are_read_only(self, steps: int) -> Fault:
        """For so many steps nothing can be made in the folder of checkpoints."""
        return self._fault(Kind.CHECKPOINTS_ARE_READ_ONLY, steps=steps)

    def data_worker_dies(self) -> Fault:
        """The thread of a rank that reads data ahead dies."""
        return self._fault(Kind.DATA_WORKER_DIES)

    def slow(self, seconds: float, steps: int = 1) -> Fault:
        """The rank computes for so many seconds more, in each of so many steps."""
        return self._fault(Kind.SLOW, seconds, steps)

    def _fault(self, kind: Kind, factor: float = 1.0, steps: int = 1) -> Fault:
        span: tuple[int, int | None]
        if kind in BY_BATCH:
            if self.start is not None:
                raise ValueError(f"{kind.value} is in the data, and the data is the same in every start")
            if self.batches is None or self.rank is not None or self.visit != 1:
                raise ValueError(f"{kind.value} is in the data: place it with batches(first, last) or at(batch=…)")
            span = self.batches
        else:
            if self.steps is None:
                raise ValueError(f"{kind.value} happens at a step: place it with at(step=…)")
            span = (self.steps[0], self.steps[0] + _whole("steps", steps, 1) - 1)
        if factor != factor:
            raise ValueError(f"the factor of {kind.value} must be a number")
        rank = self.rank if kind in _ON_ALL_RANKS else (self.rank or 0)
        start = 1 if self.start is None and kind in OF_PROCESS else self.start
        return Fault((Strike(kind, *span, rank, float(factor), self.visit, start=start),))


def at(
    *,
    step: int | None = None,
    batch: int | None = None,
    rank: int | None = None,
    visit: int = 1,
    start: int | None = None,
) -> Moment:
    """At a step (counted from 1), or a batch index (from 0).

    Args:
        rank: where; by default rank 0, and every rank for the learning rate, the disk and all that is killed.
        visit: which attempt at the step meets it, counted from 1: 2 is a replay, or the way back after a rollback.
        start: which start of the run meets it; by default every one, and the first one for what strikes processes.

    Raises:
        ValueError: one sentence.
    """
    if (step is None) == (batch is None):
        raise ValueError("at(…) takes either step or batch")
    for name, value, least in (("rank", rank, 0), ("step", step, 1), ("batch", batch, 0), ("start", start, 1)):
        if value is not None:
            _whole(name, value, least)
    _whole("visit", visit, 1)
    if step is not None:
        return Moment(steps=(step, step), rank=rank, visit=visit, start=start)
    assert batch is not None
    return Moment(batches=(batch, batch), rank=rank, visit=visit, start=start)


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


def _whole(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value}")
    return value
