"""Signs of life of the ranks of one node, in shared memory: the launcher sees a rank that stands still. Free of torch."""

from __future__ import annotations

from typing import Protocol

FOLDER_VARIABLE = "TRIMTAB_HEARTBEATS"
"""Environment variable: the folder in which each rank of this node keeps its sign of life."""


class Heartbeat(Protocol):
    """What a rank calls whenever it has got on; costs about a microsecond."""

    def beat(self, phase: str, step: int | None = None) -> None:
        """The main thread is alive and begins `phase` (starting · loading · computing · evaluating · saving · ending);
        `step`: where the run stands, the last one given where None."""


class NoHeartbeat:
    """Nobody listens."""

    def beat(self, phase: str, step: int | None = None) -> None:
        pass
