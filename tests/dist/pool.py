"""A pool of ranks that tests share: starting a process group costs ten seconds, calling a function in it none."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CALL_SECONDS = 240


class RankFailedError(AssertionError):
    """A rank raised; the text is its traceback."""


def _serve(rank: int, world_size: int, rendezvous: str, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", HF_HUB_OFFLINE="1")
    import datetime
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    # DeepSpeed's own calls of what torch 2.13 has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=CALL_SECONDS),
    )
    from trainer.engine.ranks import join

    join("cpu")
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        if task is None:
            return
        function, arguments = task
        try:
            connection.send(("result", function(rank, world_size, **arguments)))
        except BaseException:  # noqa: BLE001 - told to the test
            connection.send(("error", f"rank {rank}:\n{traceback.format_exc()}"))
            return


class RankPool:
    """`size` processes in one gloo group. A call runs `function(rank, world_size, **arguments)` on all of them."""

    def __init__(self, size: int):
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, str(folder / "rendezvous"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def __call__(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Results of all ranks, in their order. A rank that raises ends the pool; the next call starts another."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            pending = [c for rank, c in enumerate(self._connections) if rank not in results]
            ready = wait(pending, timeout=CALL_SECONDS)
            if not ready:
                self.close()
                raise RankFailedError(f"no answer from the ranks within {CALL_SECONDS} seconds")
            for connection in ready:
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    kind, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    kind, value = "error", f"rank {rank} died without a word"
                if kind == "error":
                    self.close()
                    raise RankFailedError(value)
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
