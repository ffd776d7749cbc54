"""The rules that other trainers use against loss spikes, in plain floats, behind one interface.

Each was written here from what the original does (read in its source in November 2026) with the original's defaults.
Every one of them has clipping to a fixed global norm beside it, as its users have.

    rule = RULES["OLMo-core"](total_steps=1000, max_norm=1.0)
    verdict = rule.judge(loss, grad_norm)      # once a step, before the update
    limit = rule.clip(grad_norm)               # then: the largest global norm of this step's gradient
"""

# ruff: noqa: ARG002 - one interface, of which not every rule uses all
from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Literal

Verdict = Literal["apply", "skip", "stop"]


class Rule:
    """Clipping to a fixed global norm and nothing else.

    Attributes:
        alarmed: whether the step that was judged last was noticed, whatever is done about it.
    """

    does = "clips to a fixed norm"

    def __init__(self, total_steps: int | None = None, max_norm: float = 1.0):
        self.total_steps = total_steps
        self.max_norm = max_norm
        self.alarmed = False

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """What becomes of the step with this loss (nats, may be NaN) and this norm (before clipping, may be NaN)."""
        return "apply"

    def clip(self, grad_norm: float) -> float:
        """The largest global norm of the gradient of the step that was judged last."""
        return self.max_norm


class SkipStep(Rule):
    """OLMo-core's `SkipStepOptimizer`: skip where loss or norm exceed the mean of the last 128 by 6σ.

    Skipped values enter the window too. Active from the 64th step. NaN in the window makes both its moments NaN, and
    what is not "at most mean + 6σ" is skipped: 128 steps long nothing is applied. (In the original the skipped update
    is multiplied by zero, so that a NaN gradient also reaches Adam's moments; that is not modelled here.)

    Source: allenai/OLMo-core, src/olmo_core/optim/skip_step_optimizer.py.
    """

    does = "skips"
    window, sigmas = 128, 6.0

    def __init__(self, total_steps: int | None = None, max_norm: float = 1.0):
        super().__init__(total_steps, max_norm)
        self._losses: deque[float] = deque(maxlen=self.window)
        self._norms: deque[float] = deque(maxlen=self.window)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        is_active = len(self._losses) + 1 >= self.window // 2
        usual = self._is_usual(loss, self._losses) and self._is_usual(grad_norm, self._norms) if is_active else True
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self.alarmed = not usual
        return "apply" if usual else "skip"

    def _is_usual(self, value: float, history: deque[float]) -> bool:
        if not all(map(math.isfinite, history)):
            return False
        mean = fmean(history)
        deviation = math.sqrt(sum((entry - mean) * (entry - mean) for entry in history) / (len(history) - 1))
        return value - mean <= self.sigmas * deviation


class KillLossSpike(Rule):
    """llm-foundry's `KillLossSpike`: stop after five losses in a row of at least twice the mean of a window.

    The window is 5 % of the run, at least 100 steps, and nothing is said before it is full. A second rule stops where
    half of a window is above the largest loss of the first window (at most 10). It looks after the update, never at the
    gradient; NaN compares false and resets the count. (By default it only logs; here it is in earnest.)

    Source: mosaicml/llm-foundry, llmfoundry/callbacks/kill_loss_spike_callback.py.
    """

    does = "stops"
    patience, multiple, least_window, most_cap, fraction = 4, 2.0, 100, 10.0, 0.05

    def __init__(self, total_steps: int | None = None, max_norm: float = 1.0):
        super().__init__(total_steps, max_norm)
        self._window = max(self.least_window, round((total_steps or 0) * self.fraction))
        self._losses: deque[float] = deque(maxlen=self._window)
        self._cap = math.nan
        self._steps = self._outliers = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        self._steps += 1
        stops = len(self._losses) == self._window and self._stops(loss)
        self._losses.append(loss)
        self.alarmed = stops
        return "stop" if stops else "apply"

    def _stops(self, loss: float) -> bool:
        if math.isnan(self._cap):
            self._cap = min(max(self._losses), self.most_cap)
        self._outliers = self._outliers + 1 if loss >= self.multiple * _mean(self._losses) else 0
        high = sum(entry > self._cap for entry in self._losses)
        return self._outliers > self.patience or (self._steps >= 2 * self._window and high >= self._window / 2)


class SpikeDetection(Rule):
    """Lightning's `SpikeDetection`: stop where a loss that is worse than the last differs from the mean of ten by twice
    that mean or more, or is not finite.

    Twice the mean *above* it is three times the mean. It looks after the update, at one rank's loss at a time, and ends
    the run; a relaunch then leaves out this batch and the one before.

    Source: Lightning-AI/pytorch-lightning, src/lightning/fabric/utilities/spike.py.
    """

    does = "stops"
    window, tolerance = 10, 2.0

    def __init__(self, total_steps: int | None = None, max_norm: float = 1.0):
        super().__init__(total_steps, max_norm)
        self._losses: deque[float] = deque(maxlen=self.window)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        self.alarmed = bool(self._losses) and self._is_spike(loss)
        if not self.alarmed and math.isfinite(loss):
            self._losses.append(loss)
        return "stop" if self.alarmed else "apply"

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        mean = fmean(self._losses)
        return loss > self._losses[-1] and abs(loss - mean) >= abs(self.tolerance * mean)


class RerunStateMachine(Rule):
    """Megatron-LM's rerun state machine: a value ten times the largest of the first 100 is computed once more, to say
    whose fault it was, and applied; one that is not finite stops the run.

    With `--check-for-spiky-loss` and `--check-for-large-grads` (both off by default). The original looks at the loss of
    a rank and the norm of a bucket of gradients; here it sees the whole.

    Source: NVIDIA/Megatron-LM, megatron/core/rerun_state_machine.py (`is_unexpectedly_large`).
    """

    does = "says so; stops on NaN"
    samples, multiple = 100, 10.0

    def __init__(self, total_steps: int | None = None, max_norm: float = 1.0):
        super().__init__(total_steps, max_norm)
        self._seen = {"loss": 0, "norm": 0}
        self._largest = {"loss": 0.0, "norm": 0.0}

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.alarmed = True
            return "stop"
        large = [self._is_large("loss", loss), self._is_large("norm", grad_norm)]
        self.alarmed = any(large)
        return "apply"

    def _is_large(self, name: str, value: float) -> bool:
        if self._seen[name] < self.samples:
            self._seen[name] += 1
            self._largest[name] = max(self._largest[name], abs(value))
            return False
        return abs(value) >= self.multiple * self._largest[name]


class ZClip(Rule):
    """ZClip: clip to μ + z²σ/s where the norm's z-score s exceeds z = 2.5; μ and σ are exponential averages (0.97) of
    what was let through, from 25 steps on. At most the fixed norm. Looks at nothing but the norm.

    NaN compares false, is not clipped, and makes both averages NaN for good.

    Source: Kumar et al. 2025, https://arxiv.org/abs/2504.02507, algorithm 1; bluorion-com/ZClip, zclip/zclip.py.
    """

    does = "clips"
    decay, threshold, warmup, epsilon = 0.97, 2.5, 25, 1e-6

    def __init__(self, total_steps: int | None = None, max_norm: float = 1.0):
        super().__init__(total_steps, max_norm)
        self._first: list[float] = []
        self._mean = self._variance = math.nan
        self._limit = max_norm

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        self.alarmed, self._limit = False, self.max_norm
        if len(self._first) < self.warmup:
            self._first.append(grad_norm)
            if len(self._first) == self.warmup:
                self._mean = _mean(self._first)
                self._variance = _mean([(norm - self._mean) * (norm - self._mean) for norm in self._first])
            return "apply"
        deviation = math.sqrt(self._variance) if self._variance >= 0 else math.nan
        score = (grad_norm - self._mean) / (deviation + self.epsilon)
        let_through = grad_norm
        if score > self.threshold:
            self.alarmed = True
            let_through = self._mean + self.threshold**2 * deviation / score
            self._limit = min(let_through, self.max_norm)
        self._mean = self.decay * self._mean + (1 - self.decay) * let_through
        apart = let_through - self._mean
        self._variance = self.decay * self._variance + (1 - self.decay) * apart * apart
        return "apply"

    def clip(self, grad_norm: float) -> float:
        return self._limit


def _mean(values: deque[float] | list[float]) -> float:
    """As `statistics.fmean`, and NaN or infinite where a value is."""
    return sum(values) / len(values)


RULES: dict[str, Callable[..., Rule]] = {
    "OLMo-core": SkipStep,
    "llm-foundry": KillLossSpike,
    "Lightning": SpikeDetection,
    "Megatron-LM": RerunStateMachine,
    "ZClip": ZClip,
    "clipping alone": Rule,
}
"""By the name of the project, `(total_steps=None, max_norm=1.0) → Rule`."""
