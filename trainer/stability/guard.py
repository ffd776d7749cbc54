"""Decides, from numbers alone, what becomes of a gradient. The same numbers give the same verdict on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.config.schema import GuardConfig
from trainer.records import FloatArray, Halt, Skip, Step, StepStats, Verdict

_FP16_SCALE_SEARCH = 32
"""Skips in a row that the search for a loss scale may take: from 2¹⁶ down to 1 and back up with margin."""


class Guard:
    """Skips gradients that are not finite, and halts when skipping does not help.

    Args:
        clip: global norm that every accepted gradient is clipped to (0: not at all).
        parameter_names: for the diagnosis, in the order of `StepStats.parameter_norms`.
    """

    def __init__(self, config: GuardConfig, *, clip: float, parameter_names: Sequence[str]):
        self._config = config
        self._clip = clip
        self._names = tuple(parameter_names)
        self.consecutive_skips = 0

    def judge(self, stats: StepStats) -> Verdict:
        """The verdict on one attempt."""
        if not stats.agree:
            return Halt(
                f"the ranks decided differently on attempt {stats.attempt - 1}: their states have diverged. "
                "Resume from the last checkpoint; if it comes again, suspect the hardware of one rank"
            )
        if math.isfinite(stats.grad_norm) and math.isfinite(stats.loss):
            self.consecutive_skips = 0
            return Step(self._clip)
        self.consecutive_skips += 1
        reason = self._describe(stats)
        searching = stats.loss_scale > 1 and math.isfinite(stats.loss)
        allowed = self._config.max_consecutive_skips + (_FP16_SCALE_SEARCH if searching else 0)
        if self.consecutive_skips > allowed:
            return Halt(
                f"{self.consecutive_skips} attempts in a row gave no finite gradient; the last one (batch "
                f"{stats.batch_index}): {reason}. Lower optim.lr, lengthen schedule.warmup or look at the data"
            )
        # DeepSpeed refuses this step itself and lowers the loss scale, which a discarded gradient would not
        return Step(self._clip) if searching else Skip(reason)

    def restore(self, consecutive_skips: int) -> None:
        """Go on from the `consecutive_skips` that a checkpoint holds."""
        self.consecutive_skips = consecutive_skips

    def _describe(self, stats: StepStats) -> str:
        parts = []
        if not math.isfinite(stats.loss):
            parts.append(f"the loss is {stats.loss}")
        if stats.num_nonfinite:
            where = _worst(stats.parameter_norms, self._names)
            parts.append(f"{stats.num_nonfinite} gradient elements are not finite{where}")
        elif not math.isfinite(stats.grad_norm):
            parts.append(f"the gradient norm is {stats.grad_norm}")
        return ", ".join(parts)


def _worst(norms: FloatArray, names: Sequence[str]) -> str:
    bad = [name for name, norm in zip(names, norms, strict=False) if not math.isfinite(norm)]
    if not bad:
        return ""
    return f" (in {bad[0]})" if len(bad) == 1 else f" (in {len(bad)} of {len(names)} parameters, first {bad[0]})"
