"""What the jobs of a run did: `RUN/jobs.jsonl`, one line when a start in a job begins, one when it ends.

A job that was killed with its node leaves no second line: then the next one's first line, or the scheduler, tells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError


@dataclass(frozen=True, slots=True)
class Job:
    """One start of a run in a job: mostly the whole job; what crashed may be started again in the same allocation."""

    job: str
    """Id for the scheduler: `123`, or in an array `123_4`."""
    restart: int
    """How often the scheduler had requeued it."""
    began: float
    """Unix seconds: the job began, or the start before it in the same allocation was over."""
    nodes: tuple[str, ...]
    """Allocated."""
    position: int
    """Step that it could go on from."""
    submitted: float
    """`Submission.submitted` of the submission that it belongs to."""
    ended: float | None = None
    """Unix seconds; None: it runs, or nobody could say it any more."""
    reached: int | None = None
    """Step that the next could go on from when it ended."""
    reason: str = ""
    """How the run stood when it ended: that of its outcome, or `node` or `signal`."""
    then: str = ""
    """What followed: end · here (another start in the same allocation) · requeue · chain."""
    why: str = ""
    """In a sentence, for a person."""


def append_begin(files: RunFiles, job: Job) -> None:
    """Note that a job began.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    _append(files.jobs, {"kind": "begin", **asdict(job)})


def append_end(files: RunFiles, job: Job) -> None:
    """Note how the job ended, with everything else of it as at its beginning.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    _append(files.jobs, {"kind": "end", **asdict(job)})


def read_jobs(files: RunFiles) -> list[Job]:
    """The jobs of a run in the order in which they began. Lines that are cut off or damaged are left out."""
    try:
        lines = files.jobs.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(f"{files.jobs} cannot be read: {error.strerror}") from error
    return stitched(record for line in lines if (record := _record(line)) is not None)


def stitched(records: Iterable[dict[str, Any]]) -> list[Job]:
    """Jobs from their lines: an end belongs to the beginning of the same job and restart."""
    jobs: dict[tuple[str, int, float], Job] = {}
    for record in records:
        kind = record.pop("kind", None)
        try:
            job = Job(**{**record, "nodes": tuple(record["nodes"])})
        except (TypeError, KeyError):
            continue
        key = job.job, job.restart, job.began
        if kind == "end" or key not in jobs:
            jobs[key] = job
    ordered = sorted(jobs.values(), key=lambda job: job.began)
    return [_ended_by_the_next(job, ordered[number + 1 :]) for number, job in enumerate(ordered)]


def _ended_by_the_next(job: Job, later: list[Job]) -> Job:
    """A job without an end had one at the latest when the next began."""
    if job.ended is not None or not later:
        return job
    return replace(job, ended=later[0].began, reached=later[0].position, reason="node", then="requeue")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _append(path: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror}") from error
