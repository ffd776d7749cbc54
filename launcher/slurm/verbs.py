"""The verbs of `trimtab` that have to do with a cluster: submit, cancel, logs, results."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.words import visible
from trainer.errors import LaunchError

if TYPE_CHECKING:
    from launcher.pipelines.stages import Pipeline, Stage
    from launcher.slurm.submit import SubmitOptions, Submitted
    from launcher.start import Request

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def submit(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file of a run or of a pipeline, or the directory of a run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Options on top of the config: optim.lr=1e-3")
    ] = None,
    nodes: Annotated[
        str | None, typer.Option(metavar="N[-M]", help="Nodes, or as many of a range as there are (cluster.nodes).")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes on each node (cluster.ranks_per_node).")
    ] = None,
    time: Annotated[str | None, typer.Option(metavar="T", help="Time limit of one job: 24:00:00.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="a.b=x,y", help="A run for each value, as an array; several options give all pairs."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="A run for each of N seeds.")] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings of the cluster. Default: $TRIMTAB_SITE, ./site.yaml, ~/.config/trimtab/site.yaml.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew: an earlier run of this name is moved to NAME.old-N.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show everything, write and submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm. Its jobs look after it: they requeue it until it has ended."""
    from launcher import comparison, start
    from launcher.pipelines.stages import is_pipeline
    from launcher.pipelines.sweep import expand
    from launcher.slurm.site import load_site
    from launcher.slurm.submit import SubmitOptions, read_nodes, submit_runs

    options = SubmitOptions(load_site(site), None if nodes is None else read_nodes(nodes), time, fresh)
    if is_pipeline(config):
        if sweep or seeds or nodes or ranks or time:
            raise LaunchError(f"{config} is a pipeline: nodes, ranks, time, sweeps and seeds are given in it, by stage")
        _submit_pipeline(config, overrides or (), options, dry_run)
        return
    if sweep or seeds:
        requests = expand(config, overrides or (), sweep or (), seeds, ranks, dry_run=dry_run, say=_say)
    else:
        requests = [start.read_request(config, overrides or (), ranks)]
    for warning in dict.fromkeys(text for each in requests for text in each.warnings):
        _say(f"warning: {warning}")
    for request in requests:
        if comparison.is_wanted(request.config):
            _say(f"note: {comparison.on_slurm(request)}")
    done = submit_runs(requests, options, dry_run=dry_run, say=_say)
    if dry_run:
        _show(done)
        return
    single = len(requests) == 1
    root = requests[0].root if single else requests[0].root.parent
    print(f"submitted {'job' if single else f'an array of {len(requests)} jobs'} {done.job}: {visible(str(root))}")
    verbs = ("status", "logs --follow", "cancel") if single else ("status", "results")
    for verb in verbs:
        print(f"  trimtab {verb} {shlex.quote(str(root))}")


def _show(done: Submitted) -> None:
    """What a dry run would have done."""
    print(f"# {shlex.join(done.command)}\n{done.script}")


def _submit_pipeline(path: Path, overrides: Sequence[str], options: SubmitOptions, dry_run: bool) -> None:
    from launcher import comparison
    from launcher.pipelines.stages import read_pipeline
    from launcher.slurm import scheduler
    from launcher.slurm.pipeline import submit_pipeline
    from launcher.slurm.submit import submit_runs

    pipeline = read_pipeline(path, overrides)
    for request in (request for stage in pipeline.stages for request in stage.requests):
        if comparison.is_wanted(request.config):
            _say(f"note: {comparison.on_slurm(request)}")

    def submit_stage(stage: Stage, requests: Sequence[Request], after: Sequence[str]) -> str | None:
        own = replace(options, nodes=stage.nodes, time=stage.time or options.time)
        return submit_runs(requests, own, after=after, before=_before(pipeline, stage), say=_say).job

    def states(ids: Sequence[str]) -> dict[str, str]:
        alive = {job: state for job, state in scheduler.jobs(ids).items() if scheduler.is_alive(state.state)}
        return {job: "NEVER" if "Never" in state.reason else state.state for job, state in alive.items()}

    if not dry_run:
        scheduler.require()
    jobs = submit_pipeline(
        pipeline,
        submit_stage,
        states if scheduler.available() else lambda _: {},
        scheduler.cancel,
        fresh=options.fresh,
        dry_run=dry_run,
        say=_say,
    )
    if dry_run:
        return
    listed = ", ".join(f"{stage} {job}" for stage, job in jobs.items()) or "nothing: all its stages have ended well"
    print(f"submitted {listed}: {visible(str(pipeline.root))}")
    print(f"  trimtab status {shlex.quote(str(pipeline.root))}")


def _before(pipeline: Pipeline, stage: Stage) -> tuple[str, ...]:
    """Run directories of the stages that a stage waits for."""
    roots = {each.name: each.root for each in pipeline.stages}
    return tuple(str(roots[name]) for name in stage.after)


def cancel(
    run: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="At once: what was not saved yet is lost.")] = False,
) -> None:
    """End the jobs of a submitted run: it saves first, and is not requeued."""
    from launcher.slurm.cancel import cancel as end

    end(run.absolute(), at_once=now, say=print)


def logs(
    run: RunArgument,
    job: Annotated[str | None, typer.Option(metavar="ID", help="Of this job. Default: the newest.")] = None,
    node: Annotated[int | None, typer.Option(min=0, metavar="N", help="Only what ranks on the N-th node said.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, metavar="N", help="So many of the last lines.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
) -> None:
    """What the jobs of a submitted run printed."""
    from launcher.logs import logs as read

    with contextlib.suppress(KeyboardInterrupt):
        shown_lines = read(
            run.absolute(), job=job, node=node, lines=lines, follow=follow, colours=sys.stdout.isatty(), say=_say
        )
        for line in shown_lines:
            print(line, flush=follow)


def results(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A sweep, a pipeline, or any folder of runs.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
) -> None:
    """Runs side by side: what differs in their options and how well each did, best first."""
    from launcher import results as side_by_side
    from launcher.slurm.standing import ask

    states, note = ask(side_by_side.roots_of(folder))
    found = side_by_side.results(folder, states=states)
    if note:
        _say(note)
    if not found:
        _say(f"there are no runs in {folder}")
    elif as_json:
        print(side_by_side.as_json(found))
    elif as_csv:
        print(side_by_side.as_csv(found), end="")
    else:
        from rich.console import Console

        Console(highlight=False, markup=False, emoji=False).print(side_by_side.table(found))


def nodes(
    folder: Annotated[Path, typer.Argument(metavar="[RUNS]", help="The folder of runs.")] = Path("runs"),
    forgive: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="Use this node again; may be given again.")
    ] = None,
) -> None:
    """Nodes that are left out, because they were not fit when a run was to start on them: why, and how long."""
    import time

    from launcher.slurm import exclusion
    from launcher.status import age

    for node in forgive or ():
        known = exclusion.forgive(folder, node)
        print(f"{node} is used again" if known else f"{node} was not left out")
    now = time.time()
    left_out = exclusion.excluded(folder, now)
    for name, each in left_out.items():
        print(f"{name}  for {age(each.until - now)} more, found out by {visible(each.run)}: {visible(each.why)}")
    if not left_out:
        print(f"no node is left out by the runs in {folder}")
