"""What follows a start in a job: nothing, another one here, the job again, or the job that follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from launcher import start
from launcher.slurm import followers, scheduler
from launcher.slurm.allocation import Allocation
from launcher.slurm.container import contained
from launcher.slurm.ending import Ending, note_outcome
from launcher.slurm.history import Job, append_end
from launcher.slurm.requeue import End, GoOn
from launcher.slurm.requeue import decide as decide_from
from launcher.slurm.work import Work, say
from trainer.errors import ExitCode, TrimtabError

GRACE_SECONDS = 60.0
"""How long a requeued job waits to be ended by the scheduler."""

NODES_SECONDS = 15.0
"""How long the scheduler may take to notice that a node is gone, when ranks died and nobody says why."""


def decide(work: Work, job: Job, ending: Ending) -> GoOn | End:
    well = ending.reason == "crashed" and work.requests.received is None and _nodes_are_well(work)
    return decide_from(
        [*work.jobs()[:-1], job],
        time.time(),
        work.site,
        nodes_are_well=well,
        restarts=work.config.supervision.restarts > 0,
        cancelled=work.was_cancelled(),
    )


def _nodes_are_well(work: Work) -> bool:
    """Whether a process can be started on every node of the allocation. Where not, the scheduler is given time to
    notice who is gone."""
    if work.fitness.answers(NODES_SECONDS):
        return True
    deadline = time.monotonic() + NODES_SECONDS
    while time.monotonic() < deadline:
        try:
            states = scheduler.node_states(work.allocation.nodes)
        except TrimtabError as error:
            say(f"the scheduler does not answer: {error}")
            return False
        gone = {node: f"{node} is {state}" for node, state in states.items() if scheduler.is_gone(state)}
        if gone:
            work.fitness.bad.update(gone)
            return False
        if work.requests.wait(1.0) is not None:
            return False
    return False


def go_on(work: Work, job: Job, then: GoOn) -> int:
    """Hand the run over to the next job: this one again, or one that depends on it."""
    files, place = work.files, work.allocation
    leave_out = work.fitness.left_out()
    append_end(files, replace(job, then=then.by))
    say(f"{job.why or job.reason}: the run goes on by {then.by} from step {job.reached}")
    if then.by == "requeue":
        try:
            _requeue(place, leave_out)
            work.requests.wait(GRACE_SECONDS)
            return ExitCode.STOPPED
        except TrimtabError as error:
            say(f"{error}; submitting a job that follows this one instead")
    if work.successor is None:
        work.successor = followers.chain(work.submission, place.job, say)
    scheduler.exclude(work.successor, leave_out)
    followers.hand_over(place.job, work.successor, say)
    return ExitCode.STOPPED


def _requeue(place: Allocation, leave_out: Sequence[str]) -> None:
    state = scheduler.job(place.job)
    # the scheduler may have done it by itself; and a node that was cut off and is back must not take the job away from
    # where it runs by now
    if state is not None and state.restarts != place.restart:
        say("the scheduler has requeued the job already")
    else:
        scheduler.requeue(place.job)
        state = None
    if state is None or not state.nodes:
        # until the scheduler has ended this process the job is pending, and takes it; what was left out before and is
        # well again no longer counts
        scheduler.exclude(place.job, leave_out)


def end(work: Work, job: Job, ending: Ending, then: End) -> int:
    """The run does not go on by itself."""
    files = work.files
    code = ending.exit_code
    if ending.reason != "superseded":
        if work.successor is not None:
            followers.end_chain(work.submission, work.allocation.job, work.successor)
        if ending.reason == "completed" and not start.is_exported(files.root):
            if start.export(files.root, requests=work.requests, contained=contained(work.submission)):
                say(f"the run is complete, but was not exported; see above, then: trimtab export {files.root}")
                code = ExitCode.CRASHED
        elif then.why or ending.reason in ("crashed", "signal", "node"):
            why = "; ".join(text for text in (ending.message, then.why) if text)
            reason = "stopped" if ending.reason in ("signal", "node", "stopped") else ending.reason
            note_outcome(files, reason, code, why)
    why = "; ".join(dict.fromkeys(text for text in (ending.message, then.why) if text))
    append_end(files, replace(job, ended=time.time(), then="end", why=why))
    say(f"{ending.reason}: {why}" if why else ending.reason)
    if code != ExitCode.COMPLETED and ending.reason != "superseded":
        followers.cancel_after(files.root, f"{ending.reason}: {why}", say)
    return code
