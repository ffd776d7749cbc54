"""All checkpoints of a run, compared with what their manifests say, in parallel. Free of torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.checkpoint.manifest import (
    BEST,
    HEALTHY,
    MANIFEST,
    FileEntry,
    Manifest,
    check_file,
    check_listing,
    is_healthy,
    read_manifest,
    step_of,
)
from trainer.errors import CheckpointError, DamagedError


@dataclass(frozen=True, slots=True)
class Examined:
    """One checkpoint."""

    name: str
    step: int
    start: int
    """Which start wrote it; 0: its manifest is unreadable, and the next four are 0 too."""
    world_size: int
    stage: int
    num_bytes: int
    """Of its files, as the manifest has it."""
    healthy: bool
    problems: tuple[str, ...]
    """A sentence for each; empty: it is whole."""
    admitted: bool
    """It is of the history that a new start goes on with."""
    run: str = ""
    """Identity of the run that wrote it."""
    strange: tuple[str, ...] = ()
    """Names in it that do not belong to it; they are not read."""


def examine(folder: Path, admits: Callable[[int, int], bool], *, threads: int | None = None) -> list[Examined]:
    """Hash every file of every checkpoint.

    Args:
        folder: a run's `checkpoints`.
        admits: (start, step) → whether such a checkpoint is of the run's history.
        threads: that read and hash; None: as there are cores, 16 at most.

    Returns:
        In the order of their steps; leftovers (`step-….partial-0003`) are none.
    """
    if not folder.is_dir():
        return []
    found = sorted((step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None)
    num_threads = threads or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="verify") as pool:
        # all files of all checkpoints are handed out before the first result is waited for
        begun = [(step, path, *_begin(path, pool)) for step, path in found]
        return [_finish(*each, admits) for each in begun]


_Checks = list["Future[str | None]"]


def _begin(directory: Path, pool: ThreadPoolExecutor) -> tuple[Manifest | str, _Checks]:
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return str(error), []
    checks = [pool.submit(_problem, partial(check_listing, directory, manifest))]
    return manifest, checks + [pool.submit(_problem, partial(_check, directory, entry)) for entry in manifest.files]


def _finish(
    step: int, directory: Path, manifest: Manifest | str, checks: _Checks, admits: Callable[[int, int], bool]
) -> Examined:
    if isinstance(manifest, str):
        return Examined(directory.name, step, 0, 0, 0, 0, is_healthy(directory), (manifest,), admitted=False)
    own = {MANIFEST, HEALTHY, BEST, *(entry.name for entry in manifest.files)}
    return Examined(
        name=directory.name,
        step=step,
        start=manifest.start,
        world_size=manifest.world_size,
        stage=manifest.stage,
        num_bytes=manifest.num_bytes,
        healthy=is_healthy(directory),
        problems=tuple(problem for check in checks if (problem := check.result()) is not None),
        admitted=admits(manifest.start, step),
        run=manifest.run,
        strange=tuple(sorted(path.name for path in directory.iterdir() if path.name not in own)),
    )


def _check(directory: Path, entry: FileEntry) -> None:
    """
    Raises:
        CheckpointError: it is not what the manifest says, or no data.
    """
    check_file(directory, entry)
    path = directory / entry.name
    with path.open("rb") as file:
        # a safetensors file begins with the length of its header, which is JSON, as is all of the other file
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else entry.num_bytes
        try:
            header = json.loads(file.read(length)) if length <= entry.num_bytes else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise DamagedError(f"{path} of rank {entry.rank} is neither tensors nor numbers, and is refused")


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return None
