"""The learning rate as a pure function of the step: nothing to save, nothing to resume. Free of torch."""

from __future__ import annotations

import math

from trainer.config.resolve import Arithmetic
from trainer.config.schema import OptimConfig, ScheduleConfig


def learning_rate(config: OptimConfig, schedule: ScheduleConfig, numbers: Arithmetic, step: int) -> float:
    """The rate of the update that makes step number `step`, counted from 1.

    Warm-up rises linearly from `lr / warmup_steps` at step 1 to `lr` at step `warmup_steps`. The decay ends at
    `lr × floor` exactly on the last step; steps beyond it have the rate of the last. Without warm-up the first step
    has the peak.

    - `cosine`: half a cosine from the end of the warm-up (SGDR, https://arxiv.org/abs/1608.03983, eq. 5).
    - `linear`: a straight line from the end of the warm-up.
    - `wsd`: the peak, then a straight line over the last `decay_steps` (https://arxiv.org/abs/2404.06395, §4.2).
    - `constant`: the peak; `floor` has no part in it.
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, and {step} is before the first")
    if step < numbers.warmup_steps:
        return config.lr * (step / numbers.warmup_steps)
    last_at_peak = max(numbers.steps - numbers.decay_steps, 1)
    step = min(step, numbers.steps)
    if schedule.kind == "constant" or step <= last_at_peak:
        return config.lr
    progress = (step - last_at_peak) / (numbers.steps - last_at_peak)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    # a weighted mean rather than floor + (1 − floor) × share: both ends come out exact
    return config.lr * (share + (1.0 - share) * schedule.floor)
