"""A start of a run, from its config to what is to be opened at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import accelerate, local
from launcher.run_directory import (
    create,
    differences,
    has_trained,
    locked,
    move_aside,
    read_outcome,
    run_path,
    write_atomically,
)
from trainer.config.check import check_config
from trainer.config.files import RunFiles
from trainer.config.load import dump_config, load_config, read_run_config
from trainer.config.objective import EACH_ALONE
from trainer.config.resolve import deepspeed_config, loads_teacher
from trainer.errors import ConfigError, ExitCode, LaunchError, RunDirectoryError
from trainer.faults.parse import parse_faults

if TYPE_CHECKING:
    from launcher.plan import Plan
    from trainer.config.schema import RunConfig
from trainer.records import ModelFacts

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: a checked config and the directory of its run."""

    config: RunConfig
    root: Path
    warnings: tuple[str, ...]


def read_request(source: Path, overrides: Sequence[str] = (), ranks: int | None = None) -> Request:
    """The request from a config file, or from a run directory, whose run it then is.

    Raises:
        ConfigError: with everything that is wrong.
    """
    if ranks is not None:
        overrides = [*overrides, f"cluster.ranks_per_node={ranks}"]
    if source.is_dir():
        config = load_config(RunFiles(source).config, overrides) if overrides else read_run_config(source)
        root = Path(os.path.normpath(source.absolute()))
    else:
        config = load_config(source, overrides)
        root = None
    warnings = tuple(check_config(config, str(source)))
    parse_faults(config.faults, str(source))
    return Request(config, root or run_path(config), warnings)


@contextlib.contextmanager
def entered(request: Request, fresh: bool, say: Say) -> Iterator[int | None]:
    """The run directory, locked, holding the config of the request; yields the descriptor of the lock.

    Raises:
        RunDirectoryError: it is unwritable, in use, something else, or of a run with another config.
    """
    root = request.root
    if fresh:
        put_aside(root, say)
    create(root)
    with locked(root) as lock:
        if lock is None:
            say(f"{root} is on a file system without locks: nothing stops a second start of the same run")
        _accept_config(request, say)
        yield lock


def put_aside(root: Path, say: Say) -> None:
    """Move what an earlier run left to NAME.old-N, if there is anything.

    Raises:
        RunDirectoryError: it is unwritable, in use, or something else.
    """
    if root.is_dir() and any(root.iterdir()):
        create(root)
        with locked(root):
            say(f"moved the earlier run to {move_aside(root)}")


def _accept_config(request: Request, say: Say) -> None:
    files = RunFiles(request.root)
    if files.config.exists():
        ways_out = (
            "use another `name`, or --fresh, which moves the old directory aside, or go on with the old config: "
            f"trimtab run {shlex.quote(str(request.root))}"
        )
        try:
            found = differences(read_run_config(request.root), request.config)
        except ConfigError as error:
            if has_trained(request.root):
                text = f"{request.root} holds a config that this version does not read; {ways_out}\n{error}"
                raise RunDirectoryError(text) from error
            found = []
        if refused := [difference for difference in found if not difference.harmless]:
            if has_trained(request.root):
                lines = "\n".join(f"  {difference}" for difference in refused)
                raise RunDirectoryError(f"{request.root} holds a run with another config:\n{lines}\n{ways_out}")
            say("nothing was trained with the config in the run directory: replacing it")
        elif found:
            say("changed since the last start: " + ", ".join(map(str, found)))
    write_atomically(files.config, dump_config(request.config))


def completed_before(root: Path) -> dict[str, Any] | None:
    """The outcome of a run that has reached its end; None for any other."""
    outcome = read_outcome(root)
    return outcome if outcome and outcome["reason"] == "completed" else None


def describe_model(config: RunConfig, *, teacher: bool = False) -> ModelFacts:
    """The facts of the config's model, or of its teacher, from a process of their own: they need transformers.

    Raises:
        LaunchError: the model cannot be described; the text is what that process said.
    """
    import subprocess

    from trainer.config.facts import facts_from_json

    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        argv = [sys.executable, "-m", "trainer.model.describe", *(["--teacher"] if teacher else []), str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603 (a list, no shell)
    if done.returncode:
        raise LaunchError(done.stderr.strip() or f"the model cannot be described (exit code {done.returncode})")
    return facts_from_json(done.stdout)


def describe_teacher(config: RunConfig) -> ModelFacts | None:
    """The facts of the teacher that the ranks load; None: they load none.

    Raises as :func:`describe_model` does.
    """
    return describe_model(config, teacher=True) if loads_teacher(config) else None


def plan_of(
    config: RunConfig, facts: ModelFacts | None, num_samples: int | None = None, teacher: ModelFacts | None = None
) -> Plan:
    """The plan of `config` on this machine. Arguments as of `make_plan`.

    Raises:
        ConfigError: this device cannot do what the config asks.
    """
    from launcher.plan import make_plan
    from launcher.resources import detect_resources

    return make_plan(config, facts, detect_resources(), num_samples, teacher)


def layout_of(config: RunConfig, plan: Plan) -> accelerate.Layout:
    """Where the ranks of the plan are."""
    cluster = config.cluster
    return accelerate.Layout(cluster.nodes, cluster.ranks_per_node, plan.device, plan.threads_per_rank)


def generated_files(config: RunConfig, plan: Plan) -> dict[str, str]:
    """Names and contents of what is generated for launchers and readers."""
    layout = layout_of(config, plan)
    deepspeed = deepspeed_config(config, layout.ranks, plan.device, plan.precision)
    return {
        "plan.json": json.dumps(dataclasses.asdict(plan), indent=1, ensure_ascii=False, default=str) + "\n",
        "accelerate.yaml": accelerate.accelerate_yaml(layout),
        "deepspeed.json": json.dumps(deepspeed, indent=1) + "\n",
    }


def prepare(
    root: Path,
    lock: int | None,
    say: Say,
    requests: local.Requests | None = None,
    contained: Sequence[str] = (),
) -> None:
    """Prepare data and check the model, in a process whose progress is seen.

    Args:
        requests: to stop; held back by the caller for longer than this lasts.
        contained: the command that runs Python where the ranks will run; by default this one's.

    Raises:
        SystemExit: it ended otherwise than well, and has said why.
    """
    argv = [*(contained or (sys.executable,)), "-m", "trainer.stages.prepare", str(root)]
    inherit = () if lock is None else (lock,)
    ended = local.supervise(
        argv, os.environ, inherit=inherit, stopping="stopping the preparation", say=say, requests=requests
    )
    if ended.exit_code == 0:
        return
    if ended.stop_requested:
        say("stopped while preparing; the same command goes on")
        raise SystemExit(ExitCode.STOPPED)
    if ended.exit_code == ExitCode.USAGE:
        raise SystemExit(ExitCode.USAGE)
    say(f"preparing failed (exit code {ended.exit_code}); what it said is above, and the same command tries again")
    raise SystemExit(ExitCode.CRASHED)


def make_ready(
    request: Request,
    lock: int | None,
    say: Say,
    requests: local.Requests | None = None,
    contained: Sequence[str] = (),
    *,
    again: bool = False,
) -> Plan:
    """Everything that must be there before ranks start: data, facts of the model, plan and launcher files.

    Raises as :func:`prepare` does, and takes the same arguments.

    Args:
        again: a start before this one has prepared the data; where it is there, that is taken for granted (the ranks
            check that it is the same).
    """
    from trainer.config.facts import facts_from_json

    files = RunFiles(request.root)
    if not (again and files.data.is_file() and files.model.is_file()):
        prepare(request.root, lock, say, requests, contained)
    facts = facts_from_json(files.model.read_text(encoding="utf-8"))
    teacher = None
    if loads_teacher(request.config) and files.teacher.is_file():
        teacher = facts_from_json(files.teacher.read_text(encoding="utf-8"))
    plan = plan_of(request.config, facts, num_samples(files, request.config), teacher)
    for note in plan.notes:
        say(f"note: {note}")
    for name, text in generated_files(request.config, plan).items():
        write_atomically(request.root / name, text)
    return plan


def num_samples(files: RunFiles, config: RunConfig) -> int | None:
    """About how many samples one epoch of the prepared data has; None where its report does not say."""
    try:
        sources = json.loads(files.data.read_text(encoding="utf-8"))["report"]["sources"]
        # a text that is not packed is a sample, whatever its length
        alone = config.objective.kind in EACH_ALONE
        what, length = ("documents", 1) if alone else ("tokens", config.data.sequence_length)
        numbers: list[float] = [
            source.weight * int(report["train"][what])
            for source, report in zip(config.data.sources, sources, strict=True)
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return round(sum(numbers)) // length


def train(
    request: Request, plan: Plan, lock: int | None, say: Say, requests: local.Requests | None = None
) -> dict[str, Any]:
    """Start the ranks here, again where that is worth it, and return the outcome of the run. `requests` as in
    :func:`prepare`."""
    from launcher.supervision import Job, see_through

    layout = layout_of(request.config, plan)
    environment = {
        **os.environ,
        **accelerate.environment(layout),
        "PET_SHUTDOWN_TIMEOUT": str(accelerate.SHUTDOWN_SECONDS),
    }
    argv = accelerate.accelerate_argv(request.root)
    return see_through(
        Job(request.root, argv, environment, layout.ranks, lock), request.config.supervision, say, requests
    )


def is_exported(root: Path) -> bool:
    """Whether the run was exported, by its trainer or since."""
    return RunFiles(root).export.is_dir()


def export(
    root: Path,
    options: Sequence[str] = (),
    requests: local.Requests | None = None,
    contained: Sequence[str] = (),
) -> int:
    """Write weights and tokenizer of the newest checkpoint; the exit code of the process that does it. `requests` and
    `contained` as in :func:`prepare`."""
    argv = [*(contained or (sys.executable,)), "-m", "trainer.stages.export", str(root), *options]
    return local.supervise(argv, os.environ, stopping="stopping the export", requests=requests).exit_code


def require_startable(config: RunConfig) -> None:
    """Refuse what this machine cannot start, before anything is prepared.

    Raises:
        LaunchError: the config asks for several machines, and `trimtab run` starts one; or for GPUs that are not here.
        ConfigError: this device cannot do what the config asks.
    """
    from launcher.resources import detect_resources

    cluster = config.cluster
    if cluster.nodes > 1:
        raise LaunchError(
            f"the config asks for {cluster.nodes} machines, and `trimtab run` starts this one only; "
            "`trimtab submit` gives it to Slurm, `trimtab prepare` shows the commands for each machine, and "
            "cluster.nodes=1 runs it here"
        )
    found = len(detect_resources().gpus)
    if cluster.device == "cuda" and found < cluster.ranks_per_node:
        raise LaunchError(
            f"{cluster.ranks_per_node} ranks need a GPU each, and this machine has {found or 'none'}; "
            "lower cluster.ranks_per_node, or set cluster.device=cpu (`trimtab doctor` shows what is here)"
        )
    plan_of(config, None)
