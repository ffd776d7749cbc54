"""Every fault of the drill, under this project and under the rules of others: `python benchmarks/recovery.py --write`.

1. Each fault in ZeRO 0 to 3 on 2 and 4 ranks: a clean run of 170 steps, and from its step 110 on a run with each
   fault, which strikes at step 140: held-out loss beside the clean run, steps lost, and whether the final state is
   that of the clean run to the bit.
2. The same faults under clipping alone and under the rules of others (benchmarks/rules.py), ZeRO 2, two ranks. They
   have seen the 110 steps before, so that all of their windows are full. What they skip is not made up for.

A small Llama (0.3 M parameters) on real text: packages of Python's own standard library. All runs of one number of
ranks are made in the same processes. On two cores about fifteen minutes; `--write`: benchmarks/results/recovery.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

BEFORE, STEPS = 110, 60
STAGES = (0, 1, 2, 3)
RULED = 2
"""The stage in which the rules of others are tried."""
TOLERANCE, MAX_LOST = 0.01, 50
PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest", "importlib", "multiprocessing", "xml")
OURS_ONLY = ("second-incident", "corrupt-snapshot", "disagreement", "broken-rank")
"""What presupposes a way back, and what no other rule has a notion of."""


def make_config(folder: Path, stage: int, steps: int = BEFORE + STEPS) -> Any:
    from trainer.config.schema import RunConfig

    library = Path(os.__file__).parent
    text = {
        "name": "recovery",
        "precision": "fp32",
        "data": {
            "sources": [{"files": [str(library / name / "**/*.py") for name in PACKAGES]}],
            "tokenizer": {"train": {"vocabulary": 512}},
            "sequence_length": 64,
            "held_out": 0.1,
            "prepared": str(folder / "data"),
        },
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            }
        },
        "batch": {"samples": 16, "micro": 4},
        "optim": {"lr": 1e-2},
        "schedule": {"duration": steps, "warmup": 10, "kind": "constant"},
        "zero": {"stage": stage},
        "guard": {"verify": 10, "checksum_every": 1},
        "snapshots": {"every": 5, "keep": 6},
        "evaluation": {"every": None, "max_samples": 256},
        "checkpoint": {"every": None},
        "telemetry": {"tensorboard": False, "console": "quiet", "weights_every": None},
        "cluster": {"device": "cpu"},
    }
    return RunConfig.model_validate_json(json.dumps(text))


def rank_main(folder: Path, stages: list[int], faults: list[str], rules: bool) -> None:
    """Everything of one number of ranks; rank 0 leaves it in folder/RANKS.json."""
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    from trainer.config.files import RunFiles
    from trainer.engine.ranks import join
    from trainer.faults.catalogue import catalogue, choose
    from trainer.stages.build import Setting
    from trainer.stages.drill import drill
    from trainer.stages.prepare import open_run, prepare_run
    from trainer.stop import StopRequest

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ranks = join("cpu")
    files = RunFiles(folder / f"{ranks.world_size}-ranks")

    def setting_of(stage: int) -> Any:
        config = make_config(folder, stage)
        if ranks.is_first and not files.data.exists():
            files.root.mkdir(exist_ok=True)
            prepare_run(files, config)
        dist.barrier()
        return Setting(files, config, ranks, "cpu", "fp32", *open_run(files, config), StopRequest())

    table: dict[str, Any] = {"drills": [], "rules": []}
    names = [name for name in faults if name]
    for stage in stages:
        exercises = choose(catalogue(STEPS, ranks.world_size, stage, BEFORE), names)
        clean, results = drill(setting_of(stage), exercises, before=BEFORE, show=ranks.is_first)
        table["drills"].append({"stage": stage, "ranks": ranks.world_size, "results": list(map(asdict, results))})
        table["drills"][-1]["clean"] = {"held_out_loss": clean.held_out_loss, "alarms": len(clean.alarms)}
    if rules:
        exercises = choose(catalogue(STEPS, ranks.world_size, RULED, BEFORE), names)
        table["rules"] = all_rules(setting_of(RULED), [each for each in exercises if each.name not in OURS_ONLY])
    if ranks.is_first:
        (folder / f"{ranks.world_size}.json").write_text(json.dumps(table))
    dist.barrier()
    sys.stdout.flush()
    # many engines in one process: an ordinary exit can abort in threads that are still alive
    os._exit(0)


def all_rules(setting: Any, exercises: Any) -> list[dict[str, Any]]:
    """Every rule under every fault."""
    from rules import RULES

    from trainer.stages.drill import training_before

    entries = []
    with training_before(setting, BEFORE) as (clean, checkpoint):
        for name, make in RULES.items():
            for each in exercises:
                rule = make(total_steps=BEFORE + STEPS, max_norm=setting.config.optim.clip)
                for attempt in clean.attempts[:BEFORE]:
                    rule.judge(attempt.stats.loss, attempt.stats.grad_norm)
                entries.append({"rule": name, "fault": each.name, **under_rule(setting, rule, each.fault, checkpoint)})
            if setting.ranks.is_first:
                print(f"{name}: done", file=sys.stderr, flush=True)
    return entries


def under_rule(setting: Any, rule: Any, fault: Any, checkpoint: Any) -> dict[str, Any]:
    """Go on as a loop with this rule would: judge, clip, step."""
    import shutil
    from dataclasses import replace

    import torch.distributed as dist

    from trainer.config.files import RunFiles
    from trainer.records import Outcome
    from trainer.stages.exercise import Unsaved, release

    files = RunFiles(setting.files.root / "rule")
    dist.barrier()
    if setting.ranks.is_first:
        shutil.rmtree(files.root, ignore_errors=True)
        files.root.mkdir()
        files.checkpoints.symlink_to(checkpoint)
    dist.barrier()
    stage = Unsaved(replace(setting, files=files), [fault])
    skipped, verdict, held_out, alarms = 0, "apply", math.nan, 0
    with stage.parts() as parts:
        for step in range(BEFORE + 1, BEFORE + STEPS + 1):
            stats = parts.engine.accumulate(next(parts.stream), attempt=step, step=step)
            verdict = rule.judge(stats.loss, stats.grad_norm)
            alarms += rule.alarmed
            if verdict == "apply":
                skipped += not parts.engine.apply(rule.clip(stats.grad_norm), parts.learning_rate(step))
            else:
                skipped += 1
                parts.engine.discard()
            if verdict == "stop":
                break
        else:
            held_out = parts.evaluate(BEFORE + STEPS)
    stage.telemetry.close(Outcome("completed", 0, "", 0, BEFORE + STEPS, None))
    release(stage.engine)
    return {
        "stopped": verdict == "stop",
        "skipped": skipped,
        "alarms": alarms,
        "held_out_loss": held_out if math.isfinite(held_out) else None,
    }


def start(folder: Path, ranks: int, options: argparse.Namespace, rules: bool) -> dict[str, Any]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    own = [str(Path(__file__)), "--rank-in", str(folder), "--stages", *map(str, options.stages)]
    own += ["--faults", *(options.faults or [""]), *(["--rules"] if rules else [])]
    subprocess.run([*torchrun, *own], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
    result: dict[str, Any] = json.loads((folder / f"{ranks}.json").read_text())
    return result


def sweep_table(drills: list[dict[str, Any]]) -> list[str]:
    """One line a fault, over all stages and numbers of ranks."""
    headings = (
        "fault", "as it should", "bits of the clean run", "bits as if never seen", "noticed after", "steps lost",
        "loss beside clean", "seconds", "what was done",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    names = list(dict.fromkeys(result["name"] for drill in drills for result in drill["results"]))
    for name in names:
        of_all = [result for drill in drills for result in drill["results"] if result["name"] == name]
        late = [r["detected_after"] for r in of_all if r["detected_after"] is not None]
        worst = [r["difference"] for r in of_all if r["difference"] is not None]
        seconds = [r["seconds_recovering"] for r in of_all if r["seconds_recovering"] is not None]
        rungs = sorted({", ".join(r["rungs"]) or "nothing" for r in of_all})
        cells = (
            name,
            f"**{sum(r['passed'] for r in of_all)} of {len(of_all)}**",
            sum(r["same_bits"] == "clean" for r in of_all),
            sum(r["same_bits"] == "excluded" for r in of_all),
            max(late) if late else "–",
            max(r["lost"] for r in of_all),
            f"{max(worst):.2%}" if worst else "–",
            f"{max(seconds):.1f}" if seconds else "–",
            "; ".join(rungs),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def rules_table(table: dict[str, Any]) -> list[str]:
    """Held-out loss beside the clean run, fault × rule; ours on the same stage and ranks."""
    rules = list(dict.fromkeys(entry["rule"] for entry in table["rules"]))
    (ours,) = [drill for drill in table["drills"] if drill["stage"] == RULED]
    clean = ours["clean"]["held_out_loss"]
    lines = [f"| fault | ours | {' | '.join(rules)} |", "|---|---|" + "---|" * len(rules)]
    for result in ours["results"]:
        if result["name"] in OURS_ONLY:
            continue
        cells = [_cell(result["held_out_loss"], clean, stopped=result["outcome"] == "halted")]
        for rule in rules:
            (entry,) = [e for e in table["rules"] if e["rule"] == rule and e["fault"] == result["name"]]
            cells.append(_cell(entry["held_out_loss"], clean, stopped=entry["stopped"]))
        lines.append(f"| {result['name']} | {' | '.join(cells)} |")
    return lines


def _cell(loss: float | None, clean: float, *, stopped: bool) -> str:
    if stopped:
        return "stops"
    if loss is None:
        return "lost (NaN)"
    difference = (loss - clean) / clean
    text = f"{difference:+.2%}"
    return f"**{text}**" if difference <= TOLERANCE else text


def failures(drills: list[dict[str, Any]]) -> list[str]:
    return [
        f"- ZeRO {drill['stage']}, {drill['ranks']} ranks, {result['name']}: {result['why']}"
        for drill in drills
        for result in drill["results"]
        if not result["passed"]
    ] + [
        f"- ZeRO {drill['stage']}, {drill['ranks']} ranks: {drill['clean']['alarms']} alarms in the clean run"
        for drill in drills
        if drill["clean"]["alarms"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES))
    parser.add_argument("--faults", nargs="+", help="names or sentences; by default all of the drill")
    parser.add_argument("--no-rules", action="store_true", help="leave the rules of others out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/recovery.md")
    parser.add_argument("--rules", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        rank_main(options.rank_in, options.stages, options.faults, options.rules)
        return
    began = time.perf_counter()
    wants_rules = not options.no_rules and RULED in options.stages
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tables = [
            start(folder, ranks, options, rules=wants_rules and ranks == options.ranks[0]) for ranks in options.ranks
        ]
    drills = [drill for table in tables for drill in table["drills"]]
    failed = failures(drills)
    settings = f"ZeRO {', '.join(map(str, options.stages))} on {' and '.join(map(str, options.ranks))} ranks"
    parts = [f"{settings}; each line is the worst of them:", "", *sweep_table(drills), ""]
    parts += ["What failed:", "", *failed] if failed else ["Nothing failed, and no run was launched again."]
    if tables[0]["rules"]:
        parts += ["", "Held-out loss beside the clean run, ZeRO 2, two ranks; bold: at most 1 % worse.", ""]
        parts += rules_table(tables[0])
    minutes = (time.perf_counter() - began) / 60
    text = "\n".join(parts)
    print(text)
    if options.write:
        machine = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, fp32, {minutes:.0f} minutes"
        head = f"# Recovery\n\n{machine}.\nCommand: `python benchmarks/recovery.py --write`.\n\n"
        (ROOT / "benchmarks/results/recovery.md").write_text(head + text + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
