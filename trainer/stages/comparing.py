"""Evaluations of a run compared: on every rank by the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.distributed as dist

from trainer.best import Best


def compare(best: Best, step: int, scores: Mapping[str, float], say: Callable[[Literal["warning"], str], None]) -> bool:
    """Take in the evaluation at `step`; whether it is better than all before. A collective.

    Args:
        scores: by name, `loss` among them. One that is not defined on these samples may be missing.
        say: told where the score to compare by is.
    """
    if best.score is None:
        return False
    box = [scores.get(best.score, math.nan)]
    dist.broadcast_object_list(box, src=0)
    if math.isnan(box[0]):
        say(
            "warning",
            f"evaluation.best: {best.score} is not defined at step {step}: the evaluation counts as not better",
        )
    return best.take(step, box[0])


def told(best: Best) -> dict[str, Any] | None:
    """The best evaluation as the ledger has it; None: there is none."""
    found = best.best
    return None if found is None else {"score": best.score, "step": found.step, "value": found.value}


def ending(best: Best, step: int, steps: int, loss: float | None) -> str:
    """One sentence about a run that has completed at `step` of `steps`."""
    held_out = f"held-out loss {math.nan if loss is None else loss:.4f}"
    after = "" if best.best is None else f"; best {best}"
    if step == steps:
        return f"completed {steps} steps, {held_out}{after}"
    why = f"{best.waited} evaluation{'' if best.waited == 1 else 's'} without a better one (evaluation.patience)"
    return f"early stopping at step {step} of {steps} after {why}, {held_out}{after}"
