"""Which start of a run this is, and whether a newer one has taken over. Free of torch; works across machines.

Every start takes the next number in `RUN/starts/`: `0003.json` is created by one process and by no other, on network
file systems too. A start is superseded once there is a higher number: it may then write nothing more into the run.
"""

from __future__ import annotations

from typing import Protocol


class Fence(Protocol):
    """What a writer asks before it makes something visible."""

    @property
    def number(self) -> int:
        """Of this start, from 1."""

    @property
    def run(self) -> str:
        """Identity of the run: equal for all its starts."""

    def check(self) -> None:
        """
        Raises:
            SupersededError: a newer start has taken over.
        """

    def admits(self, start: int, step: int) -> bool:
        """Whether a checkpoint that `start` wrote at `step` belongs to the history that this start goes on with."""


class NoFence:
    """Of a run that nobody else can start: tests, drills, benchmarks."""

    number = 1
    run = ""

    def check(self) -> None:
        pass

    def admits(self, start: int, step: int) -> bool:  # noqa: ARG002
        return True
