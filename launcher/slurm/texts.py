"""Texts that sbatch takes in a site file: options that nothing else sets, time limits; and mounts of containers."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

WRONG = "site"
"""Type of the errors whose text is a whole sentence already."""

ELSEWHERE = {
    "account": "set `account`",
    "array": "--sweep and --seeds make arrays",
    "chdir": "it is the folder that submits",
    "cpus-per-task": "set `cpus_per_task`",
    "dependency": "a pipeline sets it",
    "error": "logs lie in the run directory",
    "exclude": "set `exclude`",
    "exclusive": "set `exclusive`",
    "export": "set `environment`",
    "gpus": "set `gpu_type` and `gpu_option`; a rank has one GPU",
    "gpus-per-node": "set `gpu_type` and `gpu_option`; a rank has one GPU",
    "gpus-per-task": "set `gpu_type` and `gpu_option`; a rank has one GPU",
    "hold": "scontrol hold does it for a job that is submitted",
    "job-name": "it is the name of the run",
    "kill-on-invalid-dep": "a pipeline sets it",
    "mem": "set `memory`",
    "no-requeue": "set `continue_by`",
    "nodes": "give --nodes, or set `cluster.nodes` of the run",
    "ntasks": "set `cluster.ranks_per_node` of the run",
    "ntasks-per-node": "set `cluster.ranks_per_node` of the run",
    "open-mode": "logs are appended to, since a job may be requeued",
    "output": "logs lie in the run directory",
    "parsable": "its answer is needed",
    "partition": "set `partition`",
    "qos": "set `qos`",
    "quiet": "its answer is needed",
    "requeue": "set `continue_by`",
    "signal": "set `signal_seconds`",
    "test-only": "give --dry-run",
    "time": "give --time, or set `time`",
    "wait": "the log of a run can be followed",
    "wrap": "the script is the run",
}
"""Options of sbatch that are set by something else, and by what."""

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def seconds_of(time: str) -> int | None:
    """Length of a time limit as sbatch reads it: `30` (minutes), `30:00`, `24:00:00`, `2-12`, `2-12:00:00`; None: it is
    no such text, or says that there is none."""
    if (match := _TIME.fullmatch(time)) is None:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = numbers if len(numbers) == 3 else [0, *numbers, 0][:3]
    return hours * 3600 + minutes * 60 + seconds


def _known_time(time: str) -> str:
    if seconds_of(time) is None and time not in ("UNLIMITED", "INFINITE"):
        raise PydanticCustomError(WRONG, "must be a time as sbatch knows it: `24:00:00`, `2-00:00:00`, or minutes")
    return time


def _not_elsewhere(name: str) -> str:
    if name in ELSEWHERE:
        raise PydanticCustomError(WRONG, "is not for `directives`: {where}", {"where": ELSEWHERE[name]})
    return name


def _mount(text: str) -> str:
    if re.fullmatch(r"/[^:,\n\r\0]*(:/[^:,\n\r\0]*(:[a-z+]+)?)?", text) is None:
        raise PydanticCustomError(WRONG, "must be `/from:/to` or `/from:/to:ro`, and no path may have a comma")
    return text


Option = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$"), AfterValidator(_not_elsewhere)]
"""Of sbatch, without the dashes."""
Time = Annotated[str, AfterValidator(_known_time)]
"""As sbatch knows it."""
Mount = Annotated[str, AfterValidator(_mount)]
"""Of a container."""
SignalSeconds = Annotated[int, Field(gt=0, le=65535)]
"""sbatch takes no more."""
