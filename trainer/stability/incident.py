"""What the guard remembers of an incident, and how the learning rate is cooled after one: plain data and JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Incident:
    """An episode from the first alarm to verified recovery."""

    number: int
    cause: str
    """The first alarm in words."""
    step: int
    """That was attempted when it opened."""
    batch_index: int
    usual_loss: float
    """The trajectory to come back to: the usual loss before. NaN: none was known."""
    loss_scale: float
    """Robust standard deviation of log loss then."""
    kind: str = "open"
    """open · transient · data · state · replica · teacher · audit · disagreement · drift"""
    gradient_alone: int = 0
    """Batches in a row whose gradient was not finite while their loss was."""
    culprits: tuple[int, ...] = ()
    """Ranks that alone were not finite at the newest batch that was left out."""
    same_ranks: int = 0
    """Batches in a row for which these were the same."""
    rollbacks: int = 0
    redone: bool = False
    """A rollback without quarantine was made: what comes again is not a fault of the hardware."""
    furthest: int = 0
    """Step that was attempted when the newest rollback was decided; recovery is judged beyond it."""
    target: int = 0
    """Newest state that the newest rollback might use."""
    clean: int = 0
    """Accepted steps since the newest action, at or beyond `furthest`."""
    log_losses: float = 0.0
    """Sum of the log losses of these."""
    checksums: tuple[int, tuple[float, ...]] | None = None
    """(step, checksum of each rank) that differed."""

    def acted(self) -> None:
        """An action starts the verification anew."""
        self.clean, self.log_losses = 0, 0.0

    def accepted(self, step: int, loss: float) -> None:
        """An update stands."""
        if step >= self.furthest and loss > 0 and math.isfinite(loss):
            self.clean += 1
            self.log_losses += math.log(loss)

    def forget_ranks(self) -> str:
        """Drop what is known of single ranks: other ranks go on. Returns what that was, in words; empty: nothing."""
        known = {"the ranks that it blamed": bool(self.culprits), "their checksums": self.checksums is not None}
        self.culprits, self.same_ranks, self.checksums = (), 0, None
        return " and ".join(text for text, was_known in known.items() if was_known)

    @property
    def loss_since(self) -> float:
        """Geometric mean of the loss since the newest action; NaN before the first step."""
        return math.exp(self.log_losses / self.clean) if self.clean else math.nan

    @property
    def back_on_trajectory(self) -> bool:
        """Whether that is what was usual before, within two standard deviations of a batch or 2 %."""
        if not math.isfinite(self.usual_loss) or self.usual_loss <= 0:
            return self.clean > 0
        return math.log(self.loss_since / self.usual_loss) <= max(2 * self.loss_scale, 0.02)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(saved: dict[str, Any]) -> Incident:
        checksums = saved["checksums"]
        return Incident(
            **saved
            | {
                "checksums": checksums and (checksums[0], tuple(checksums[1])),
                "culprits": tuple(saved["culprits"]),
            }
        )


@dataclass(slots=True)
class Cooling:
    """The learning rate after a rollback that left data out: lowered, then brought back linearly."""

    factor: float = 1.0
    """On the first step after the rollback."""
    from_step: int = 0
    rewarm: int = 1

    def scale(self, step: int) -> float:
        """Factor on the learning rate of the update that makes `step`."""
        if self.factor == 1:
            return 1.0
        back = min(max((step - 1 - self.from_step) / self.rewarm, 0.0), 1.0)
        return self.factor + (1 - self.factor) * back

    def cool(self, factor: float, from_step: int, rewarm: int) -> None:
        """Lower it, once more where it is still lowered."""
        self.factor = max(self.scale(from_step + 1) * factor, 1e-3) if factor < 1 else 1.0
        self.from_step, self.rewarm = from_step, rewarm


@dataclass(slots=True)
class LeftOut:
    """Batches that an incident put into quarantine."""

    first: int
    last: int
    incident: int
    reason: str


@dataclass(slots=True)
class Ladder:
    """What never goes back, whatever is rolled back: counts, budgets, quarantine, cooling."""

    incidents: int = 0
    open: Incident | None = None
    rollback_steps: list[int] = field(default_factory=list)
    """Step of each incident that needed a rollback."""
    left_out: list[LeftOut] = field(default_factory=list)
    cooling: Cooling = field(default_factory=Cooling)
    consecutive_skips: int = 0
    verified_step: int = 0
    """Newest step at which the ranks' replicated weights were equal."""
    revisit: list[int] | None = None
    """Batches to train on at the end of the run; None: that has not begun."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(saved: dict[str, Any]) -> Ladder:
        return Ladder(
            incidents=saved["incidents"],
            open=Incident.from_json(saved["open"]) if saved["open"] else None,
            rollback_steps=list(saved["rollback_steps"]),
            left_out=[LeftOut(**entry) for entry in saved["left_out"]],
            cooling=Cooling(**saved["cooling"]),
            consecutive_skips=saved["consecutive_skips"],
            verified_step=saved["verified_step"],
            revisit=saved["revisit"],
        )
