"""Where the guard would have acted on a saved curve, as far as that can be told from its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.stability.watch import Watch

PERSISTENT = 3
"""Alarms in a row after which the state is taken to be harmed, not the batch."""


@dataclass(frozen=True, slots=True)
class Action:
    """One act of the guard."""

    step: int
    action: Literal["leave out", "roll back", "accept level"]
    text: str
    """The alarm, as a sentence."""
    score: float
    """In robust standard deviations; infinite where the value is not finite."""
    since_step: int
    """The first step that a roll back would undo; else the step itself."""


def judge_curve(
    losses: Sequence[float],
    grad_norms: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    *,
    spike: float = 8.0,
    drift: float = 10.0,
) -> list[Action]:
    """Replay a saved curve through the detector.

    A sudden alarm leaves its batch out. A drift, or the third alarm in a row, is a state that was harmed: the guard
    would roll back. A saved curve cannot show what would have come then, so its alarming values go on being left out,
    without further acts, until they are usual again or consistent with each other for long enough to be a new level.

    Args:
        losses: in the order of the run; may hold NaN.
        grad_norms: of the same length; None: only the loss is judged.
        steps: of the values; None: 1, 2, 3 …
        spike: see `Watch`.
        drift: see `Watch`.

    Raises:
        ValueError: lengths differ.
    """
    steps = range(1, len(losses) + 1) if steps is None else steps
    for name, values in (("gradient norms", grad_norms), ("steps", steps)):
        if values is not None and len(values) != len(losses):
            raise ValueError(f"{len(losses)} losses, but {len(values)} {name}")
    watch = Watch(spike=spike, drift=drift)
    actions: list[Action] = []
    in_a_row = 0
    onset = 0
    rolled_back = False
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        norm = 1.0 if grad_norms is None else grad_norms[i]
        alarms = watch.look(step, loss, norm)
        if not alarms:
            watch.accept(step, loss, norm)
            in_a_row, rolled_back = 0, False
            continue
        in_a_row += 1
        onset = alarms[0].since_step if in_a_row == 1 else min(onset, alarms[0].since_step)
        watch.reject(step, loss, norm)
        harmed = alarms[0].kind == "drift" or in_a_row >= PERSISTENT
        if not rolled_back:
            actions.append(
                Action(
                    step=step,
                    action="roll back" if harmed else "leave out",
                    text="; ".join(alarm.text for alarm in alarms),
                    score=alarms[0].score,
                    since_step=onset if harmed else step,
                )
            )
        rolled_back = rolled_back or harmed
        if watch.new_level:
            watch.accept_level()
            level = watch.usual_loss
            text = f"{in_a_row} values in a row are consistent: {level:.4g} is taken as the usual loss from here on"
            actions.append(Action(step, "accept level", text, math.nan, step))
            in_a_row, rolled_back = 0, False
    return actions
