"""`trimtab submit`: run directories written, one batch script rendered, checked by the scheduler and submitted."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launcher import start
from launcher.run_directory import write_atomically
from launcher.slurm import exclusion, scheduler
from launcher.slurm.fitting import refuse_unfitting, refuse_unmounted
from launcher.slurm.history import read_jobs
from launcher.slurm.script import render, sbatch_arguments
from launcher.slurm.site import SiteConfig
from launcher.slurm.submission import Submission, read_submission, write_submission
from trainer.config.files import RunFiles
from trainer.config.resolve import arithmetic
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, LaunchError

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What is asked of the cluster."""

    site: SiteConfig = field(default_factory=SiteConfig)
    nodes: tuple[int, int] | None = None
    """Fewest and most; None: `cluster.nodes` of the config."""
    time: str | None = None
    """Time limit of a job; None: the site's."""
    fresh: bool = False
    """Move earlier runs of the same names aside."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of it."""

    job: str | None
    """Id; None: nothing had to be submitted, or it was a dry run."""
    script: str
    """Text of the batch script."""
    command: tuple[str, ...]
    """The sbatch that does it."""


def read_nodes(text: str) -> tuple[int, int]:
    """`2` → (2, 2); `2-4` → (2, 4).

    Raises:
        LaunchError: it is neither.
    """
    first, dash, last = text.partition("-")
    try:
        fewest = int(first)
        most = int(last) if dash else fewest
    except ValueError:
        fewest, most = 0, 0
    if not 1 <= fewest <= most:
        raise LaunchError(f"--nodes {text}: give a number of nodes, or a range of them: --nodes 2, --nodes 2-4")
    return fewest, most


def submit_runs(
    requests: Sequence[start.Request],
    options: SubmitOptions,
    *,
    after: Sequence[str] = (),
    before: Sequence[str] = (),
    dry_run: bool = False,
    say: Say,
) -> Submitted:
    """One job for one run, or an array for several.

    Args:
        after: ids of jobs that must have ended well before it begins.
        before: run directories of those jobs.
        dry_run: write nothing, submit nothing.

    Raises:
        SchedulerError: there is no Slurm, or it refuses the job; the text is its reason.
        ConfigError: a config does not fit the nodes.
        LaunchError: a run has a job already, or the nodes' GPUs do not do.
        RunDirectoryError: see `start.entered`.
    """
    if not requests:
        raise LaunchError("there is no run to submit")
    requests = [_on_these_nodes(request, options) for request in requests]
    submissions = [_submission(request, options, requests, before) for request in requests]
    script, path = render(submissions), Path(submissions[0].script)
    arguments = [*sbatch_arguments(submissions), *_left_out(submissions[0])]
    if after:
        arguments = [*arguments, f"--dependency=afterok:{':'.join(after)}"]
    result = Submitted(None, script, ("sbatch", *arguments, str(path)))
    if dry_run:
        return result
    scheduler.require()
    for submission in submissions:
        _refuse_active(submission)
    for request, submission in zip(requests, submissions, strict=True):
        with start.entered(request, options.fresh, say):
            write_submission(submission)
            RunFiles(request.root).logs.mkdir(exist_ok=True)
    if len(requests) > 1:
        (path.parent / "logs").mkdir(exist_ok=True)
    write_atomically(path, script)
    # without what it depends on: the question is whether it could ever start
    say(f"checked: {scheduler.test(path, sbatch_arguments(submissions))}")
    job = scheduler.submit(path, arguments)
    for index, submission in enumerate(submissions):
        own = job if len(submissions) == 1 else f"{job}_{index}"
        write_submission(submission.model_copy(update={"job": own}))
    return Submitted(job, script, result.command)


def _on_these_nodes(request: start.Request, options: SubmitOptions) -> start.Request:
    """The request for the most nodes that it may get and can use."""
    fewest, most = options.nodes or (request.config.cluster.nodes, request.config.cluster.nodes)
    fitting = [nodes for nodes in range(fewest, most + 1) if _fits(request.config, nodes)]
    if not fitting:
        # says which sizes would do
        arithmetic(request.config, most * request.config.cluster.ranks_per_node)
        raise AssertionError
    cluster = request.config.cluster.model_copy(update={"nodes": fitting[-1]})
    return start.Request(request.config.model_copy(update={"cluster": cluster}), request.root, request.warnings)


def _fits(config: RunConfig, nodes: int) -> bool:
    try:
        arithmetic(config, nodes * config.cluster.ranks_per_node)
    except ConfigError:
        return False
    return True


def _submission(
    request: start.Request, options: SubmitOptions, requests: Sequence[start.Request], before: Sequence[str]
) -> Submission:
    config, site = request.config, options.site
    nodes = options.nodes or (config.cluster.nodes, config.cluster.nodes)
    device = _device(config, site, nodes)
    refuse_unmounted(site, {"the run": request.root, "prepared data": Path(config.data.prepared)})
    script = RunFiles(request.root if len(requests) == 1 else request.root.parent).script
    return Submission(
        name=config.name,
        root=str(request.root),
        script=str(script),
        workdir=str(Path.cwd()),
        nodes=nodes,
        ranks_per_node=config.cluster.ranks_per_node,
        device=device,
        threads_per_rank=config.cluster.threads_per_rank,
        time=options.time or site.time,
        python=site.python or sys.executable,
        site=site,
        after=tuple(before),
        submitted=time.time(),
    )


def _device(config: RunConfig, site: SiteConfig, nodes: tuple[int, int]) -> Literal["cpu", "cuda"]:
    """What the ranks compute on; asks the scheduler for the GPUs of its nodes."""
    if config.cluster.device == "cpu" or not scheduler.available():
        return "cpu" if config.cluster.device != "cuda" else "cuda"
    gpus = scheduler.gpus_by_node(site.partition, site.gpu_type)
    if config.cluster.device == "auto" and not any(gpus.values()):
        return "cpu"
    refuse_unfitting(site, nodes, config.cluster.ranks_per_node, gpus)
    return "cuda"


def _left_out(submission: Submission) -> list[str]:
    """The option of sbatch that keeps the job off nodes that other runs found unfit."""
    found = exclusion.excluded(Path(submission.root).parent, time.time())
    return [f"--exclude={','.join(sorted({*submission.site.exclude, *found}))}"] if found else []


def _refuse_active(submission: Submission) -> None:
    earlier = read_submission(Path(submission.root))
    if earlier is None:
        return
    ids = {earlier.job, *(job.job for job in read_jobs(RunFiles(Path(earlier.root))))} - {""}
    for job, state in scheduler.jobs(ids).items():
        if scheduler.is_alive(state.state) and job:
            root = shlex.quote(submission.root)
            raise LaunchError(
                f"{submission.root} has a job already: {job} is {state.state}; `trimtab status` shows it, "
                f"`trimtab cancel {root}` ends it"
            )
