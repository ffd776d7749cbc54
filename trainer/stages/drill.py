"""The drill: a clean run, then each fault in turn, in the same processes; and what became of each."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.config.files import RunFiles
from trainer.faults.catalogue import Exercise
from trainer.stages.build import Setting
from trainer.stages.exercise import Run, exercise, rungs

TOLERANCE = 0.01
"""Relative difference of the held-out loss to that of the clean run, at most."""
MAX_LOST = 50
"""Steps."""


@dataclass(frozen=True, slots=True)
class Result:
    """How one fault ended: an element of `results` in `drill.json`."""

    name: str
    sentence: str
    passed: bool
    outcome: str
    """recovered · unnoticed (and harmless) · halted · failed"""
    why: str
    """What failed; the diagnosis of a halt."""
    detected_after: int | None
    """Attempts from the one that the fault struck to the first alarm. None: there was none."""
    rungs: tuple[str, ...]
    lost: int
    """Steps of work of which nothing stands in the end."""
    seconds_recovering: float | None
    """From the first alarm to the first step beyond the last one."""
    seconds: float
    """Of the whole run."""
    held_out_loss: float | None
    difference: float | None
    """Of the held-out loss to the clean run, relative."""
    same_bits: str | None
    """`clean`: the final state is that of the clean run to the bit; `excluded`: that of a run from whose data the
    quarantined batches were left out from the start. None: neither, or the learning rate was cooled."""
    quarantine: tuple[tuple[int, int], ...]


def drill(
    setting: Setting, exercises: Sequence[Exercise], *, before: int = 0, show: bool = False
) -> tuple[Run, list[Result]]:
    """The clean run, and the result of each exercise. A collective.

    Args:
        before: steps that only the clean run makes; all others go on from there, to the bit.
        show: say on standard error how it gets on.
    """

    def say(text: str) -> None:
        if show:
            print(text, file=sys.stderr, flush=True)

    with training_before(setting, before) as (clean, start):
        say(f"clean: held-out loss {clean.held_out_loss:.4f}, {clean.seconds:.1f} s")
        results: list[Result] = []
        references: dict[tuple[tuple[int, int], ...], str] = {}
        for number, each in enumerate(exercises, 1):
            run = exercise(setting, [each.fault], name=_folder(each.name), start=start)
            left_out = run.quarantine
            if compares_with_exclusion(run, clean) and left_out not in references:
                reference = exercise(setting, name="excluded", start=start, leave_out=left_out)
                references[left_out] = reference.digest
            results.append(assess(each, run, clean, references.get(left_out)))
            say(f"{number}/{len(exercises)} {each.name}: {results[-1].outcome}, {run.seconds:.1f} s")
    return clean, results


@contextmanager
def training_before(setting: Setting, before: int) -> Iterator[tuple[Run, Path | None]]:
    """The clean run, and the checkpoints folder of its step `before`, which is there within the context; None: 0."""
    clean = exercise(setting, name="clean", keep_step=before or None)
    folder = RunFiles(setting.files.root / "clean").checkpoints
    try:
        yield clean, folder if before else None
    finally:
        if setting.ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def compares_with_exclusion(run: Run, clean: Run) -> bool:
    """Whether the run should end with the bits of one that never saw what was left out."""
    left_out = run.quarantine != clean.quarantine
    return run.ended == "completed" and run.digest != clean.digest and left_out and not run.cooled


def assess(each: Exercise, run: Run, clean: Run, excluded: str | None = None) -> Result:
    """What became of a fault.

    Args:
        excluded: digest of the run from whose data the quarantined batches were left out.
    """
    alarms = [a for a in run.alarms if run.struck is not None and a.stats.attempt >= run.struck]
    difference = abs(run.held_out_loss - clean.held_out_loss) / clean.held_out_loss
    same_bits = "clean" if run.digest == clean.digest else "excluded" if run.digest == excluded else None
    problems = []
    if run.struck is None:
        problems.append("the fault never struck")
    if any(a.stats.attempt < (run.struck or 0) for a in run.alarms) and not clean.alarms:
        problems.append("there was an alarm before the fault")
    if run.ended != each.ends:
        problems.append(f"it ended {run.ended}: {run.message}" if run.message else f"it ended {run.ended}")
    if each.ends == "halted":
        problems += [
            f"the diagnosis does not say {word!r}: {run.message}" for word in each.says if word not in run.message
        ]
    elif run.ended == "completed":
        if not difference <= TOLERANCE:
            problems.append(f"the held-out loss is {difference:.1%} from that of the clean run")
        if run.lost > MAX_LOST:
            problems.append(f"{run.lost} steps were lost")
        if each.must_notice and not alarms:
            problems.append("it went unnoticed")
    outcome = "halted" if run.ended == "halted" else "recovered" if alarms else "unnoticed"
    return Result(
        name=each.name,
        sentence=str(each.fault),
        passed=not problems,
        outcome="failed" if problems else outcome,
        why="; ".join(problems) or run.message,
        detected_after=alarms[0].stats.attempt - run.struck if alarms and run.struck is not None else None,
        rungs=rungs(run),
        lost=run.lost,
        seconds_recovering=recovering(run),
        seconds=run.seconds,
        held_out_loss=_finite(run.held_out_loss),
        difference=_finite(difference),
        same_bits=same_bits,
        quarantine=run.quarantine,
    )


def recovering(run: Run) -> float | None:
    """Seconds from the first alarm to the first update beyond every step that was attempted at an alarm."""
    if not run.alarms:
        return None
    first, last = run.alarms[0], run.alarms[-1]
    furthest = max(alarm.stats.step for alarm in run.alarms)
    for attempt in run.attempts:
        if attempt.applied and attempt.stats.attempt > last.stats.attempt and attempt.stats.step >= furthest:
            return attempt.at - first.at
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:80]
