"""`trimtab drill`: a short run of a config, once clean and once with each fault, and tables of what happened.

Faults that the processes survive are put into one launch (`trainer.drill`); the others, into runs of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import accelerate, local, process_drill, start
from launcher.run_directory import run_path, write_atomically
from trainer.config.resolve import arithmetic
from trainer.errors import SUPERVISED, ConfigError, ExitCode
from trainer.faults.catalogue import MIN_STEPS, REPORT, REQUEST, Exercise, catalogue, choose, process_catalogue
from trainer.faults.sentence import Kind

if TYPE_CHECKING:
    from rich.table import Table

    from launcher.plan import Plan
    from trainer.config.schema import RunConfig

MODULE = "trainer.drill"


def drill_config(config: RunConfig, steps: int, before: int) -> RunConfig:
    """`config` as a short run: its model, data, batch and guard, its schedule drawn together to `before` + `steps`
    steps, frequent snapshots, and no checkpoints.

    Raises:
        ConfigError: too few steps.
    """
    if steps < MIN_STEPS:
        raise ConfigError([("--steps", f"a drill takes at least {MIN_STEPS} steps, not {steps}")], "the command line")
    numbers = arithmetic(config, config.cluster.nodes * config.cluster.ranks_per_node)
    share = (before + steps) / numbers.steps

    def shorter(amount: int) -> int:
        return min(amount, max(1, round(amount * share))) if amount else 0

    schedule = {"unit": "steps", "duration": before + steps, "warmup": shorter(numbers.warmup_steps)}
    if config.schedule.kind == "wsd":
        schedule["decay"] = shorter(numbers.decay_steps) or 1
    guard, every = config.guard, max(1, steps // 16)
    changes: dict[str, dict[str, Any]] = {
        "schedule": schedule,
        "guard": {
            "verify": min(guard.verify, steps // 8),
            "rewarm": min(guard.rewarm, steps // 4),
            # under ZeRO 1 and 2 a flip in one rank's copy of the weights lasts for one step
            "checksum_every": 1,
        },
        "snapshots": {"every": min(config.snapshots.every or every, every), "keep": max(config.snapshots.keep, 6)},
        "evaluation": {"every": None},
        "checkpoint": {"every": None},
        "telemetry": {"tensorboard": False, "console": "quiet"},
    }
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return config.model_copy(update={"name": f"drill-{config.name}", "faults": (), **sections})


def drill(
    source: Path, overrides: Sequence[str], wanted: Sequence[str], steps: int, before: int, say: start.Say
) -> dict[str, Any]:
    """Run the drill on this machine; the content of its `drill.json`, with `root` beside it.

    Raises:
        ConfigError: the config, a fault or the number of steps is wrong.
        SystemExit: it ended early, and has said why.
    """
    request = start.read_request(source, overrides)
    config = drill_config(request.config, steps, before)
    ranks = config.cluster.nodes * config.cluster.ranks_per_node
    stage = config.zero.stage
    taught = config.distill is not None and config.distill.teacher.is_here
    offered = catalogue(steps, ranks, stage, before, with_teacher=taught)
    chosen = choose((*offered, *process_catalogue(steps, ranks)), wanted)
    inside = [each for each in chosen if not each.of_processes]
    outside = possible([each for each in chosen if each.of_processes], request.config, say)
    for warning in request.warnings:
        say(f"warning: {warning}")
    start.require_startable(config)
    root = run_path(config)
    report: dict[str, Any] = {}
    with start.entered(start.Request(config, root, ()), False, say) as lock:
        (root / REPORT).unlink(missing_ok=True)
        if inside:
            plan = start.make_ready(start.Request(config, root, ()), lock, say)
            asked = {"faults": [each.name for each in inside], "steps": steps, "before": before}
            write_atomically(root / REQUEST, json.dumps(asked, ensure_ascii=False))
            say(f"{before} steps, then {steps} steps once clean and {len(inside)} times with a fault; {root}")
            _run(config, plan, root, lock, say)
            report = json.loads((root / REPORT).read_text(encoding="utf-8"))
        if outside:
            short = drill_config(request.config, steps, 0)
            own = process_drill.process_config(short, steps, root / process_drill.FOLDER)
            report["processes"] = process_drill.drill_processes(own, outside, steps, root, say)
        write_atomically(root / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    return {"root": str(root), **report}


def possible(exercises: Sequence[Exercise], config: RunConfig, say: start.Say) -> list[Exercise]:
    """Those that `trimtab run` can end well with this config; the others are said."""
    if config.supervision.hang_seconds is not None:
        return list(exercises)
    left = [each for each in exercises if Kind.STOP not in each.fault.kinds]
    if len(left) < len(exercises):
        say("a rank that is stopped would never be noticed (supervision.hang_seconds is off): left out")
    return left


def _run(config: RunConfig, plan: Plan, root: Path, lock: int | None, say: start.Say) -> None:
    settings = accelerate.environment(start.layout_of(config, plan))
    ended = local.supervise(
        accelerate.accelerate_argv(root, module=MODULE),
        {**os.environ, **settings, SUPERVISED: "1"},
        targets=local.children_of,
        inherit=() if lock is None else (lock,),
        stopping="stopping the drill",
        say=say,
    )
    if ended.stop_requested:
        raise SystemExit(ExitCode.STOPPED)
    if ended.exit_code or not (root / REPORT).exists():
        say(f"the drill broke off (exit code {ended.exit_code}); what it said is above")
        raise SystemExit(ended.exit_code or ExitCode.CRASHED)


def parts(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a drill did in one launch, and what it did in runs of their own: what is there of it."""
    return iter([part for part in (report, report.get("processes", {})) if "results" in part])


def passed(report: dict[str, Any]) -> bool:
    """Whether every fault was recovered, or ended as it should, and nothing was done to the clean run."""
    return all(
        not part["clean"]["alarms"] and all(each["passed"] for each in part["results"]) for part in parts(report)
    )


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """One of each of the :func:`parts`."""
    if "results" in report:
        yield table(report)
    if "processes" in report:
        yield process_drill.table(report["processes"])


def table(report: dict[str, Any]) -> Table:
    """Fault × outcome, of what was done in one launch."""
    from rich.table import Table

    clean = report["clean"]
    ranks = "1 rank" if report["ranks"] == 1 else f"{report['ranks']} ranks"
    place = f"{report['steps']} steps after {report['before']}, ZeRO {report['stage']}, {ranks}"
    title = f"{place}, held-out loss of the clean run {_number(clean['held_out_loss'], 4)}"
    result = Table(title=title, title_justify="left", title_style="")
    for heading in ("fault", "outcome"):
        result.add_column(heading, no_wrap=True)
    for heading in ("noticed after", "steps lost", "seconds", "held-out loss"):
        result.add_column(heading, justify="right")
    result.add_column("what was done")
    result.add_column("same bits as")
    for each in report["results"]:
        difference = "" if each["difference"] is None else f" ({each['difference']:.2%})"
        result.add_row(
            each["name"],
            ("✓ " if each["passed"] else "✗ ") + each["outcome"],
            "" if each["detected_after"] is None else str(each["detected_after"]),
            str(each["lost"]),
            _number(each["seconds_recovering"], 1),
            _number(each["held_out_loss"], 4) + difference,
            ", ".join(each["rungs"]),
            _BITS.get(each["same_bits"], ""),
        )
    return result


_BITS = {"clean": "the clean run", "excluded": "a run without that data"}


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def closing(report: dict[str, Any]) -> list[str]:
    """What failed, in sentences, and where more is told."""
    results = [each for part in parts(report) for each in part["results"]]
    lines = [f"the clean run raised an alarm: {alarm}" for part in parts(report) for alarm in part["clean"]["alarms"]]
    for each in results:
        if not each["passed"]:
            lines.append(f"{each['name']} failed: {each['why']}")
            lines.append(f"  {each['sentence']}")
    failed = sum(not each["passed"] for each in results)
    count = len(results)
    lines.append(f"{count - failed} of {count} faults ended as they should; ledgers and incidents: {report['root']}")
    return lines
