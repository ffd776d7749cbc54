"""Errors by kind, and the exit code of each kind.

Every error that a user can cause derives from :class:`TrimtabError`; its text is one sentence that says what is wrong,
where, and what to do. `assert` is kept for invariants of our own code.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process exit code says. `outcome.json` in the run directory says the same in words."""

    COMPLETED = 0
    """The run reached its last step, or the command did what was asked."""
    CRASHED = 1
    """An unexpected error: a bug, a lost process, a full disk. Worth another start."""
    USAGE = 2
    """The command line, the config or the data is wrong. Starting again changes nothing."""
    HALTED = 3
    """The guard stopped the run with a diagnosis. Do not requeue."""
    SUPERSEDED = 4
    """A newer start of the same run has taken over. Do not requeue."""
    STOPPED = 75
    """Asked to stop (signal); everything is saved and the same command goes on. EX_TEMPFAIL: requeue."""


SUPERVISED = "TRIMTAB_SUPERVISED"
"""Environment variable that the launcher sets for ranks: it reads `outcome.json` and exits with its code. A rank whose
run ended in order then exits with 0, and spares the agent between them a report of failure."""


class TrimtabError(Exception):
    """Base of all errors whose text is meant for the user."""

    exit_code = ExitCode.USAGE


class ConfigError(TrimtabError):
    """One or more options are wrong.

    Attributes:
        problems: (path, sentence) for each, in the order of the schema; the path is dotted, as on the command line.
    """

    def __init__(self, problems: list[tuple[str, str]], source: str = "the config"):
        self.problems = problems
        self.source = source
        lines = "\n".join(f"  {path}: {sentence}" if path else f"  {sentence}" for path, sentence in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source} has {count}:\n{lines}")


class DataError(TrimtabError):
    """A source cannot be read, holds nothing usable, or is not what it was when it was prepared."""


class RunDirectoryError(TrimtabError):
    """The run directory is unwritable, holds another config, or lacks what is needed."""


class CheckpointError(TrimtabError):
    """A checkpoint is damaged, incomplete or from a run of another shape."""


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing, cut off or changed; the text names file, rank, what was expected and found."""


class LaunchError(TrimtabError):
    """The processes cannot be started as asked: ranks, ports, environment."""


class RunHaltedError(TrimtabError):
    """The guard stopped the run; the text is its diagnosis."""

    exit_code = ExitCode.HALTED


class SupersededError(TrimtabError):
    """A newer start of the same run has taken over: this one may write nothing more."""

    exit_code = ExitCode.SUPERSEDED


class SaveFailedError(TrimtabError):
    """More saves in a row failed than `checkpoint.max_failures` allows; the text is the last one's reason."""

    exit_code = ExitCode.CRASHED


class WorkerDiedError(TrimtabError):
    """A helper process of this rank died (data loading, writing); the text names it and its exit code."""

    exit_code = ExitCode.CRASHED
