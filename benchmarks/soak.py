"""A long run in random faults: do all ranks see and decide the same, attempt by attempt? `python benchmarks/soak.py`.

Faults of every kind strike a small model one after the other, one in about every 25 steps. Each rank notes what it saw
and decided in every attempt and every rollback; at the end the notes are compared to the last digit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def rank_main(folder: Path, options: argparse.Namespace) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist
    from recovery import make_config

    from trainer.config.files import RunFiles
    from trainer.engine.ranks import join
    from trainer.faults.catalogue import random_faults
    from trainer.stages.build import Setting
    from trainer.stages.exercise import exercise
    from trainer.stages.prepare import open_run, prepare_run
    from trainer.stop import StopRequest

    torch.set_num_threads(1)
    ranks = join("cpu")
    config = make_config(folder, options.stage, options.steps)
    guard = config.guard.model_copy(update={"max_incidents": options.steps})
    config = config.model_copy(update={"guard": guard})
    files = RunFiles(folder / "run")
    if ranks.is_first:
        files.root.mkdir()
        prepare_run(files, config)
    dist.barrier()
    setting = Setting(files, config, ranks, "cpu", "fp32", *open_run(files, config), StopRequest())
    faults = random_faults(options.seed, options.steps, ranks.world_size, options.stage)
    run = exercise(setting, faults, name="soak")
    notes: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(notes, run.decisions())
    if ranks.is_first:
        result = {
            "ended": run.ended,
            "message": run.message,
            "attempts": len(run.attempts),
            "steps": sum(attempt.applied for attempt in run.attempts)
            - sum(r.from_step - r.to_step for r in run.rewinds),
            "faults": len(faults),
            "alarms": len(run.alarms),
            "rollbacks": len(run.rewinds),
            "disagreements": sum(not attempt.stats.agree for attempt in run.attempts),
            "equal": all(note == notes[0] for note in notes),
            "held_out_loss": run.held_out_loss,
            "minutes": run.seconds / 60,
        }
        (folder / "soak.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    # an ordinary exit can abort in threads that are still alive
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/soak.md")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        rank_main(options.rank_in, options)
        return
    with tempfile.TemporaryDirectory() as name:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(options.ranks),
        ]
        own = [str(Path(__file__)), "--rank-in", name, "--steps", str(options.steps)]
        own += ["--stage", str(options.stage), "--seed", str(options.seed)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, *own], check=True, env=environment, stdout=sys.stderr)
        found = json.loads((Path(name) / "soak.json").read_text())
    lines = [
        f"- {found['steps']} steps stand after {found['attempts']} attempts; it {found['ended']} {found['message']}",
        f"- {found['faults']} faults, {found['alarms']} attempts that were not applied, {found['rollbacks']} rollbacks",
        f"- what the ranks saw and decided is {'equal' if found['equal'] else 'NOT EQUAL'} in every attempt; "
        f"{found['disagreements']} attempts at which a digest of a rank differed",
        f"- held-out loss {found['held_out_loss']:.4f}, {found['minutes']:.1f} minutes",
    ]
    print("\n".join(lines))
    if options.write:
        machine = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.ranks} ranks"
        machine += f", ZeRO {options.stage}, seed {options.seed}"
        command = f"Command: `python benchmarks/soak.py --steps {options.steps} --write`."
        text = "\n".join(["# Soak", "", f"{machine}.", command, "", *lines, ""])
        (ROOT / "benchmarks/results/soak.md").write_text(text)
    sys.exit(not found["equal"] or found["disagreements"] > 0 or found["ended"] != "completed")


if __name__ == "__main__":
    main()
