"""The faults of the drill, placed in a run of given length, and what is expected of each."""

from __future__ import annotations

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.errors import ConfigError
from trainer.faults.parse import parse_fault
from trainer.faults.sentence import OF_PROCESS, REQUESTS, Fault, Kind, all_of, at, batches

REQUEST, REPORT = "request.json", "drill.json"
"""In the directory of a drill: which faults are wanted; what became of them."""

MIN_STEPS = 40
"""Of a drill: there is a snapshot before a fault strikes, and time to recover after it."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One fault, and how it should end."""

    name: str
    fault: Fault
    ends: Literal["completed", "halted", "stopped"] = "completed"
    """`halted` where nothing can be recovered; `stopped` where it is asked to end and the same command goes on."""
    must_notice: bool = True
    """Not seeing it is a failure even where the result is as good."""
    says: tuple[str, ...] = ()
    """What the diagnosis of a halt, or what a run in processes of its own says, must hold."""

    @property
    def of_processes(self) -> bool:
        """Whether it needs processes of its own: they die of it."""
        return bool(self.fault.kinds & OF_PROCESS)


def catalogue(
    steps: int, ranks: int, stage: int, before: int = 0, *, with_teacher: bool = False
) -> tuple[Exercise, ...]:
    """Every fault of the drill that can happen to so many ranks in this ZeRO stage, in the middle of the `steps` that
    follow on `before` others.

    Args:
        with_teacher: a teacher's weights are in the memory of the ranks.
    """
    middle = before + steps // 2
    placed = _placed(middle, min(steps // 8, 20), ranks, stage)
    if not with_teacher:
        return placed
    return (*placed, Exercise("teacher-bit", at(step=middle, rank=ranks - 1).flip_bit_in_teacher()))


def process_catalogue(steps: int, ranks: int) -> tuple[Exercise, ...]:
    """Every fault of the processes, the disk and the checkpoints, between two of the checkpoints that a run of so many
    steps saves every :func:`save_every` steps."""
    every = save_every(steps)
    place = every * (steps // every // 2) + every // 2 + 1
    last = ranks - 1
    return (
        Exercise("kill-rank", at(step=place, rank=last).kill()),
        Exercise("kill-all", at(step=place).kill_everything()),
        Exercise("kill-rank-saving", at(step=place, rank=last).kill_while_saving()),
        Exercise("kill-all-saving", at(step=place).kill_everything_while_saving(3)),
        Exercise("stop-rank", at(step=place, rank=last).stop(), says=(f"rank {last}",)),
        Exercise("damage-checkpoint", at(step=place).damage_checkpoint(), says=("rank-00000.safetensors",)),
        Exercise("truncate-checkpoint", at(step=place).truncate_checkpoint(), says=("rank-00000.safetensors",)),
        Exercise("delete-file", at(step=place).delete_checkpoint_file(), says=("rank-00000.safetensors",)),
        Exercise("full-disk", at(step=place).disk_is_full(steps=2 * every), says=("no checkpoint at step",)),
        Exercise(
            "read-only", at(step=place).checkpoints_are_read_only(steps=2 * every), says=("no checkpoint at step",)
        ),
        Exercise("data-worker", at(step=place, rank=last).data_worker_dies(), says=(f"data-rank-{last}",)),
        Exercise("slow-rank", at(step=place, rank=last).slow(0.5, steps=2 * every)),
        Exercise("terminate", at(step=place, rank=last).terminate(), ends="stopped"),
        Exercise("warn", at(step=place).warn(), ends="stopped"),
        Exercise("warn-saving", at(step=place, rank=last).warn_while_saving(), ends="stopped"),
    )


def save_every(steps: int) -> int:
    """Steps between the checkpoints of a run that is drilled with faults of its processes."""
    return max(2, steps // 8)


def _placed(middle: int, reach: int, ranks: int, stage: int) -> tuple[Exercise, ...]:
    last = ranks - 1
    window = batches(middle, middle + 5)
    flip = at(step=middle).flip_bit_in_weight()
    exercises = [
        Exercise("gradient-nan", at(step=middle, rank=last).gradient_is_nan()),
        Exercise("gradient-huge", at(step=middle, rank=last).gradient_times(1000)),
        Exercise("gradient-bit", at(step=middle).flip_bit_in_gradient()),
        Exercise("weight-bit", flip),
        Exercise("moment-bit", at(step=middle).flip_bit_in_moment()),
        Exercise("second-moment-bit", at(step=middle).flip_bit_in_second_moment()),
        Exercise("replica-bit", at(step=middle, rank=last).flip_bit_in_replica()),
        Exercise("data-nan", at(batch=middle).data_is_nan()),
        Exercise("random-tokens", window.random_tokens()),
        Exercise("one-token", window.one_token(), must_notice=False),
        Exercise("shuffled-labels", window.shuffled_labels(), must_notice=False),
        Exercise("learning-rate", at(step=middle).learning_rate_times(30, steps=3)),
        Exercise("drift", batches(middle - reach, middle + reach).drift(0.03), must_notice=False),
        Exercise("second-incident", all_of(flip, at(step=middle - 2, rank=last, visit=2).gradient_is_nan())),
        Exercise("corrupt-snapshot", all_of(at(step=max(1, middle - 10)).corrupt_snapshot(), flip)),
        Exercise("disagreement", at(step=middle, rank=last).disagree()),
        Exercise(
            "broken-rank",
            at(step=middle, rank=last).gradient_is_nan().every_time(),
            ends="halted",
            says=(f"rank {last}",),
        ),
    ]
    return tuple(exercise for exercise in exercises if _possible(exercise, ranks, stage))


def _possible(exercise: Exercise, ranks: int, stage: int) -> bool:
    kinds = {strike.kind for strike in exercise.fault.strikes}
    if ranks == 1 and kinds & {Kind.DISAGREE, Kind.FLIP_BIT_IN_REPLICA}:
        return False
    return stage < 3 or Kind.FLIP_BIT_IN_REPLICA not in kinds


def random_faults(seed: int, steps: int, ranks: int, stage: int, every: int = 25) -> tuple[Fault, ...]:
    """Faults of every kind that can be recovered, one in about every `every` steps; none near the end."""
    generator = random.Random(seed)  # noqa: S311 (not a secret)
    names = [each.name for each in _placed(every, 1, ranks, stage) if each.name not in _NOT_AT_RANDOM]
    faults, left = [], list[str]()
    for place in range(every, steps - every, every):
        here = place + generator.randrange(every // 2)
        left = left or generator.sample(names, len(names))
        wanted = left.pop()
        faults += [each.fault for each in _placed(here, 1, ranks, stage) if each.name == wanted]
    return tuple(faults)


_NOT_AT_RANDOM = ("broken-rank", "drift", "disagreement")
"""Ends a run; wants more room than there is between two; ends a run when it comes twice in one incident."""


def choose(exercises: Sequence[Exercise], wanted: Sequence[str]) -> tuple[Exercise, ...]:
    """Those with the wanted names (several with commas between them), and faults given as sentences; all of them
    where nothing is wanted.

    Raises:
        ConfigError: with every word that is neither.
    """
    by_name = {exercise.name: exercise for exercise in exercises}
    chosen, problems = [], []
    for word in (word for words in wanted for word in ([words] if "(" in words else words.split(","))):
        if word in by_name:
            chosen.append(by_name[word])
        elif "(" in word:
            try:
                fault = parse_fault(word)
            except ValueError as error:
                problems.append(("--faults", str(error)))
            else:
                ends: Literal["stopped", "completed"] = "stopped" if fault.kinds & REQUESTS else "completed"
                chosen.append(Exercise(str(fault), fault, ends, must_notice=False))
        else:
            close = difflib.get_close_matches(word, by_name, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(by_name)}"
            problems.append(("--faults", f"{word!r} is no fault that can happen here; {hint}"))
    if problems:
        raise ConfigError(problems, "the command line")
    return tuple(chosen) if wanted else tuple(exercises)
