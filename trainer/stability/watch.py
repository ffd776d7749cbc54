"""The detector: all channels of a run together. Pure, deterministic, the same on every rank from the same numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.stability.detector import Channel, Tuning

LOSS = "loss"
GRADIENT = "gradient norm"

LOSS_TUNING = Tuning("log", floor=0.005, first=0.05)
GRADIENT_TUNING = Tuning("log", floor=0.05, first=0.5)
PART_TUNING = Tuning("linear", floor=0.005, first=0.05)

GRADIENT_RATIO = 30.0
FALL_RATIO = 2.0
NEW_LEVEL = 12
_KEPT = 64


@dataclass(frozen=True, slots=True)
class Alarm:
    """A value that should not be applied unseen."""

    channel: str
    """"loss", "gradient norm", "loss: z_loss" …"""
    kind: Literal["nonfinite", "spike", "drift"]
    value: float
    usual: float
    score: float
    """Robust standard deviations; of a drift, the height of the CUSUM. Negative: a fall."""
    since_step: int
    """A drift: its first step. Else the step itself."""

    @property
    def text(self) -> str:
        """One clause for a person."""
        if self.kind == "nonfinite":
            return f"the {self.channel} is {self.value}"
        if self.kind == "drift":
            return (
                f"the {self.channel} rose slowly from {self.usual:.4g} to {self.value:.4g} since step "
                f"{self.since_step} (CUSUM {self.score:.0f} σ)"
            )
        where = "above" if self.score > 0 else "below"
        return f"the {self.channel} {self.value:.4g} is {abs(self.score):.0f} σ {where} the usual {self.usual:.4g}"


class Watch:
    """Judges the loss, the gradient norm and the parts of a compound loss.

    Args:
        spike: robust standard deviations of a sudden alarm.
        drift: height of the CUSUM, in robust standard deviations, of a slow one.
    """

    def __init__(self, *, spike: float = 8.0, drift: float = 12.0) -> None:
        self._spike = spike
        self._drift = drift
        self._loss = Channel(LOSS_TUNING)
        self._gradient = Channel(GRADIENT_TUNING)
        self._parts: dict[str, Channel] = {}
        self._rejected: list[tuple[float, float, dict[str, float]]] = []
        self._scores: dict[str, float] = {}

    def look(self, step: int, loss: float, grad_norm: float, parts: Mapping[str, float] = {}) -> tuple[Alarm, ...]:
        """The alarms of one attempt, worst first. Changes nothing but `scores`."""
        self._scores = {}
        alarms = [
            *self._judge(LOSS, self._loss, step, loss, drifts=True),
            *self._judge(GRADIENT, self._gradient, step, grad_norm, drifts=False),
        ]
        for name in sorted(parts):
            channel = self._parts.get(name) or Channel(PART_TUNING)
            alarms += self._judge(f"{LOSS}: {name}", channel, step, parts[name], drifts=True)
        order = ("nonfinite", "spike", "drift")
        return tuple(sorted(alarms, key=lambda alarm: (order.index(alarm.kind), -abs(alarm.score))))

    def accept(self, step: int, loss: float, grad_norm: float, parts: Mapping[str, float] = {}) -> None:
        """The attempt was applied: its finite values enter the history."""
        self._loss.accept(step, loss, self._unit)
        self._gradient.accept(step, grad_norm)
        for name in sorted(parts):
            self._parts.setdefault(name, Channel(PART_TUNING)).accept(step, parts[name], self._unit)
        self._rejected.clear()

    def reject(self, step: int, loss: float, grad_norm: float, parts: Mapping[str, float] = {}) -> None:
        """The attempt was left out: it only counts for the rule of the new level."""
        self._rejected = [*self._rejected[1 - _KEPT :], (loss, grad_norm, dict(parts))]

    @property
    def new_level(self) -> bool:
        """The last values were all left out, but are finite and consistent with each other."""
        last = self._rejected[-NEW_LEVEL:]
        if len(last) < NEW_LEVEL:
            return False
        losses = [loss for loss, _, _ in last]
        norms = [norm for _, norm, _ in last]
        return _consistent(losses, 0.1) and _consistent(norms, 0.7)

    def accept_level(self) -> None:
        """Take the level of the values left out as the usual one."""
        last = self._rejected[-NEW_LEVEL:]
        self._loss.adopt([loss for loss, _, _ in last], self._unit)
        self._gradient.adopt([norm for _, norm, _ in last])
        for name, channel in self._parts.items():
            channel.adopt([parts[name] for _, _, parts in last if name in parts], self._unit)
        self._rejected.clear()

    @property
    def usual_loss(self) -> float:
        """NaN before anything is known."""
        return self._loss.usual

    @property
    def loss_scale(self) -> float:
        """Robust standard deviation of the log loss now in force."""
        return self._loss.sigma(self._unit) / (1.0 if self._loss.logarithmic else self._unit)

    @property
    def scores(self) -> dict[str, float]:
        """Of the last look, by channel."""
        return dict(self._scores)

    def fingerprint(self) -> int:
        """32 bits of all that it judges by."""
        value = zlib.crc32(self._loss.packed() + self._gradient.packed())
        for name in sorted(self._parts):
            value = zlib.crc32(name.encode() + self._parts[name].packed(), value)
        return zlib.crc32(repr(self._rejected).encode(), value)

    def state(self) -> dict[str, Any]:
        """Plain JSON (a rejected NaN stands as null)."""
        return {
            "loss": self._loss.state(),
            "gradient": self._gradient.state(),
            "parts": {name: channel.state() for name, channel in self._parts.items()},
            "rejected": [
                [_plain(loss), _plain(norm), {name: _plain(part) for name, part in parts.items()}]
                for loss, norm, parts in self._rejected
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._loss.restore(state["loss"])
        self._gradient.restore(state["gradient"])
        self._parts = {}
        for name, channel in state["parts"].items():
            self._parts[name] = Channel(PART_TUNING)
            self._parts[name].restore(channel)
        self._rejected = [
            (_float(loss), _float(norm), {name: _float(part) for name, part in parts.items()})
            for loss, norm, parts in state["rejected"]
        ]
        self._scores = {}

    @property
    def _unit(self) -> float:
        usual = self._loss.usual
        return max(abs(usual), 1e-12) if math.isfinite(usual) else 1.0

    def _judge(self, name: str, channel: Channel, step: int, value: float, *, drifts: bool) -> list[Alarm]:
        score, height = channel.score(value, self._unit), channel.climb(value, self._unit)
        self._scores[name] = score
        if drifts:
            self._scores[f"{name} drift"] = height
        if not math.isfinite(value):
            return [Alarm(name, "nonfinite", value, channel.usual, math.inf, step)]
        rise = channel.rise(value, self._unit)
        least = math.log(GRADIENT_RATIO) if name == GRADIENT else 0.0
        if score > self._spike and rise > least:
            return [Alarm(name, "spike", value, channel.usual, score, step)]
        if name == LOSS and score < -2 * self._spike and rise < -math.log(FALL_RATIO):
            return [Alarm(name, "spike", value, channel.usual, score, step)]
        if drifts and height > self._drift:
            since = min(channel.zero_step + 1, step)
            return [Alarm(name, "drift", value, channel.usual_before_drift, height, since)]
        return []


def _consistent(values: list[float], spread: float) -> bool:
    if not all(math.isfinite(value) and value > 0 for value in values):
        return False
    logs = [math.log(value) for value in values]
    middle = sorted(logs)[len(logs) // 2]
    return sum(abs(y - middle) for y in logs) / len(logs) <= spread


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _float(value: float | None) -> float:
    return math.nan if value is None else value
