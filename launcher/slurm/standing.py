"""How runs stand with the scheduler: what it says of their jobs, and what the jobs wrote down. Pure but for `ask`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm import scheduler
from launcher.slurm.history import Job, read_jobs
from launcher.slurm.scheduler import JobState, SchedulerError
from launcher.slurm.submission import Submission, read_submission
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError

States = Mapping[str, JobState]

_WAITS = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Standing:
    """A submitted run and its job: the one that runs, else the one that waits, else the newest."""

    submission: Submission | None
    jobs: tuple[Job, ...]
    """A record for each start in a job, in order."""
    states: States | None
    """What the scheduler said of them; None: it was not asked, or did not answer."""
    job: str
    """Id; empty: not submitted yet."""

    @property
    def state(self) -> JobState | None:
        """Of the job; None: the scheduler does not know it."""
        return (self.states or {}).get(self.job)

    @property
    def last(self) -> Job | None:
        """The newest that has begun, of this submission."""
        since = self.submission.submitted if self.submission else 0.0
        own = [job for job in self.jobs if job.submitted >= since]
        return own[-1] if own else None

    @property
    def waits(self) -> bool:
        state = self.state
        return state is not None and state.state.partition(" ")[0] in _WAITS

    @property
    def alive(self) -> bool:
        """The scheduler says that the job waits, runs or is ending."""
        return self.state is not None and scheduler.is_alive(self.state.state)

    @property
    def restarts(self) -> int:
        """How often the job was requeued."""
        if self.state is not None:
            return self.state.restarts
        return self.last.restart if self.last is not None and self.last.job == self.job else 0

    @property
    def nodes(self) -> str:
        """How many it has or had; before it begins as many as it may get."""
        if self.state is not None and self.state.nodes:
            return str(len(self.state.nodes))
        if self.last is not None and self.last.job == self.job and not self.waits:
            return str(len(self.last.nodes))
        if self.submission is None:
            return ""
        fewest, most = self.submission.nodes
        return str(fewest) if fewest == most else f"{fewest}–{most}"

    @property
    def words(self) -> str:
        """The job in a table: `12 PENDING (Priority), requeued 2×`."""
        text = self.job
        if self.state is not None:
            text += f" {self.state.state}"
            if self.waits and self.state.reason not in ("", "None"):
                text += f" ({self.state.reason})"
        return text + (f", requeued {self.restarts}×" if self.restarts else "")

    @property
    def decision(self) -> str:
        """Why its last job did not have the run go on, in a sentence; empty: it did, or its outcome says it."""
        last = self.last
        return last.why if last is not None and last.then == "end" else ""

    @property
    def end_of_job(self) -> str:
        """How the scheduler says that the job ended, in a sentence; empty: it has not, or is not known."""
        return f"job {self.job} ended as {self.state.state}" if self._over and self.state is not None else ""

    @property
    def _over(self) -> bool:
        """The scheduler says that the job has ended, whatever was written down."""
        return self.state is not None and not scheduler.is_alive(self.state.state)

    def state_of_run(self, by_files: str, begun: bool) -> str:
        """Where the run stands.

        Args:
            by_files: as far as its files tell.
            begun: the newest start in its ledger is one of this job.
        """
        last = self.last
        if by_files == "finished":
            return by_files
        if self.waits:
            return f"queued (requeued {self.restarts}×)" if self.restarts else "queued"
        if self.state is not None and not self._over:
            return "running" if begun and (last is None or last.ended is None) else "starting"
        if self.state is not None and self.state.state.startswith("CANCELLED"):
            return _CANCELLED
        if last is not None and last.then == "end":
            if last.why.startswith(_CANCELLED):
                return _CANCELLED
            reasons = {"signal": "stopped", "node": "crashed", "completed": "finished"}
            return by_files if by_files not in ("prepared", "running") else reasons.get(last.reason, last.reason)
        if self._over:
            return "crashed" if by_files in ("prepared", "running") else by_files
        if self.states is not None:
            return by_files
        # nobody answered
        if last is None:
            return "queued" if by_files == "prepared" else by_files
        if last.then in ("requeue", "chain"):
            return "queued"
        return "starting" if by_files == "prepared" else by_files


def standing_of(root: Path, states: States | None) -> Standing | None:
    """Of the run in `root`; None: it was never submitted. What is damaged counts as not there."""
    try:
        submission = read_submission(root)
    except RunDirectoryError:
        submission = None
    try:
        jobs = tuple(read_jobs(RunFiles(root)))
    except RunDirectoryError:
        jobs = ()
    if submission is None and not jobs:
        return None
    ids = [job.job for job in jobs] + ([submission.job] if submission and submission.job else [])
    known = states or {}
    alive = [job for job in reversed(ids) if job in known and scheduler.is_alive(known[job].state)]
    runs = [job for job in alive if known[job].state not in _WAITS]
    job = next(iter([*runs, *alive, *reversed(ids)]), "")
    if not alive and not known and jobs and submission and submission.submitted <= jobs[-1].submitted:
        # the successor in a chain is submitted before the job that runs has ended
        job = jobs[-1].job if jobs[-1].ended is None or jobs[-1].then == "end" else job
    return Standing(submission, jobs, states, job)


def ids_of(root: Path) -> set[str]:
    """The jobs of a run that the scheduler may still know: the newest that has begun, and the newest submitted."""
    found = standing_of(root, None)
    if found is None:
        return set()
    newest = {found.jobs[-1].job} if found.jobs else set()
    return newest | ({found.submission.job} if found.submission else set()) - {""}


def ask(roots: Iterable[Path]) -> tuple[States | None, str]:
    """What the scheduler says of the jobs of runs, with one question for all; None where it does not answer, and then a
    sentence that says so, unless no run was ever submitted."""
    ids = {job for root in roots for job in ids_of(root)}
    if not ids:
        return None, ""
    if not scheduler.available():
        return None, "there is no Slurm on this machine: jobs are shown as their files have them"
    try:
        return scheduler.jobs(ids), ""
    except SchedulerError as error:
        return None, f"the scheduler did not answer, jobs are shown as their files have them: {error}"


def allocations(jobs: Sequence[Job], *, goes_on: bool) -> list[tuple[float, float | None]]:
    """(began, ended) of each start in a job, as accounts of time take them.

    Args:
        goes_on: the last one is alive, if it has no end.

    Of a job that died with its node nobody noted the end: it is left out, and its ledger tells how long it lived.
    """
    found: list[tuple[float, float | None]] = []
    for number, job in enumerate(jobs):
        following = jobs[number + 1] if number + 1 < len(jobs) else None
        if job.ended is None:
            if following is None and goes_on:
                found.append((job.began, None))
        elif not (following and job.reason == "node" and job.then == "requeue" and job.ended == following.began):
            found.append((job.began, job.ended))
    return found


def queued_seconds(jobs: Sequence[Job]) -> float:
    """How long a run waited for its jobs altogether, from the submission or the end of the job before."""
    waited, over = 0.0, 0.0
    for job in jobs:
        waited += max(0.0, job.began - max(job.submitted, over))
        over = job.ended if job.ended is not None else job.began
    return waited
