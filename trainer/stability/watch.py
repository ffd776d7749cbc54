"""The detector: all channels of a run together. Pure, deterministic, the same on every rank from the same numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from trainer.stability.detector import Channel, Tuning

LOSS = "loss"
GRADIENT = "gradient norm"

LOSS_TUNING = Tuning("log", floor=0.005, first=0.08, spread=0.1)
"""Batches of millions of tokens have a σ of 0.5 % of the loss; a rise of 4 % is the least that is called sudden. Small
batches have 3 to 15 %: 8 % is assumed until it is known."""
GRADIENT_TUNING = Tuning("log", floor=0.05, first=0.25, spread=0.7)
"""Norms differ by tens of percent between batches, and a ratio of 30 is asked for besides. Values within a factor of
two of each other are a level."""
PART_TUNING = Tuning("linear", floor=0.02, first=0.05, spread=0.1)
"""In units of the usual loss, since what a part adds to it is what matters: a z-loss close to 0 may double, an L2 term
may grow for ever without noise, and a part may be negative. A sudden rise is at least 16 % of the loss."""

RISING = frozenset({"r_drop", "penalty", "adversarial"})
"""Parts that rise slowly while all goes well: the surer a model becomes, the more its passes with different dropout can
disagree and the more there is for an adversary to gain; weights move away from where they began. What is sudden in
them alarms; slow harm shows in the loss."""

GRADIENT_RATIO = 30.0
"""Least ratio to the usual norm that alarms. Clean small runs reach 3 to 25 in single steps. Clipping and Adam make
such a step harmless: it moves the weights no further than any other. A gradient × 500 on one of 16 ranks is above."""
FALL_RATIO = 2.0
"""A loss that falls below half the usual one, and by twice the sudden threshold, in one step is an alarm too: nothing
is learned that fast, so the batch is degenerate (one repeated token, duplicates of what was seen, labels in the input).
Learned from, it harms the model, and taken into the history, it would make normal loss an alarm. Half is far from what
happens by chance, and twice the threshold since the tail of easy batches is longer than that of hard ones."""
GRADIENT_FALL = 100.0
"""A gradient norm that falls below a hundredth of the usual one in one step is an alarm too: the model does not answer
to its input any more (a weight out of range saturates all that follows, the gradient is 0). No batch does that."""
TOGETHER = (5 / 8, 3 / 8)
"""Fractions of the sudden threshold that the loss and the gradient norm exceed *together* where either alone would not
alarm: 5 and 3 standard deviations. Harm by one update shows in both at once. In 19,436 clean steps of real runs
(benchmarks/ledgers) no step with a loss above 4.5 standard deviations had a norm above 3."""
NEW_LEVEL = 12
"""Values in a row, all left out, that make a new level where they are consistent."""

_NO_PARTS: Mapping[str, float] = MappingProxyType({})
_Values = tuple[float, float, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Alarm:
    """A value that should not be applied unseen."""

    channel: str
    """`loss`, `gradient norm`, `loss: z_loss` …"""
    kind: Literal["nonfinite", "spike", "drift"]
    value: float
    usual: float
    """NaN where nothing was known."""
    score: float
    """Robust standard deviations (of a drift: height of the CUSUM); negative for a fall, infinite for `nonfinite`."""
    since_step: int
    """Of a drift its first step, else the step itself."""

    @property
    def text(self) -> str:
        """A clause for a person."""
        if self.kind == "nonfinite":
            return f"the {self.channel} is {self.value}"
        if self.kind == "drift":
            return (
                f"the {self.channel} has drifted from {self.usual:.4g} up to {self.value:.4g} since step "
                f"{self.since_step} (CUSUM {self.score:.0f} σ)"
            )
        side = "above" if self.score > 0 else "below"
        return f"the {self.channel} {self.value:.4g} is {abs(self.score):.0f} σ {side} the usual {self.usual:.4g}"


class Watch:
    """Judges the loss, the gradient norm and the parts of a compound loss, each in its own channel.

    Args:
        spike: robust standard deviations of a sudden alarm.
        drift: height of the CUSUM, in robust standard deviations, of a slow one.
    """

    def __init__(self, *, spike: float = 8.0, drift: float = 10.0) -> None:
        self._spike = spike
        self._drift = drift
        self._loss = Channel(LOSS_TUNING)
        self._gradient = Channel(GRADIENT_TUNING)
        self._parts: dict[str, Channel] = {}
        self._rejected: list[_Values] = []
        """The last ones since an attempt was accepted, at most `NEW_LEVEL`."""
        self._scores: dict[str, float] = {}

    def look(
        self, step: int, loss: float, grad_norm: float, parts: Mapping[str, float] = _NO_PARTS, *, num_targets: int = 0
    ) -> tuple[Alarm, ...]:
        """The alarms of one attempt, worst first. Changes nothing but `scores`, and by how much batches are taken to
        differ.

        Args:
            num_targets: that the loss is the mean over; 0: many. The losses of single targets differ by about as much
                as they are large, so the mean of n is not known to better than 1/√n of itself: 18 % of 32 texts.
        """
        self._scores = {}
        self._loss.sampling = 1 / math.sqrt(num_targets) if num_targets else 0.0
        alarms = self._judge(LOSS, self._loss, step, loss, drifts=True)
        # a slow growth of the gradient is common while all goes well, and its harm shows in the loss
        alarms += self._judge(GRADIENT, self._gradient, step, grad_norm, drifts=False)
        for name in sorted(parts):
            channel = self._parts.get(name) or Channel(PART_TUNING)
            alarms += self._judge(f"{LOSS}: {name}", channel, step, parts[name], drifts=name not in RISING)
        high, norm_high = self._scores[LOSS], self._scores[GRADIENT]
        both = high > TOGETHER[0] * self._spike and norm_high > TOGETHER[1] * self._spike
        if both and all(alarm.kind == "drift" for alarm in alarms):
            alarms.append(Alarm(LOSS, "spike", loss, self._loss.usual, high, step))
        order = ("nonfinite", "spike", "drift")
        return tuple(sorted(alarms, key=lambda alarm: (order.index(alarm.kind), -abs(alarm.score))))

    def accept(self, step: int, loss: float, grad_norm: float, parts: Mapping[str, float] = _NO_PARTS) -> None:
        """The attempt was applied: what is finite of it enters the history."""
        highest = 2 * self._drift
        self._loss.accept(step, loss, self._unit(loss), highest=highest)
        self._gradient.accept(step, grad_norm)
        unit = self._unit(loss)
        for name in sorted(parts):
            self._parts.setdefault(name, Channel(PART_TUNING)).accept(step, parts[name], unit, highest=highest)
        self._rejected = []

    def reject(self, step: int, loss: float, grad_norm: float, parts: Mapping[str, float] = _NO_PARTS) -> None:  # noqa: ARG002
        """The attempt was left out: it only counts for the rule of the new level."""
        self._rejected = [*self._rejected[1 - NEW_LEVEL :], (loss, grad_norm, dict(parts))]

    @property
    def new_level(self) -> bool:
        """The last 12 values or more were left out, but are finite, close to each other and not rising."""
        if len(self._rejected) < NEW_LEVEL:
            return False
        losses, norms = [values[0] for values in self._rejected], [values[1] for values in self._rejected]
        return self._loss.consistent(losses, self._unit()) and self._gradient.consistent(norms)

    def accept_level(self) -> None:
        """Take the level of the values that were left out as the usual one."""
        self._loss.adopt([values[0] for values in self._rejected], self._unit())
        self._gradient.adopt([values[1] for values in self._rejected])
        for name, channel in self._parts.items():
            channel.adopt([parts[name] for _, _, parts in self._rejected if name in parts], self._unit())
        self._rejected = []

    def pardon_drift(self) -> None:
        """An examination found the state unharmed: what drifted is judged anew, from the present level."""
        for channel in (self._loss, *self._parts.values()):
            channel.pardon()

    @property
    def usual_loss(self) -> float:
        """The loss that is expected next; NaN before anything is known."""
        return self._loss.usual

    @property
    def loss_scale(self) -> float:
        """Robust standard deviation of the log loss now in force."""
        sigma = self._loss.sigma(self._unit())
        return sigma if self._loss.logarithmic else sigma / self._unit()

    @property
    def scores(self) -> dict[str, float]:
        """Of the last look, by channel: σ, and for `loss drift` and its like the height of the CUSUM."""
        return dict(self._scores)

    def fingerprint(self) -> int:
        """32 bits of all that it judges by, to compare between ranks."""
        value = zlib.crc32(self._gradient.packed(), zlib.crc32(self._loss.packed()))
        for name in sorted(self._parts):
            value = zlib.crc32(self._parts[name].packed(), zlib.crc32(name.encode(), value))
        return zlib.crc32(repr(self._rejected).encode(), value)

    def state(self) -> dict[str, Any]:
        """Plain JSON (null: a rejected value that was not finite)."""
        return {
            "loss": self._loss.state(),
            "gradient": self._gradient.state(),
            "parts": {name: self._parts[name].state() for name in sorted(self._parts)},
            "rejected": [
                [_plain(loss), _plain(norm), {name: _plain(value) for name, value in parts.items()}]
                for loss, norm, parts in self._rejected
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`: every later decision is the same."""
        self._loss.restore(state["loss"])
        self._gradient.restore(state["gradient"])
        self._parts = {name: Channel(PART_TUNING) for name in state["parts"]}
        for name, channel in self._parts.items():
            channel.restore(state["parts"][name])
        self._rejected = [
            (_float(loss), _float(norm), {name: _float(value) for name, value in parts.items()})
            for loss, norm, parts in state["rejected"]
        ]
        self._scores = {}

    def _unit(self, loss: float = 1.0) -> float:
        """What linear values are measured in: the usual loss, or this one before anything is known."""
        usual = self._loss.usual
        size = abs(loss if math.isnan(usual) else usual)
        return min(max(size, 1e-12), 1e150) if math.isfinite(size) else 1.0

    def _judge(self, name: str, channel: Channel, step: int, value: float, *, drifts: bool) -> list[Alarm]:
        unit = self._unit()
        score = self._scores[name] = channel.score(value, unit)
        height = channel.climb(value, unit)
        if drifts:
            self._scores[f"{name} drift"] = height
        if not math.isfinite(value):
            return [Alarm(name, "nonfinite", value, channel.usual, math.inf, step)]
        rise = channel.rise(value, unit)
        sudden = score > self._spike and (name != GRADIENT or rise > math.log(GRADIENT_RATIO))
        fallen = score < -2 * self._spike and (
            (name == LOSS and _fell(channel, value, rise)) or (name == GRADIENT and rise < -math.log(GRADIENT_FALL))
        )
        if sudden or fallen:
            return [Alarm(name, "spike", value, channel.usual, score, step)]
        if drifts and height > self._drift:
            return [Alarm(name, "drift", value, channel.usual_before_drift, height, min(channel.zero_step + 1, step))]
        return []


def _fell(channel: Channel, value: float, rise: float) -> bool:
    if channel.logarithmic:
        return rise < -math.log(FALL_RATIO)
    return value < channel.usual - abs(channel.usual) / FALL_RATIO


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _float(value: float | None) -> float:
    return math.nan if value is None else value
