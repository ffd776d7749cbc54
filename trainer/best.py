"""Which evaluation of a run is the best, and whether it is time to stop. Pure: the same numbers, the same decision.

The record is the list of all evaluations that stand. A rollback takes those away that were made after the state it
goes back to: they judged weights that no longer exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.config.scores import smaller_is_better


class Evaluated(NamedTuple):
    """One evaluation."""

    step: int
    value: float


class Best:
    """Compares the evaluations of one run.

    Args:
        score: `loss`, or the name of a score; None: nothing is compared, and nothing stops early.
        patience: evaluations in a row without a better one after which it is time to stop; None: never.
    """

    def __init__(self, score: str | None, patience: int | None = None):
        self.score = score
        self._patience = patience
        self._evaluations: list[Evaluated] = []

    @property
    def newest(self) -> int | None:
        """Step of the newest evaluation; None: there was none."""
        return self._evaluations[-1].step if self._evaluations else None

    @property
    def best(self) -> Evaluated | None:
        """The best evaluation, of equal ones the first; None: there was none, or none gave a number."""
        best: Evaluated | None = None
        for one in self._evaluations:
            if self._improves(one.value, best):
                best = one
        return best

    @property
    def waited(self) -> int:
        """Evaluations after the best one; where no evaluation gave a number, all of them."""
        best = self.best
        return sum(best is None or one.step > best.step for one in self._evaluations)

    @property
    def spent(self) -> bool:
        """Whether it is time to stop."""
        return self.score is not None and self._patience is not None and self.waited >= self._patience

    def take(self, step: int, value: float) -> bool:
        """Take in the evaluation at `step`; one that is known already changes nothing.

        Returns:
            Whether it is better than all before.
        """
        if self.score is None or (self.newest is not None and step <= self.newest):
            return False
        better = self._improves(value, self.best)
        self._evaluations.append(Evaluated(step, float(value)))
        return better

    def lacks(self, step: int, every: int | None) -> bool:
        """Whether an evaluation is due at `step` and was not made: the run was stopped before it."""
        due = self.score is not None and bool(every) and step > 0 and step % (every or 1) == 0
        return due and (self.newest is None or self.newest < step)

    def went_back(self, step: int) -> None:
        """A rollback to `step`: later evaluations do not count any more."""
        self._evaluations = [one for one in self._evaluations if one.step <= step]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        # JSON has no NaN
        pairs = [[step, value if math.isfinite(value) else str(value)] for step, value in self._evaluations]
        return {"score": self.score, "evaluations": pairs}

    def restore(self, state: Mapping[str, Any] | None) -> bool:
        """Go on from what :meth:`to_json` gave.

        Returns:
            Whether there was something to go on from: evaluations that were compared by another score are not.
        """
        if self.score is None or state is None or state["score"] != self.score:
            return False
        self._evaluations = [Evaluated(int(step), float(value)) for step, value in state["evaluations"]]
        return True

    def __str__(self) -> str:
        best = self.best
        return "none" if best is None else f"{self.score} {best.value:.4f} at step {best.step}"

    def _improves(self, value: float, best: Evaluated | None) -> bool:
        if self.score is None or math.isnan(value):
            return False
        if best is None:
            return True
        return value < best.value if smaller_is_better(self.score) else value > best.value
