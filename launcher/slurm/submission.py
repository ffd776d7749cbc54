"""How a run was submitted: the content of `RUN/submission.json`, which its jobs read on the nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from launcher.run_directory import write_atomically
from launcher.slurm.site import SiteConfig
from trainer.config.files import RunFiles
from trainer.config.section import PositiveInt, Section
from trainer.errors import RunDirectoryError


class Submission(Section):
    """One submission of one run. A later one replaces it."""

    name: str
    """Of the run, as the user wrote it: any text."""
    root: str
    """The run directory, absolute."""
    script: str
    """The batch script, absolute; of an array all runs share one."""
    workdir: str
    """Where it was submitted from, absolute."""
    nodes: tuple[PositiveInt, PositiveInt]
    """Fewest and most."""
    ranks_per_node: PositiveInt
    """Processes on each node."""
    device: Literal["cpu", "cuda"]
    """On cuda one GPU a rank."""
    threads_per_rank: PositiveInt | None = None
    """On CPU; None: as the plan has it."""
    time: str | None = None
    """Time limit of one job; None: the partition's."""
    python: str
    """With trimtab installed, on every node."""
    site: SiteConfig
    """The cluster."""
    after: tuple[str, ...] = ()
    """Run directories of the stages of a pipeline that come before it."""
    submitted: float = 0.0
    """Unix seconds."""
    job: str = ""
    """Id of its job, `123`, or in an array `123_4`; empty: not submitted yet."""


def write_submission(submission: Submission) -> None:
    """Put it into the run directory.

    Raises:
        RunDirectoryError: that cannot be written.
    """
    path = RunFiles(Path(submission.root)).submission
    write_atomically(path, submission.model_dump_json(indent=1) + "\n")


def read_submission(root: Path) -> Submission | None:
    """Of the run in `root`; None: it was never submitted.

    Raises:
        RunDirectoryError: the record is damaged.
    """
    path = RunFiles(root).submission
    try:
        return Submission.model_validate_json(path.read_bytes(), strict=False)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({type(error).__name__}); submit the run again") from error
