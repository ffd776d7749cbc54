"""Values that AdamW cannot have produced from the gradients that were applied: traces of corrupted memory."""

from __future__ import annotations


class Updates:
    """What was applied since the training state was last put in from elsewhere.

    Attributes:
        num: updates.
        total_rate: Σ of their learning rates.
        largest_gradient: largest norm of a gradient as it was applied (after clipping): no element exceeds it.
    """

    def __init__(self) -> None:
        self.num = 0
        self.total_rate = 0.0
        self.largest_gradient = 0.0

    def add(self, lr: float, norm: float) -> None:
        """One update with the rate `lr` from a gradient of `norm`."""
        self.num += 1
        self.total_rate += lr
        self.largest_gradient = max(self.largest_gradient, norm)
