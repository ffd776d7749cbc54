"""The batch script: what is submitted → options of sbatch and the text of `slurm/train.sbatch.j2`. Pure.

A line of `#SBATCH` knows no quotes that hold for every text: it has plain words only, and what else there is goes to
sbatch as arguments, through no shell. In the script itself all text of users is quoted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2

from launcher.accelerate import MONITOR_SECONDS
from launcher.slurm.container import contained
from launcher.slurm.submission import Submission
from launcher.slurm.texts import seconds_of
from trainer.config.files import RunFiles
from trainer.errors import LaunchError

TEMPLATE = "train.sbatch.j2"

SHARED_LOG = "jobs.log"
"""Of all jobs, where they can have none of their own."""

CORES_A_GPU = 4
"""Where nodes are shared and nothing says how many threads a rank has."""

_PLAIN = re.compile(r"[A-Za-z0-9_./+:,@%=\[\]-]+")


@dataclass(frozen=True, slots=True)
class BatchOption:
    """One option of sbatch."""

    name: str
    value: str | None = None

    @property
    def word(self) -> str:
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"

    @property
    def is_plain(self) -> bool:
        """Whether a `#SBATCH` line can say it."""
        return self.value is None or _PLAIN.fullmatch(self.value) is not None


@dataclass(frozen=True, slots=True)
class BatchScript:
    """What the template is filled with."""

    directives: tuple[str, ...]
    """Of the `#SBATCH` lines."""
    argued: tuple[str, ...]
    """Names of the options that are arguments instead."""
    runs: tuple[str, ...]
    """Run directories."""
    array: bool
    script: str
    """Where this script lies."""
    modules: tuple[str, ...]
    setup: tuple[str, ...]
    setup_on_host_only: bool
    environment: dict[str, str]
    python: str
    """That looks after the ranks."""
    ranks_python: tuple[str, ...]
    """Command that runs Python for the ranks."""
    srun: tuple[str, ...]
    monitor_seconds: float
    logs: str
    """Folder of what its jobs print."""
    logs_are_shared: bool
    """All its jobs print into one file there."""


def render(submissions: Sequence[Submission]) -> str:
    """The text of the batch script: for one run, or as an array for several that are submitted alike.

    Raises:
        LaunchError: the signal before the time limit would come at once.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 (this makes shell, and `quote` escapes for it)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = quote
    return environment.from_string(_template().read_text(encoding="utf-8")).render(
        asdict(_filled(submissions)), shared_log=SHARED_LOG
    )


def sbatch_arguments(submissions: Sequence[Submission]) -> list[str]:
    """The options of `sbatch` whose text no `#SBATCH` line of the script can hold. To be given without a shell."""
    return [option.word for option in _options(submissions) if not option.is_plain]


def log_path(submission: Submission, job: str) -> Path:
    """What a job of a run prints.

    Args:
        job: its id: `123`, or in an array `123_4`.
    """
    return RunFiles(Path(submission.root)).logs / f"{job}.log"


def quote(text: str) -> str:
    """`text` as one word of bash on one line."""
    if not any(character < " " or character == "\x7f" for character in text):
        return shlex.quote(text)
    # sbatch takes no script with a carriage return before a line feed
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", escaped) + "'"


def _filled(submissions: Sequence[Submission]) -> BatchScript:
    first, site, container = submissions[0], submissions[0].site, submissions[0].site.container
    options = _options(submissions)
    return BatchScript(
        directives=tuple(option.word for option in options if option.is_plain),
        argued=tuple(f"--{option.name}" for option in options if not option.is_plain),
        runs=tuple(submission.root for submission in submissions),
        array=_is_array(submissions),
        script=first.script,
        modules=site.modules,
        setup=site.setup,
        setup_on_host_only=container is not None and container.kind == "pyxis",
        environment=dict(site.environment),
        python=first.python,
        ranks_python=_ranks_python(first),
        srun=_srun(first),
        monitor_seconds=MONITOR_SECONDS,
        logs=str(_logs(submissions)),
        logs_are_shared=_share_a_log(submissions),
    )


def _template() -> Path:
    """In the repository, or in an installed package beside this file."""
    package = Path(__file__).parent
    places = package.parents[1] / "slurm" / TEMPLATE, package / TEMPLATE
    return next(place for place in places if place.is_file())


def _is_array(submissions: Sequence[Submission]) -> bool:
    """The runs of an array share a script, which lies above them; one of them alone is submitted to chain it."""
    first = submissions[0]
    return len(submissions) > 1 or Path(first.script).parent != Path(first.root)


def _options(submissions: Sequence[Submission]) -> list[BatchOption]:
    first, site = submissions[0], submissions[0].site
    fewest, most = first.nodes
    pairs: list[tuple[str, str | int | None]] = [
        ("job-name", _job_name(submissions)),
        ("output", _output(submissions)),
        ("open-mode", "append"),
        # no number of tasks: with one, Slurm gives the fewest nodes of a range
        ("nodes", f"{fewest}" if fewest == most else f"{fewest}-{most}"),
    ]
    if (cores := _cores(first)) is not None:
        pairs.append(("cpus-per-task", cores))
    if site.exclusive:
        pairs.append(("exclusive", None))
    pairs += _gpus(first)
    given = {
        "mem": site.memory,
        "time": first.time or site.time,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "exclude": ",".join(site.exclude) or None,
    }
    pairs += [(name, value) for name, value in given.items() if value is not None]
    if _is_array(submissions):
        pairs.append(("array", f"0-{len(submissions) - 1}"))
    pairs.append(("requeue" if site.continue_by == "requeue" else "no-requeue", None))
    pairs.append(("signal", f"B:USR1@{_signal_seconds(first)}"))
    if any(submission.after for submission in submissions):
        pairs.append(("kill-on-invalid-dep", "yes"))
    for name, setting in site.directives.items():
        if setting is not False and not (name == "gres" and "gres" in dict(pairs)):
            pairs.append((name, None if setting is True else str(setting)))
    return [BatchOption(name, None if value is None else str(value)) for name, value in pairs]


def _job_name(submissions: Sequence[Submission]) -> str:
    """For the lists that Slurm shows: one line."""
    name, more = submissions[0].name, len(submissions) - 1
    shown = "".join(character if character.isprintable() else " " for character in name)
    return f"{shown}+{more}" if more else shown


def _logs(submissions: Sequence[Submission]) -> Path:
    """Where Slurm writes what the jobs print; the tasks of an array have one folder."""
    first = submissions[0]
    return Path(first.script).parent / "logs" if _is_array(submissions) else RunFiles(Path(first.root)).logs


def _share_a_log(submissions: Sequence[Submission]) -> bool:
    """In a path with a backslash Slurm replaces nothing, so that no file can be named after its job."""
    return "\\" in str(_logs(submissions))


def _output(submissions: Sequence[Submission]) -> str:
    logs = str(_logs(submissions))
    if _share_a_log(submissions):
        return f"{logs}/{SHARED_LOG}".replace("\\", "\\\\")
    return f"{logs.replace('%', '%%')}/{'%A_%a' if _is_array(submissions) else '%j'}.log"


def _cores(submission: Submission) -> int | None:
    site = submission.site
    if site.cpus_per_task is not None or site.exclusive:
        return site.cpus_per_task
    a_rank = submission.threads_per_rank or (CORES_A_GPU if submission.device == "cuda" else 1)
    return submission.ranks_per_node * a_rank


def _gpus(submission: Submission) -> list[tuple[str, str | int | None]]:
    """All GPUs of a node are visible to its one task; each of its ranks takes one."""
    site = submission.site
    if submission.device == "cpu":
        return []
    count = f"{site.gpu_type}:{submission.ranks_per_node}" if site.gpu_type else f"{submission.ranks_per_node}"
    if site.gpu_option == "gpus-per-node":
        return [("gpus-per-node", count)]
    others = site.directives.get("gres")
    return [("gres", f"gpu:{count}" + (f",{others}" if others else ""))]


def _signal_seconds(submission: Submission) -> int:
    seconds, time = submission.site.signal_seconds, submission.time or submission.site.time
    limit = None if time is None else seconds_of(time)
    if limit is not None and limit <= seconds:
        raise LaunchError(
            f"a job of {time} would be asked to stop as soon as it starts, since that is due {seconds} s before its "
            "end: give a longer --time, or set a smaller `signal_seconds` in the site file"
        )
    return seconds


def _srun(submission: Submission) -> tuple[str, ...]:
    """Everything in front of what runs on each node; the job adds the nodes."""
    words = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--label", "--export=ALL"]
    if (cores := _cores(submission)) is not None:
        # since 22.05 srun does not take it over from sbatch
        words.append(f"--cpus-per-task={cores}")
    container = submission.site.container
    if container is not None and container.kind == "pyxis":
        words.append(f"--container-image={container.image}")
        if container.mounts:
            words.append(f"--container-mounts={','.join(container.mounts)}")
    return tuple(words)


def _ranks_python(submission: Submission) -> tuple[str, ...]:
    container = submission.site.container
    if container is None:
        return (submission.python,)
    if container.kind == "pyxis":
        return (container.python,)
    return contained(submission)
