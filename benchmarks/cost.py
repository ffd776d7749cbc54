"""What the guard costs: `python benchmarks/cost.py`.

The same model on the same samples, on two gloo ranks with one thread each, in the same processes. One contestant has
everything on: the guard, every parameter's norm in the ledger, TensorBoard, a snapshot every 25 steps with checksum
and audit. The other has the guard off, no snapshots and no telemetry at all. Blocks of 25 steps take turns. Beside the
ratio: the seconds that a snapshot blocks (the update waits for the copy), and those of a plain copy of the same state.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
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
sys.path.insert(0, str(ROOT / "benchmarks"))

BLOCK = 25
"""Steps in one turn: one snapshot each."""


def contestant(
    config: Any, ranks: Any, prepared: Any, folder: Path, stack: contextlib.ExitStack, *, everything: bool
) -> tuple[Callable[[], float], Any]:
    """A function that trains one block and gives its seconds, and the stage behind it."""
    from trainer.config.files import RunFiles
    from trainer.loop import train
    from trainer.model.describe import describe
    from trainer.saving import NoSaving
    from trainer.stages.build import Setting
    from trainer.stages.training import Training
    from trainer.stop import StopRequest
    from trainer.telemetry.silent import NoTelemetry

    changes: dict[str, Any] = {"name": f"{config.name}-{'all' if everything else 'off'}"}
    if not everything:
        changes["guard"] = config.guard.model_copy(update={"mode": "off", "checksum_every": None})
        changes["snapshots"] = config.snapshots.model_copy(update={"every": None})
    config = config.model_copy(update=changes)
    run = folder / config.name
    run.mkdir(exist_ok=True)
    setting = Setting(
        RunFiles(run), config, ranks, "cpu", "fp32", prepared, describe(config, prepared.vocabulary), StopRequest()
    )
    stage = Training(setting)
    whole = stack.enter_context(stage.parts())
    if not everything:
        whole = dataclasses.replace(whole, telemetry=NoTelemetry())

    def block() -> float:
        steps = stage.progress.position.step + BLOCK
        parts = dataclasses.replace(whole, steps=steps, evaluate=lambda _: float("nan"), saver=NoSaving())
        began = time.perf_counter()
        train(parts, stage.progress)
        return time.perf_counter() - began

    return block, stage


def plain_copy(stage: Any) -> tuple[float, int]:
    """Seconds of copying the tensors of a snapshot into warm memory, and their bytes."""
    from trainer.engine.state import read_state

    tensors, _ = read_state(stage.engine)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), sum(tensor.nbytes for tensor in tensors.values())


def rank_main(folder: Path, rounds: int) -> None:
    """One rank of the contest; rank 0 writes the seconds of each block."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    import throughput
    import torch
    import torch.distributed as dist

    from trainer.data.prepare import prepare
    from trainer.engine.ranks import join
    from trainer.telemetry.ledger import read_ledger

    torch.set_num_threads(1)
    ranks = join("cpu")
    results: dict[str, Any] = {}
    stack = contextlib.ExitStack()  # left open: the process ends at once
    for stage in (1, 2, 3):
        config = throughput.make_config(folder, stage)
        prepared = prepare(config.data, base=folder, tokenizer_fallback=None, trust_remote_code=False)
        dist.barrier()
        all_on, with_all = contestant(config, ranks, prepared, folder, stack, everything=True)
        all_off, _ = contestant(config, ranks, prepared, folder, stack, everything=False)
        contestants = {"on": all_on, "off": all_off}
        for turn in range(rounds + 1):
            for name in ("on", "off") if turn % 2 else ("off", "on"):
                dist.barrier()
                seconds = contestants[name]()
                if turn:  # the first turn warms up
                    results.setdefault(f"{stage} {name}", []).append(seconds)
        copy_seconds, num_bytes = plain_copy(with_all)
        with_all.telemetry.flush()
        if ranks.is_first:
            ledger = folder / f"{config.name}-all" / "ledger.jsonl"
            blocked = [record["seconds"] for record in read_ledger(ledger) if record["kind"] == "snapshot"]
            results[f"{stage} blocked"] = statistics.median(blocked[1:])
            results[f"{stage} copy"], results[f"{stage} bytes"] = copy_seconds, num_bytes
    if ranks.is_first:
        (folder / "seconds.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    # many engines in one process: an ordinary exit can abort in threads that are still alive
    os._exit(0)


def report(results: dict[str, Any]) -> str:
    """Markdown table; the cost is the median over turns of neighbouring blocks."""
    lines = [
        "| ZeRO | all off, ms a step | all on, ms a step | cost | a snapshot blocks | plain copy of it | size a rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in (1, 2, 3):
        on, off = results[f"{stage} on"], results[f"{stage} off"]
        cost = statistics.median(a / b for a, b in zip(on, off, strict=True)) - 1
        spread = [a / b - 1 for a, b in zip(on, off, strict=True)]
        milliseconds = [1000 * statistics.median(seconds) / BLOCK for seconds in (off, on)]
        lines.append(
            f"| {stage} | {milliseconds[0]:.1f} | {milliseconds[1]:.1f} | **{cost:+.1%}** ({min(spread):+.1%} … "
            f"{max(spread):+.1%}) | {1000 * results[f'{stage} blocked']:.1f} ms | "
            f"{1000 * results[f'{stage} copy']:.1f} ms | {results[f'{stage} bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help=f"blocks of {BLOCK} steps for each contestant")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cost.md")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        rank_main(options.rank_in, options.rounds)
        return
    with tempfile.TemporaryDirectory() as name:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        own = [str(Path(__file__)), "--rank-in", name, "--rounds", str(options.rounds)]
        subprocess.run([*torchrun, *own], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
        results = json.loads((Path(name) / "seconds.json").read_text())
    table = report(results)
    print(table)
    if options.write:
        machine = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, 2 ranks, fp32"
        work = f"3.7 M parameters, 16 × 256 tokens a step, {options.rounds} turns of {BLOCK} steps"
        text = f"# Cost of the guard\n\n{machine}, {work}.\nCommand: `python benchmarks/cost.py --write`.\n\n{table}\n"
        (ROOT / "benchmarks/results/cost.md").write_text(text)


if __name__ == "__main__":
    main()
