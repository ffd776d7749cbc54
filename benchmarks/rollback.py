"""Going back inside the live run beside launching it again from disk: `python benchmarks/rollback.py --write`.

One run, two gloo ranks with one thread each, a Llama of 3.7 M parameters. A bit flips in a weight a few times: the
ledger tells the seconds from the verdict until the state is back, and until the next step is done. Then the run is
asked to stop, which saves it, and the same command starts it again: the seconds from that command to its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FLIPS = (30, 55, 80)
STEPS = 4000
"""Far beyond what is needed: the run is stopped."""


def config_of(folder: Path) -> dict[str, Any]:
    library = Path(os.__file__).parent
    return {
        "name": "rollback",
        "runs": str(folder / "runs"),
        "precision": "fp32",
        "data": {
            "sources": [{"files": [str(library / name / "**/*.py") for name in ("asyncio", "email", "unittest")]}],
            "tokenizer": {"train": {"vocabulary": 4096}},
            "sequence_length": 128,
            "held_out": 0.05,
            "prepared": str(folder / "data"),
        },
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 256,
                "intermediate_size": 704,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
            }
        },
        "batch": {"samples": 8, "micro": 4},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": STEPS, "warmup": 10, "kind": "constant"},
        "guard": {"verify": 5},
        "snapshots": {"every": 5},
        "evaluation": {"every": None},
        "checkpoint": {"every": None},
        "telemetry": {"tensorboard": False, "console": "quiet", "weights_every": None},
        "cluster": {"device": "cpu", "ranks_per_node": 2, "threads_per_rank": 1},
        "faults": [f"at(step={step}).flip_bit_in_weight()" for step in FLIPS],
    }


def records(ledger: Path) -> list[dict[str, Any]]:
    if not ledger.exists():
        return []
    # a line that is being written is not there yet
    lines = ledger.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def until(process: subprocess.Popen[bytes], ledger: Path, start: int, step: int) -> float:
    """Wait for an applied step of a start of the run; the time at which it was seen."""
    while process.poll() is None:
        for record in records(ledger):
            if (
                record["kind"] == "attempt"
                and record["start"] == start
                and record["applied"]
                and record["step"] >= step
            ):
                return time.perf_counter()
        # the look itself must not slow the run down
        time.sleep(0.05)
    raise SystemExit(f"the run ended early (exit code {process.returncode})")


@contextlib.contextmanager
def running(config: Path) -> Any:
    process = subprocess.Popen([sys.executable, "-m", "launcher.cli", "run", str(config)], cwd=ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()


def measure(folder: Path) -> dict[str, Any]:
    config = folder / "config.yaml"
    config.write_text(json.dumps(config_of(folder)))
    ledger = folder / "runs/rollback/ledger.jsonl"
    with running(config) as process:
        until(process, ledger, 1, FLIPS[-1] + 15)
    first = records(ledger)
    began = time.perf_counter()
    with running(config) as process:
        relaunch = until(process, ledger, 2, 1) - began
    attempts = [record for record in first if record["kind"] == "attempt"]
    rewinds = [record for record in first if record["kind"] == "rewind"]
    step = statistics.median(record["seconds"] for record in attempts if record["applied"])
    to_next = []
    for rewind in rewinds:
        place = next(i for i, record in enumerate(attempts) if record["attempt"] == rewind["attempt"])
        after, verdict = attempts[place + 1], attempts[place]
        to_next.append(seconds_of(after["time"]) - seconds_of(verdict["time"]))
    checkpoints = [record["num_bytes"] for record in first if record["kind"] == "checkpoint"]
    return {
        "step": step,
        "back": statistics.median(rewind["seconds"] for rewind in rewinds),
        "to_next": statistics.median(to_next),
        "rollbacks": len(rewinds),
        "relaunch": relaunch - step,
        "bytes": checkpoints[-1] if checkpoints else 0,
    }


def seconds_of(stamp: str | float) -> float:
    return stamp if isinstance(stamp, float | int) else datetime.datetime.fromisoformat(stamp).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/rollback.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name))
    ratio = found["relaunch"] / found["back"]
    rows = [
        ("one step", f"{1000 * found['step']:.0f} ms"),
        ("from the verdict until the state is back", f"{1000 * found['back']:.1f} ms"),
        ("from the verdict until the next step is done", f"{1000 * found['to_next']:.0f} ms"),
        ("from the command to launch it again to where the next step begins", f"{found['relaunch']:.1f} s"),
        ("launching again ÷ going back in memory", f"**{ratio:.0f} ×**"),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows)])
    print(table)
    if options.write:
        machine = (
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, 2 ranks, fp32, 3.7 M parameters"
        )
        text = f"{machine}, {found['bytes'] / 1e6:.0f} MB of state, median of {found['rollbacks']} rollbacks"
        command = "Command: `python benchmarks/rollback.py --write`."
        (ROOT / "benchmarks/results/rollback.md").write_text(f"# Rollback\n\n{text}.\n{command}\n\n{table}\n")
    sys.exit(ratio < 100)


if __name__ == "__main__":
    main()
