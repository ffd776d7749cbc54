"""Slurm's commands: each is an argv without a shell, has a time limit, and fails with one sentence.

Read is only what has no text of users in it (a job's name may hold anything), in fields that a separator ends.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import TrimtabError

TIMEOUT_SECONDS = 60.0
"""For a command that the controller must answer. Slurm's own messages give up after 10 s, and are sent again."""

SIGNAL_SECONDS = 15.0
"""For a signal."""

OF_THE_USER = ("ACCOUNT", "CLUSTERS", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION", "WCKEY")
"""SBATCH_… variables that may say what the script does not: who pays, and where. Others would overrule the script."""

_ALIVE = frozenset(
    {
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"),
        *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESIZING", "RESV_DEL_HOLD"),
    }
)
_GONE = frozenset(
    {"down", "error", "unknown", "future", "not_responding", "powering_down", "powered_down", "reboot_issued"}
)

_JOB_FIELDS = ("JobArrayID", "State", "RestartCnt", "StartTime", "EndTime", "NodeList", "Dependency", "Reason")


class SchedulerError(TrimtabError):
    """Slurm is not there, does not answer, or refuses; the text says what was asked and what it said."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as the scheduler has it."""

    id: str
    """`123`, or in an array `123_4`."""
    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, …"""
    reason: str
    """Why it waits, or how it ended; `None` is Slurm's word for nothing."""
    nodes: tuple[str, ...]
    """Allocated."""
    restarts: int
    """How often it was requeued."""
    start: float | None
    """Unix seconds; of one that waits the scheduler's guess. None: it has none."""
    end: float | None
    """Unix seconds; of one that runs when its time is up. None: not known, or no limit."""
    dependency: str
    """What it still waits for, `afterok:12(unfulfilled)`; empty: nothing."""
    fields: dict[str, str]
    """All that was asked, as Slurm wrote it."""


def available() -> bool:
    """Whether Slurm's commands are on this machine."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raises SchedulerError where `available` says no."""
    if not available():
        raise SchedulerError("there is no sbatch on the PATH: submit from a login node of a Slurm cluster")


def is_alive(state: str) -> bool:
    """Whether a job in this state waits, runs, or is ending."""
    return state.partition(" ")[0] in _ALIVE


def is_gone(state: str) -> bool:
    """Whether a node in this state (`node_states`) serves no job that runs on it any longer."""
    return not _GONE.isdisjoint(state.split("+"))


# Submission


def submit(script: Path, arguments: Sequence[str] = ()) -> str:
    """Submit a batch script; the id of its job.

    Nothing of a job that this process runs in is handed on, and of the user's SBATCH_… variables only those in
    OF_THE_USER that the script leaves open.

    Raises:
        SchedulerError: Slurm refuses it, or does not answer.
    """
    out, _ = _run(["sbatch", "--parsable", *arguments, str(script)], f"submit {script}", _for_sbatch(script, arguments))
    # of several clusters: ID;CLUSTER
    job = out.strip().splitlines()[-1].partition(";")[0] if out.strip() else ""
    if not job.isdigit():
        raise SchedulerError(f"sbatch was to submit {script}, and answered {out.strip()!r} instead of a job's id")
    return job


def test(script: Path, arguments: Sequence[str]) -> str:
    """Whether the cluster would take a batch script: its estimate of when and where. Nothing is submitted.

    Raises:
        SchedulerError: it would not, for the reason in the text; or it does not answer.
    """
    _, err = _run(["sbatch", "--test-only", *arguments, str(script)], f"check {script}", _for_sbatch(script, arguments))
    return re.sub(r"^Job \d+ ", "", _said(err))


def _for_sbatch(script: Path, arguments: Sequence[str]) -> dict[str, str]:
    try:
        lines = script.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise SchedulerError(f"{script} cannot be read: {error.strerror}") from error
    said = {
        word.partition("=")[0].removeprefix("--").replace("-", "_").upper()
        for word in [*arguments, *(line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH "))]
    }
    kept = {f"SBATCH_{name}" for name in OF_THE_USER if name not in said}
    # SLURM_RESTART_COUNT of the job that submits would be believed by the one that is submitted
    foreign = re.compile(r"SLURM_(?!CONF|CLUSTERS$|JWT$)|SLURMD_|SBATCH_|PMI")
    return {name: value for name, value in os.environ.items() if name in kept or not foreign.match(name)}


# Jobs


def job(job_id: str) -> JobState | None:
    """A job; None: Slurm does not know it, or does not know it any more.

    Raises:
        SchedulerError: it does not answer.
    """
    return jobs([job_id]).get(job_id)


def jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """Those of the jobs that Slurm still knows, by id, with one question for all. An array's id stands for its tasks.

    Raises:
        SchedulerError: it does not answer.
    """
    wanted = sorted(set(ids))
    return {state.id: state for state in _squeue(f"--jobs={','.join(wanted)}")} if wanted else {}


def waiting_for(job_id: str) -> dict[str, JobState]:
    """Jobs that wait for a job to end, by id.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    name = re.compile(rf":{re.escape(job_id)}(_\*)?(?![0-9_])")
    return {state.id: state for state in _squeue("--states=PENDING") if name.search(state.dependency)}


def end_time(job_id: str) -> float | None:
    """When the time limit of a job is reached, in Unix seconds; None: it has none, or it is not known."""
    state = job(job_id)
    return None if state is None else state.end


def requeue(job_id: str) -> None:
    """Put a job that runs or has ended back into the queue.

    In an array `123_4`: the plain id of one of its tasks is that of the array, and would requeue all of them.
    """
    _run(["scontrol", "requeue", job_id], f"requeue job {job_id}")


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended, or are not known, are left alone."""
    if wanted := sorted(set(ids)):
        _run(["scancel", "--quiet", *wanted], f"cancel {', '.join(wanted)}")


def signal(job_id: str, name: str = "USR1", *, batch: bool = True) -> None:
    """Send a signal to the batch script of a job alone, or (`batch=False`) to its steps alone."""
    # by itself scancel would signal the steps, and never the script
    command = ["scancel", *(["--batch"] if batch else []), f"--signal={name}", job_id]
    # scancel tries again for minutes where the job does not run
    _run(command, f"send {name} to job {job_id}", seconds=SIGNAL_SECONDS)


def exclude(job_id: str, nodes: Collection[str]) -> None:
    """Let a job that waits not run on these nodes, and on all others. One that runs: after its `requeue`."""
    _update(job_id, "ExcNodeList", ",".join(sorted(nodes)))


def depend(job_id: str, expression: str) -> None:
    """Let a job that waits wait for what `expression` says, `afterok:12`, instead; empty: for nothing."""
    # as squeue shows it, each condition is followed by how it stands
    _update(job_id, "Dependency", re.sub(r"\([a-z]*\)", "", expression))


def redirect(waiting: JobState, job_id: str, successor: str) -> None:
    """Let a job that waits for `job_id` (see `waiting_for`) wait for `successor` instead, in the same way."""
    depend(waiting.id, re.sub(rf":{re.escape(job_id)}(_\*)?(?![0-9_])", f":{successor}", waiting.dependency))


def _update(job_id: str, field: str, value: str) -> None:
    _run(["scontrol", "update", f"JobId={job_id}", f"{field}={value}"], f"set {field} of job {job_id} to {value!r}")


def _squeue(*which: str) -> list[JobState]:
    layout = ",".join(f"{field}:|" for field in _JOB_FIELDS)
    states = [] if any(option.startswith("--states") for option in which) else ["--states=all"]
    command = ["squeue", "--noheader", "--all", "--array", *states, *which, f"--Format={layout}"]
    try:
        out, _ = _run(command, "say how jobs stand")
    except SchedulerError as error:
        # said only where one job was asked for; of several, the known ones are shown
        if "Invalid job id" in str(error):
            return []
        raise
    return [_job_state(line) for line in out.splitlines() if line.count("|") >= len(_JOB_FIELDS)]


def _job_state(line: str) -> JobState:
    fields = dict(zip(_JOB_FIELDS, line.split("|"), strict=False))
    nodes = fields["NodeList"]
    return JobState(
        id=fields["JobArrayID"],
        state=fields["State"],
        reason=fields["Reason"],
        nodes=tuple(hostnames(nodes)) if nodes else (),
        restarts=int(fields["RestartCnt"] or 0),
        start=_seconds(fields["StartTime"]),
        end=_seconds(fields["EndTime"]),
        dependency=_text(fields["Dependency"]),
        fields=fields,
    )


# Nodes


def hostnames(nodelist: str) -> list[str]:
    """`node[1-3],x` → its nodes, in that order.

    Raises:
        SchedulerError: it cannot be read.
    """
    if not re.search(r"[\[,]", nodelist):
        return [nodelist] if nodelist else []
    out, _ = _run(["scontrol", "show", "hostnames", nodelist], f"read the list of nodes {nodelist!r}")
    return out.split()


def address(node: str) -> str:
    """Address by which other nodes reach a node; its name, where Slurm says no other."""
    out, _ = _run(["scontrol", "--oneliner", "show", "node", node], f"say where node {node} is")
    match = re.search(r"\bNodeAddr=(\S+)", out)
    return match[1] if match else node


def node_states(nodes: Collection[str]) -> dict[str, str]:
    """Node → state in small letters with its flags: `idle`, `allocated+drain`, `down+not_responding`. Nodes that Slurm
    does not know are left out."""
    if not nodes:
        return {}
    rows = _sinfo(f"--nodes={','.join(sorted(nodes))}", "NodeList", "StateComplete")
    return {node: state for node, state in rows}  # noqa: C416 (a row is a list, and dict() wants pairs)


def gpus_by_node(partition: str | None, kind: str | None = None) -> dict[str, int]:
    """Node → GPUs that it is configured with, whatever its state.

    Args:
        partition: one, or several with commas; None: the default one.
        kind: count this type only.
    """
    which = "--all" if partition is None else f"--partition={partition}"
    rows = _sinfo(which, "NodeList", "Gres", "Partition")
    return {node: _count_gpus(gres, kind) for node, gres, name in rows if partition is not None or name.endswith("*")}


def _count_gpus(gres: str, kind: str | None) -> int:
    """Of `gpu:a100:4(S:0-1),gpu:2,nvme:1`."""
    count = 0
    for entry in re.sub(r"\([^)]*\)", "", _text(gres)).split(","):
        name, *types, number = entry.split(":") if ":" in entry else (entry, "1")
        if name == "gpu" and number.isdigit() and (kind is None or kind in types):
            count += int(number)
    return count


def _sinfo(which: str, *fields: str) -> list[list[str]]:
    """A row for each node and partition."""
    layout = ",".join(f"{field}:|" for field in fields)
    out, _ = _run(["sinfo", "--noheader", "--Node", which, f"--Format={layout}"], "say how nodes stand")
    return [line.split("|")[: len(fields)] for line in out.splitlines() if line.count("|") >= len(fields)]


# Asking


def _run(
    command: Sequence[str], what: str, environment: dict[str, str] | None = None, seconds: float | None = None
) -> tuple[str, str]:
    """What a command prints, on stdout and stderr.

    Args:
        what: is asked, for the error; follows `to`.
        environment: None: this process's own.
        seconds: it has; None: TIMEOUT_SECONDS.
    """
    seconds = seconds or TIMEOUT_SECONDS
    # the user's formats and filters (SQUEUE_STATES, SCANCEL_INTERACTIVE) are for the user
    own = re.compile("SQUEUE_|SINFO_|SCONTROL_|SCANCEL_|SLURM_TIME_FORMAT")
    kept = {name: value for name, value in (environment or os.environ).items() if not own.match(name)}
    try:
        done = subprocess.run(  # noqa: S603
            list(command),
            # sbatch says its times to people
            env=kept if command[0] == "sbatch" else kept | {"SLURM_TIME_FORMAT": "%s"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise SchedulerError(f"there is no {command[0]} on the PATH, which is needed to {what}") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(
            f"Slurm did not answer within {seconds:g} s when asked to {what}; `scontrol ping` tells whether its "
            "controller is up, `squeue --me` whether it was done all the same"
        ) from None
    except (OSError, ValueError) as error:
        raise SchedulerError(f"{command[0]} cannot be run to {what}: {error}") from error
    if done.returncode:
        said = _said(done.stderr) or _said(done.stdout) or f"nothing, and exited with {done.returncode}"
        raise SchedulerError(f"Slurm was asked to {what}, and said: {said}")
    return done.stdout, done.stderr


def _said(text: str) -> str:
    """Slurm's messages as one line, each once and without who says it."""
    lines = [
        re.sub(r"^(?:\w+: )?(?:(?:error|fatal|allocation failure): )?", "", line.strip()) for line in text.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _seconds(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def _text(text: str) -> str:
    return "" if text in ("(null)", "N/A") else text
