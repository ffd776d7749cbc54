"""What the ranks do together: an error of one is raised on all, so that none waits for an answer that never comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from trainer.errors import CheckpointError, DamagedError, SupersededError, TrimtabError


def nothing(*_: object) -> None:
    """Does nothing."""


class Together:
    """The ranks of a process group, seen by one of them.

    Args:
        group: whose messages are used; None: the default group's.
    """

    def __init__(self, rank: int, world_size: int, group: Any = None):
        self._rank = rank
        self._world_size = world_size
        self._group = group

    def all(
        self,
        action: Callable[[], None],
        result: Callable[[], Any] = nothing,
        before_waiting: Callable[[], None] = nothing,
    ) -> list[Any]:
        """Do something on every rank. A collective.

        Args:
            result: what a rank tells the others afterwards.
            before_waiting: called when the action has ended, in whatever way.

        Returns:
            The results of all ranks.

        Raises:
            SupersededError, CheckpointError, DamagedError, …: the same on all ranks, when the action of one raised.
        """
        error = self._attempt(action)
        before_waiting()
        told = (error, None if error else result())
        gathered: list[Any] = [told]
        if self._world_size > 1:
            gathered = [None] * self._world_size
            dist.all_gather_object(gathered, told, group=self._group)
        errors = [error for error, _ in gathered if error is not None]
        if errors:
            raise _worst(errors)
        return [value for _, value in gathered]

    def first(self, action: Callable[[], None], result: Callable[[], Any] = nothing) -> Any:
        """Do something on rank 0 and tell all the result. A collective; errors as in :meth:`all`."""
        mine = self._rank == 0
        return self.all(action if mine else nothing, result if mine else nothing)[0]

    def _attempt(self, action: Callable[[], None]) -> TrimtabError | None:
        try:
            action()
        except TrimtabError as error:
            return error
        except OSError as error:
            return CheckpointError(f"rank {self._rank}: {error}")
        except Exception as error:  # noqa: BLE001 - the other ranks would wait for ever
            return CheckpointError(f"rank {self._rank}: {type(error).__name__}: {error}")
        return None


def _worst(errors: list[TrimtabError]) -> TrimtabError:
    """One error for what went wrong on several ranks: what an older checkpoint cannot mend comes first."""
    for kind in (SupersededError, TrimtabError):
        for error in errors:
            if isinstance(error, kind) and not isinstance(error, DamagedError):
                return error
    return DamagedError("; ".join(dict.fromkeys(map(str, errors))))
