"""What a save costs: `python benchmarks/save.py`.

A Llama-type model of more than 100 M parameters in training on two gloo ranks with one thread each. In turns, a
checkpoint is written by DeepSpeed's own `save_checkpoint` and by ours, both of the same engine at the same state, each
while two steps follow. Reported: the seconds for which training stands still, those until the checkpoint is whole on
disk (DeepSpeed writes no manifest and does not wait for the disk: one `sync` of the file system is added to both, and
stated apart), what these take beside two without a save, and the bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STEPS = 2
"""That follow a save."""
LENGTH, SAMPLES = 16, 2


def make_config(folder: Path, stage: int, hidden: int) -> Any:
    from trainer.config.schema import RunConfig

    return RunConfig.model_validate(
        {
            "name": f"save{stage}",
            "precision": "fp32",
            "data": {
                "sources": ({"stdlib": True},),
                "tokenizer": {"train": {"vocabulary": 4096}},
                "sequence_length": LENGTH,
                "prepared": str(folder / "data"),
            },
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": hidden,
                    "intermediate_size": 11 * hidden // 4,
                    "num_hidden_layers": 14,
                    "num_attention_heads": 12,
                    "max_position_embeddings": LENGTH,
                    "tie_word_embeddings": True,
                }
            },
            "batch": {"samples": SAMPLES, "micro": 1},
            "optim": {"lr": 1e-4},
            "schedule": {"duration": 1_000_000, "kind": "constant"},
            "zero": {"stage": stage},
            "guard": {"checksum_every": None},
            # a save makes its own copy: the ordinary case where no snapshot was taken at the same step
            "snapshots": {"every": None},
            "checkpoint": {"every": STEPS, "keep": 1},
            "telemetry": {"weights_every": None, "console": "quiet", "tensorboard": False},
            "cluster": {"device": "cpu", "ranks_per_node": 2},
        }
    )


class Contest:
    """One engine in training, and the ways to save it.

    Attributes:
        seconds: by what was measured, over the turns.
    """

    def __init__(self, config: Any, ranks: Any, prepared: Any, folder: Path, stack: contextlib.ExitStack):
        from trainer.config.files import RunFiles
        from trainer.model.describe import describe
        from trainer.saving import NoSaving
        from trainer.stages.build import Setting
        from trainer.stages.training import Training
        from trainer.stop import StopRequest

        run = folder / config.name
        run.mkdir(exist_ok=True)
        facts = describe(config, prepared.vocabulary)
        self.stage = Training(Setting(RunFiles(run), config, ranks, "cpu", "fp32", prepared, facts, StopRequest()))
        parts = stack.enter_context(self.stage.parts())
        self.saver = parts.saver
        self.parts = dataclasses.replace(parts, evaluate=lambda _: float("nan"), saver=NoSaving())
        self.folder = folder / "theirs"
        self.parameters = facts.num_parameters
        self.seconds: dict[str, list[float]] = {}

    def steps(self) -> float:
        """Seconds of the steps that follow a save, or none."""
        from trainer.loop import train

        parts = dataclasses.replace(self.parts, steps=self.stage.progress.position.step + STEPS)
        began = time.perf_counter()
        train(parts, self.stage.progress)
        return time.perf_counter() - began

    def nothing(self) -> dict[str, float]:
        return {"steps": self.steps()}

    def theirs(self) -> dict[str, float]:
        began = time.perf_counter()
        self.stage.engine.deepspeed.save_checkpoint(str(self.folder), tag="one", save_latest=False)
        blocked = time.perf_counter() - began
        os.sync()
        on_disk = time.perf_counter() - began
        result = {"blocked": blocked, "whole": blocked, "on disk": on_disk, "steps": self.steps()}
        return result | {"bytes": float(bytes_of(self.folder))}

    def ours(self) -> dict[str, float]:
        position = self.stage.progress.position
        self.saver.due(position)
        steps = self.steps()
        self.saver.settle()
        folder = self.stage.setting.files.root / self.saver.newest
        return {"blocked": self.blocked(), "steps": steps, "bytes": float(bytes_of(folder))}

    def blocked(self) -> float:
        """Seconds that training stood still for the last save: for the request, and in the update for its copy."""
        from trainer.telemetry.ledger import last_record

        self.stage.telemetry.flush()
        record = last_record(self.stage.setting.files.ledger, lambda record: record["kind"] == "checkpoint")
        return record["seconds"] if record else float("nan")

    def ours_alone(self) -> dict[str, float]:
        """Until it is whole while nothing else runs: written, synced, committed."""
        position = self.stage.progress.position
        began = time.perf_counter()
        self.saver.due(position)
        self.saver.settle()
        whole = time.perf_counter() - began
        os.sync()
        return {"whole": whole, "on disk": time.perf_counter() - began}


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rank_main(folder: Path, rounds: int, hidden: int) -> None:
    """One rank of the contest; rank 0 writes the seconds."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    from trainer.data.prepare import prepare
    from trainer.engine.ranks import join

    torch.set_num_threads(1)
    ranks = join("cpu")
    results: dict[str, Any] = {}
    for stage in (1, 2, 3):
        stack = contextlib.ExitStack()
        config = make_config(folder, stage, hidden)
        prepared = prepare(config.data, base=folder, tokenizer_fallback=None, trust_remote_code=False)
        dist.barrier()
        contest = Contest(config, ranks, prepared, folder, stack)
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "nothing": contest.nothing,
            "theirs": contest.theirs,
            "ours": contest.ours,
            "alone": contest.ours_alone,
        }
        results["parameters"] = contest.parameters
        for turn in range(rounds + 1):
            for name in ways if turn % 2 else reversed(ways):
                dist.barrier()
                if ranks.is_first:
                    shutil.rmtree(contest.folder, ignore_errors=True)
                    os.sync()
                dist.barrier()
                measured = ways[name]()
                if turn:  # the first turn warms up
                    for what, value in measured.items():
                        results.setdefault(f"{stage} {name} {what}", []).append(value)
        if ranks.is_first:
            (folder / "seconds.json").write_text(json.dumps(results))
        contest.stage.engine.deepspeed.destroy()
        del contest, ways
        dist.barrier()
    sys.stdout.flush()
    # many engines in one process: an ordinary exit can abort in threads that are still alive
    os._exit(0)


def report(results: dict[str, Any]) -> str:
    """Markdown tables: medians over the turns."""

    def median(name: str) -> float:
        return statistics.median(results[name])

    lines = [
        "| ZeRO | | training stands still | share of DeepSpeed's | whole after | with a sync of the disk | "
        f"{STEPS} steps that follow | bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage in (1, 2, 3):
        bare = median(f"{stage} nothing steps")
        theirs, ours = median(f"{stage} theirs blocked"), median(f"{stage} ours blocked")
        lines.append(
            f"| {stage} | DeepSpeed `save_checkpoint` | {1000 * theirs:,.0f} ms | | {theirs:.2f} s | "
            f"{median(f'{stage} theirs on disk'):.2f} s | {median(f'{stage} theirs steps') / bare:.2f} × | "
            f"{median(f'{stage} theirs bytes') / 1e6:,.0f} MB |"
        )
        lines.append(
            f"| {stage} | ours | {1000 * ours:,.1f} ms | **1/{theirs / ours:,.0f}** | "
            f"{median(f'{stage} alone whole'):.2f} s | {median(f'{stage} alone on disk'):.2f} s | "
            f"{median(f'{stage} ours steps') / bare:.2f} × | {median(f'{stage} ours bytes') / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768, help="width of the model; 768 makes 103 M parameters")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/save.md")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        rank_main(options.rank_in, options.rounds, options.hidden)
        return
    with tempfile.TemporaryDirectory() as name:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        own = [str(Path(__file__)), "--rank-in", name, "--rounds", str(options.rounds), "--hidden", str(options.hidden)]
        subprocess.run([*torchrun, *own], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
        results = json.loads((Path(name) / "seconds.json").read_text())
    table = report(results)
    print(table)
    if options.write:
        machine = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, 2 ranks, fp32"
        work = f"{results['parameters'] / 1e6:.0f} M parameters, medians of {options.rounds} turns"
        text = (
            f"# Cost of a save\n\n{machine}, {work}.\nCommand: `python benchmarks/save.py --write`.\n\n{table}\n\n"
            f"`whole`: all files written, synced and committed (ours); the call has returned (DeepSpeed, which syncs "
            f"nothing). `stands still`: the call, and what the next update waits for the copy.\n"
        )
        (ROOT / "benchmarks/results/save.md").write_text(text)


if __name__ == "__main__":
    main()
