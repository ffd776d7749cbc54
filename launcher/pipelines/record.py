"""What is noted of a pipeline in its folder: `RUNS/PIPELINE/pipeline.json`, its stages, and their jobs where it was
submitted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from launcher.run_directory import LOCK_FILE, write_atomically
from trainer.config.section import Section
from trainer.errors import RunDirectoryError

Say = Callable[[str], None]

FILE_NAME = "pipeline.json"
LOCK_SECONDS = 60.0


class StageRecord(Section):
    """What became of a stage."""

    name: str
    root: str
    """Its run directory, or the folder of its sweep."""
    runs: tuple[str, ...]
    """Directories of the runs that were started or submitted last, in the order of the array."""
    after: tuple[str, ...]
    """Names of the stages that it waits for."""
    job: str = ""
    """Id of the job or of the array; empty: none was submitted."""


class PipelineRecord(Section):
    """Content of `pipeline.json`."""

    name: str
    file: str
    """Where it was read from, absolute."""
    stages: tuple[StageRecord, ...]
    """In the order in which they begin."""


def read_record(root: Path) -> PipelineRecord | None:
    """What is noted of the pipeline in `root`; None: there is none.

    Raises:
        RunDirectoryError: the record is damaged.
    """
    path = root / FILE_NAME
    try:
        return PipelineRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({type(error).__name__}); restore it, or move it away: then no stage that is not "
            "complete counts as submitted"
        ) from error


def write_record(root: Path, record: PipelineRecord) -> None:
    """Put it into the folder of the pipeline.

    Raises:
        RunDirectoryError: that cannot be written.
    """
    write_atomically(root / FILE_NAME, record.model_dump_json(indent=1) + "\n")


@contextlib.contextmanager
def held(folder: Path, say: Say) -> Iterator[None]:
    """One at a time: a stage that fails at once is told of only when all that wait for it are noted."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    say(f"{folder} has been in use for {LOCK_SECONDS:g} seconds; going on all the same")
                    break
                time.sleep(0.1)
            except OSError:
                break  # no locks on this file system
        yield
    finally:
        os.close(descriptor)
