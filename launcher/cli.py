"""`trimtab`: the command line. Imports what a verb needs when the verb runs, so that help is there at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.evaluate import evaluate
from launcher.slurm import verbs
from trainer.errors import LaunchError, TrimtabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType

    from launcher import start

app = typer.Typer(
    name="trimtab",
    help="Trains language models across many nodes and keeps the run on course by itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the directory of a run.")]
RunnableArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file of a run or of a pipeline, or the directory of a run.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Options on top of the config: optim.lr=1e-3")
]
RanksOption = Annotated[
    int | None, typer.Option("--ranks", min=1, metavar="N", help="Processes on each machine (cluster.ranks_per_node).")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Start anew: an earlier run of this name is moved to NAME.old-N.")
]


def _say(text: str) -> None:
    """Tell the user, beside whatever the output is."""
    print(text, file=sys.stderr, flush=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _show(result: str | RenderableType) -> None:
    """Print what was asked for."""
    if isinstance(result, str):
        print(result, flush=True)
    else:
        _console().print(result)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trimtab {version('trimtab')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: RunnableArgument,
    overrides: OverridesArgument = None,
    ranks: RanksOption = None,
    fresh: FreshOption = False,
) -> None:
    """Train on this machine: a run, or the stages of a pipeline. The same command again goes on where it stopped."""
    from launcher import here, start
    from launcher.pipelines.stages import is_pipeline

    if is_pipeline(config):
        raise typer.Exit(_run_pipeline(config, overrides or (), ranks, fresh))
    request = start.read_request(config, overrides or (), ranks)
    _warn(request)
    ended = here.run(request, _say, _show, fresh=fresh)
    if ended.before:
        _say("There is nothing left to do; --fresh trains it anew.")
    raise typer.Exit(int(ended.outcome["exit_code"]))


def _run_pipeline(path: Path, overrides: Sequence[str], ranks: int | None, fresh: bool) -> int:
    from launcher.pipelines.here import run_pipeline
    from launcher.pipelines.stages import read_pipeline

    if ranks is not None:
        raise LaunchError(f"{path} is a pipeline: ranks are given in it, by stage")
    pipeline = read_pipeline(path, overrides, here=True)
    for stage in pipeline.stages:
        for request in stage.requests:
            _warn(request)
    return run_pipeline(pipeline, _say, _show, fresh=fresh)


@app.command()
def plan(config: ConfigArgument, overrides: OverridesArgument = None, ranks: RanksOption = None) -> None:
    """Show what a run would be: ranks, batch, memory, steps, and the files for the launchers. Starts nothing."""
    from launcher import start
    from launcher.plan import render_plan

    request = start.read_request(config, overrides or (), ranks)
    _warn(request)
    facts, teacher = start.describe_model(request.config), start.describe_teacher(request.config)
    the_plan = start.plan_of(request.config, facts, teacher=teacher)
    console = _console()
    console.print(render_plan(the_plan))
    for name, text in start.generated_files(request.config, the_plan).items():
        if name != "plan.json":
            console.rule(f"{request.root.name}/{name}", align="left")
            print(text, flush=True)


@app.command()
def prepare(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    ranks: RanksOption = None,
    fresh: FreshOption = False,
) -> None:
    """Write the run directory and prepare its data, then show the other ways to start it."""
    from launcher import accelerate, start

    request = start.read_request(config, overrides or (), ranks)
    _warn(request)
    with start.entered(request, fresh, _say) as lock:
        the_plan = start.make_ready(request, lock, _say)
    layout = start.layout_of(request.config, the_plan)
    print(f"{request.root} is ready. Any of these starts it, and goes on with it:\n")
    if layout.nodes == 1:
        print(f"  # trimtab\n  {accelerate.Command('trimtab', ('trimtab', 'run', str(request.root))).shell()}\n")
    else:
        print(f"On each of the {layout.nodes} machines; NODE_RANK counts them from 0, MASTER_ADDR is the first one.\n")
    for command in accelerate.ways_to_start(layout, request.root):
        print(f"  # {command.title}\n  {command.shell()}\n")


@app.command()
def teach(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    ranks: RanksOption = None,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME", help="train (default) or held_out; may be given again."),
    ] = None,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Shard the teacher over the ranks (zero3), where it is too large for one.")
    ] = False,
) -> None:
    """Write what a teacher predicts, for `distill.teacher.place: cache`. The same command goes on where it stopped."""
    from launcher import start
    from launcher.teach import teach as write_knowledge

    request = start.read_request(config, overrides or (), ranks)
    _warn(request)
    raise typer.Exit(write_knowledge(request, split or ("train",), sharded, _say))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="[RUNS]", help="The folder of runs, or one run.")] = Path("runs"),
) -> None:
    """All runs of a folder: state, job, step, loss, speed, goodput; of one run also its jobs, and where time went."""
    from launcher.status import overview

    shown = overview(folder)
    if shown is None:
        _say(f"there are no runs in {folder}")
        return
    _console().print(shown)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    once: Annotated[bool, typer.Option("--once", help="Show where it stands and leave.")] = False,
) -> None:
    """Watch a run from its ledger, live. Ctrl-C leaves; the run goes on."""
    from launcher.watch import watch_run

    watch_run(run, _console(), once=once)


@app.command()
def verify(run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")]) -> None:
    """Check every file of every checkpoint of a run, and say what can be resumed."""
    from launcher import verify as verifying

    result = verifying.verify(run)
    if result.checkpoints or result.leftovers:
        _console().print(verifying.table(result))
    print(verifying.closing(result))
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="A checkpoint of the run. Default: the best, else the newest.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to. Default: RUN/export.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="fp32, bf16 or fp16. Default: as it was trained.")
    ] = None,
    average: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Average the last N healthy checkpoints.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The low-rank adapters alone, as peft reads them, into RUN/adapter.")
    ] = False,
    no_ema: Annotated[bool, typer.Option("--no-ema", help="The weights themselves, not their moving average.")] = False,
) -> None:
    """Write weights and tokenizer as `from_pretrained` loads them."""
    from launcher import start
    from trainer.config.load import read_run_config

    read_run_config(run)
    given = (("--checkpoint", checkpoint), ("--output", output), ("--dtype", dtype), ("--average", average))
    options = [f"{name}={value}" for name, value in given if value is not None]
    options += [name for name, chosen in (("--adapter", adapter), ("--no-ema", no_ema)) if chosen]
    raise typer.Exit(start.export(run.absolute(), options))


app.command()(evaluate)


@app.command()
def drill(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    faults: Annotated[
        list[str] | None,
        typer.Option(
            "--faults", metavar="NAME", help="Faults by name (a,b,c), or one as a sentence; may be given again."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of each run; its fault is in the middle.")] = 60,
    before: Annotated[int, typer.Option(min=0, metavar="N", help="Steps of training before them, made once.")] = 120,
    ranks: RanksOption = None,
    stage: Annotated[int | None, typer.Option(min=0, max=3, metavar="Z", help="ZeRO stage (zero.stage).")] = None,
) -> None:
    """Put faults into a short run of this config, one after the other, and show how each ends.

    Those that kill, stop or starve processes take about half a minute each, in runs of their own.
    """
    from launcher import drill as drills

    chosen = [*(overrides or ()), *(() if stage is None else (f"zero.stage={stage}",))]
    chosen += [] if ranks is None else [f"cluster.ranks_per_node={ranks}"]
    report = drills.drill(config, chosen, faults or (), steps, before, _say)
    for table in drills.tables(report):
        _console().print(table)
    for line in drills.closing(report):
        print(line, flush=True)
    raise typer.Exit(0 if drills.passed(report) else 1)


@app.command()
def quarantine(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    text: Annotated[bool, typer.Option("--text", help="Also show how their worst samples begin.")] = False,
) -> None:
    """Batches that a run leaves out: which, since when, and why."""
    from launcher.quarantine import quarantined, shown, summary

    entries = quarantined(run)
    if entries:
        _console().print(shown(entries, text))
    print(summary(entries))


@app.command()
def judge(
    ledger: Annotated[
        Path,
        typer.Argument(metavar="LEDGER", help="A run, its ledger, JSON lines, CSV, or TensorBoard events."),
    ],
    tag: Annotated[
        str | None, typer.Option(metavar="NAME", help="Tag, column or field of the loss. Default: the first 'loss'.")
    ] = None,
    spike: Annotated[float, typer.Option(min=0.1, help="guard.spike to judge by.")] = 8.0,
    drift: Annotated[float, typer.Option(min=0.1, help="guard.drift to judge by.")] = 10.0,
) -> None:
    """Replay a saved loss curve: where would the guard have acted?"""
    from launcher import judge as judging
    from launcher.curve import read_curve

    curve = read_curve(ledger, tag)
    actions = judging.judge(curve, spike, drift)
    if actions:
        _console().print(judging.table(actions))
    print(judging.summary(curve, actions))


@app.command()
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Also let two processes talk to each other.")] = False,
    folder: Annotated[Path, typer.Option("--runs", metavar="RUNS", help="Where runs will be written.")] = Path("runs"),
) -> None:
    """What this machine offers, what will not work on it, and why."""
    import os

    from launcher.doctor import examine, table

    findings = examine(folder, os.environ, deep)
    _console().print(table(findings))
    if any(finding.level == "wrong" for finding in findings):
        raise typer.Exit(1)


app.command()(verbs.submit)
app.command()(verbs.cancel)
app.command()(verbs.logs)
app.command()(verbs.results)
app.command()(verbs.nodes)


def _warn(request: start.Request) -> None:
    for warning in request.warnings:
        _say(f"warning: {warning}")


def main() -> None:
    """The entry point: an error that is meant for the user is its sentence and its exit code; any other keeps its
    traceback."""
    try:
        app()
    except TrimtabError as error:
        _say(f"trimtab: {error}")
        sys.exit(int(error.exit_code))


if __name__ == "__main__":
    main()
