"""What a job does on its first node: `python -m launcher.slurm.job RUN -- srun … ranks`, from the batch script.

It looks at the nodes, prepares what ranks need, starts them on all nodes through the given srun, passes the scheduler's
signal on to them, and in the end sees to it that the run goes on where it is to go on: in this allocation, in the same
job requeued, or in the job that follows. `requeue.decide` says which, `aftermath` does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import accelerate, local, start
from launcher.run_directory import write_atomically
from launcher.slurm import aftermath, followers, scheduler
from launcher.slurm.allocation import free_port, read_allocation
from launcher.slurm.container import contained
from launcher.slurm.ending import Ending, ending_of
from launcher.slurm.fitness import Fitness
from launcher.slurm.history import append_begin, append_end, read_jobs
from launcher.slurm.lead import Lead
from launcher.slurm.requeue import End, GoOn, exhausted
from launcher.slurm.submission import read_submission
from launcher.slurm.work import Work, say
from launcher.supervision import position
from trainer import starts
from trainer.config.files import RunFiles
from trainer.config.load import dump_config, read_run_config
from trainer.errors import SUPERVISED, ExitCode, LaunchError, TrimtabError
from trainer.heartbeat import RELAUNCHED_VARIABLE
from trainer.telemetry.books import JOB_VARIABLE

AGAIN_SECONDS = 5.0
"""Ranks that are still being launched have no ears yet: a request to stop is repeated until they end."""


def main(arguments: Sequence[str]) -> int:
    """The exit code of the job: 0 for a run that is complete, so that what depends on it starts."""
    # the batch script ignored it until now
    signal.signal(signal.SIGUSR1, lambda *_: None)
    if len(arguments) < 3 or arguments[1] != "--":
        print("usage: python -m launcher.slurm.job RUN -- srun …", file=sys.stderr)
        return ExitCode.USAGE
    try:
        with local.Requests() as requests:
            return _run(Path(arguments[0]), arguments[2:], requests)
    except TrimtabError as error:
        say(str(error))
        return error.exit_code


def _run(root: Path, command: Sequence[str], requests: local.Requests) -> int:
    files = RunFiles(root)
    submission = read_submission(root)
    if submission is None:
        raise LaunchError(f"{root} was not submitted: it holds no submission.json; trimtab submit {root}")
    allocation = read_allocation(os.environ, scheduler.hostnames)
    config = read_run_config(root)
    fitness = Fitness(submission, config, allocation.nodes, say)
    work = Work(files, config, submission, allocation, command, requests, allocation.began, fitness)
    if submission.site.continue_by == "chain":
        work.successor = followers.chain(submission, allocation.job, say)
    try:
        return _work(work)
    except Exception as error:  # noqa: BLE001 - whatever it was, the history must say so
        # a bug of ours, or a disk that is full: what the ranks saved stays
        code = error.exit_code if isinstance(error, TrimtabError) else ExitCode.CRASHED
        why = f"the job itself failed: {type(error).__name__}: {error}"
        with contextlib.suppress(TrimtabError):
            append_end(files, replace(work.record(), ended=time.time(), reason="crashed", then="end", why=why))
        if not isinstance(error, TrimtabError):
            traceback.print_exc()
        say(why)
        return code


def _work(work: Work) -> int:
    """Starts of the run, until it ends or another job goes on with it; the exit code of the job."""
    files, submission = work.files, work.submission
    relaunched: dict[str, Any] | None = None
    while True:
        job = work.record()
        append_begin(files, job)
        spent = exhausted([*work.jobs()[:-1], job], time.time(), submission.site)
        ending = Ending("crashed", spent, ExitCode.CRASHED) if spent else _start(work, relaunched)
        over = time.time()
        job = replace(job, ended=over, reached=position(files), reason=ending.reason, why=ending.message)
        then = End(spent) if spent else aftermath.decide(work, job, ending)
        if isinstance(then, GoOn) and then.by == "here":
            append_end(files, replace(job, then="here"))
            say(f"{ending.message or ending.reason}: starting the ranks again in this allocation")
            relaunched = {"reason": ending.message, "killed": None, "ended": over, "launched": time.time()}
            work.began, work.parts = over, {}
            continue
        if isinstance(then, GoOn):
            return aftermath.go_on(work, job, then)
        return aftermath.end(work, job, ending, then)


def _start(work: Work, relaunched: dict[str, Any] | None) -> Ending:
    """One start, from the look at the nodes to the end of the last rank."""
    files, requests = work.files, work.requests
    try:
        if start.completed_before(files.root):
            return Ending("completed", "there was nothing left to do", ExitCode.COMPLETED)
        began = time.time()
        nodes = work.fitness.choose()
        work.parts["preflight"] = time.time() - began
        if nodes is None:
            return Ending("node", work.fitness.why_not(), ExitCode.STOPPED)
        if requests.wait(0) is not None:
            return Ending("signal", "asked to stop before the ranks were started", ExitCode.STOPPED)
        layout = _prepare(work, len(nodes))
    except SystemExit as left:
        # said already; what a command line ends with, a job notes
        code = left.code if isinstance(left.code, int) else ExitCode.CRASHED
        if code == ExitCode.STOPPED:
            return Ending("signal", "asked to stop while the data was being prepared", code)
        reason = "refused" if code == ExitCode.USAGE else "crashed"
        return Ending(reason, "the data could not be prepared; see the log of the job", code)
    except TrimtabError as error:
        return Ending("refused", str(error), error.exit_code)
    return _train(work, layout, nodes, relaunched)


def _prepare(work: Work, nodes: int) -> accelerate.Layout:
    """Data, plan and launcher files for ranks on so many nodes."""
    began = time.time()
    cluster = work.config.cluster
    if cluster.nodes != nodes:
        say(f"{nodes} nodes, as the allocation has it (before: {cluster.nodes}); the global batch stays")
        cluster = cluster.model_copy(update={"nodes": nodes})
        work.config = work.config.model_copy(update={"cluster": cluster})
        write_atomically(work.files.config, dump_config(work.config))
    request = start.Request(work.config, work.files.root, ())
    plan = start.make_ready(request, None, say, work.requests, contained(work.submission), again=len(work.jobs()) > 1)
    work.parts["prepare"] = time.time() - began
    return start.layout_of(work.config, plan)


def _train(work: Work, layout: accelerate.Layout, nodes: tuple[str, ...], relaunched: dict[str, Any] | None) -> Ending:
    files, place = work.files, work.allocation
    files.outcome.unlink(missing_ok=True)
    by = f"{place.job}.{place.restart}.{work.began:.3f}"
    about = {
        "job": place.job,
        "restart": place.restart,
        "nodes": nodes,
        "allocated": work.began,
        "parts": work.parts,
        "earlier": [(job.began, job.ended) for job in read_jobs(files) if job.ended is not None],
        "launched": time.time(),
    }
    environment = {
        **os.environ,
        **accelerate.environment(layout),
        **work.site.environment,
        "PET_SHUTDOWN_TIMEOUT": str(accelerate.SHUTDOWN_SECONDS),
        "TRIMTAB_MASTER": scheduler.address(nodes[0]),
        "TRIMTAB_PORT": str(free_port()),
        JOB_VARIABLE: json.dumps(about),
        starts.BY_VARIABLE: by,
        SUPERVISED: "1",
    }
    if relaunched is not None:
        environment[RELAUNCHED_VARIABLE] = json.dumps(relaunched)
    newest_before = starts.newest(files)
    srun, *rest = work.command
    ended = local.supervise(
        [srun, f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", *rest],
        environment,
        passed_on=signal.SIGUSR1,
        grace_seconds=float(accelerate.SHUTDOWN_SECONDS),
        stopping="the ranks finish this step, then save and stop",
        say=say,
        watch=_Watch(Lead(files, work.limit, work.site.signal_seconds), work.requests),
        requests=work.requests,
    )
    return ending_of(files, ended, by, newest_before)


class _Watch:
    """Looks at the clock while the ranks run: asks them to stop in time, and again until they have."""

    def __init__(self, lead: Lead, requests: local.Requests):
        self._lead = lead
        self._requests = requests
        self._asked_at = time.monotonic()

    def __call__(self, srun: int) -> str | None:
        if self._requests.received is None:
            if (why := self._lead.due(time.time())) is not None:
                say(why)
                self._asked_at = time.monotonic()
                os.kill(os.getpid(), signal.SIGUSR1)
        elif time.monotonic() - self._asked_at > AGAIN_SECONDS:
            self._asked_at = time.monotonic()
            local.send(srun, signal.SIGUSR1)
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
