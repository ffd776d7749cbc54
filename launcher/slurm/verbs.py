"""The verbs of `trimtab` that have to do with a cluster: submit, cancel, logs, results."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

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
            metavar="FILE", help="Settings of the cluster. Default: $TRIMTAB_SITE, site.yaml, ~/.config/trimtab/site.yaml."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew: an earlier run of this name is moved to NAME.old-N.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show everything, write and submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm. Its jobs look after it: they requeue it until it has ended."""
    from launcher import start
    from launcher.slurm import pipeline
    from launcher.slurm.site import load_site
    from launcher.slurm.submit import SubmitOptions, read_nodes, submit_runs

    options = SubmitOptions(load_site(site), None if nodes is None else read_nodes(nodes), time, fresh)
    if pipeline.is_pipeline(config):
        _submit_pipeline(config, overrides or (), options, dry_run)
        return
    request = start.read_request(config, overrides or (), ranks)
    requests = [request]
    if sweep or seeds:
        from launcher.slurm.sweep import expand

        requests = expand(config, overrides or (), sweep or (), seeds, ranks, dry_run=dry_run, say=_say)
    for warning in dict.fromkeys(text for each in requests for text in each.warnings):
        _say(f"warning: {warning}")
    done = submit_runs(requests, options, dry_run=dry_run, say=_say)
    root = requests[0].root if len(requests) == 1 else requests[0].root.parent
    if dry_run:
        print(f"# {shlex.join(done.command)}\n{done.script}")
        return
    kind = "job" if len(requests) == 1 else f"an array of {len(requests)} jobs"
    print(f"submitted {kind} {done.job}: {root}")
    print(f"  trimtab status {shlex.quote(str(root if len(requests) == 1 else root))}")
    if len(requests) == 1:
        print(f"  trimtab logs {shlex.quote(str(root))} --follow")


def cancel(
    run: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="At once: what was not saved yet is lost.")] = False,
) -> None:
    """End the jobs of a submitted run: it saves first, and is not requeued."""
    from launcher.slurm.cancel import cancel as end

    end(run.absolute(), at_once=now, say=print)
