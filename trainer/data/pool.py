"""Worker processes that map a function over tasks, in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from trainer.errors import WorkerDiedError

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_AHEAD = 3


class Pool:
    """`workers` spawned processes; with one, the calling process does the work."""

    def __init__(self, workers: int):
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self._workers > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._workers, context, initializer=_begin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """function(task) for each task, in order; a few tasks a worker are taken ahead.

        Raises:
            WorkerDiedError: a process was killed.
        """
        if self._executor is None:
            yield from map(function, tasks)
            return
        running: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                with _without_main_module():
                    running.append(self._executor.submit(function, task))
                if len(running) > _TASKS_AHEAD * self._workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerDiedError("a process that prepares data was killed, perhaps for lack of memory") from error


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Spawned processes run the main module again unless there is none; they need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin() -> None:
    # Ctrl-C reaches the whole process group: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # one process a core already
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
