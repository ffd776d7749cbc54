"""What a scheduler does to a run, and how long it takes to go on: `python benchmarks/slurm.py --write`.

A real Slurm cluster of four nodes on this machine (`slurm/cluster/up`). A small run on two nodes is submitted by
`trimtab submit`, and each of the following befalls a start of it in the middle: its time limit, preemption by a higher
partition, `scontrol requeue`, a rank killed by SIGKILL, a node that loses its power, a node whose network is cut while
its ranks live on, USR1 while a checkpoint is written. Asserted at the end: the bits of the same run on one machine.

From the ledger: how long each start took to its first step, by part, and how long it took from what happened to the
first step after it. `--write`: benchmarks/results/slurm.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from lab import Lab  # noqa: E402
from submitted import EVENTS, SMALL, Cluster, befall  # noqa: E402
from workspace import make_workspace  # noqa: E402

from launcher.details import start_up  # noqa: E402

PREFLIGHT = "preflight: {enabled: true, disk_megabytes_per_second: 0, memory_gib: 0.01, disk_gib: 0.01}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result under benchmarks/results")
    arguments = parser.parse_args()
    lab = Lab()
    folder = Path(tempfile.mkdtemp(prefix="trimtab-slurm-"))
    try:
        began = time.perf_counter()
        lab.up()
        seconds_up = time.perf_counter() - began
        if lab.mode != "namespaces":
            sys.exit("nodes with a network of their own are needed: run it as root where namespaces are allowed")
        text = measure(lab, folder, seconds_up)
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(text)
    if arguments.write:
        (ROOT / "benchmarks" / "results" / "slurm.md").write_text(text)


def measure(lab: Lab, folder: Path, seconds_up: float) -> str:
    local = make_workspace(folder / "local")
    code, output = local.trimtab("run", "config.yaml", *SMALL)
    assert code == 0, output
    made = make_workspace(folder / "submitted")
    cluster = Cluster(lab, made)
    job, happened = befall(cluster, PREFLIGHT)
    cluster.wait_until_over(job)
    assert cluster.outcome()["reason"] == "completed", cluster.log()
    assert made.final_state("small") == local.final_state("small")

    ledger = cluster.ledger()
    starts = {record["start"]: record for record in ledger if record["kind"] == "start"}
    first = {}
    for record in ledger:
        if record["kind"] == "attempt":
            first.setdefault(record["start"], record)
    splits = [start_up(start, first.get(number)) for number, start in starts.items() if number in first]
    names = list(dict.fromkeys(name for split in splits for name in split))
    goodput = [record for record in ledger if record["kind"] == "goodput"][-1]

    lines = [
        "# Slurm",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()}, 2 cores for all nodes, Slurm 22.05 "
        "with short times (a node is given up after 10 s, a requeued job waits 5 s), 2 nodes × 1 rank, ZeRO 2.",
        "Command: `python benchmarks/slurm.py --write`. The run ended with the bits of the run on one machine.",
        "",
        f"`slurm/cluster/up`: {seconds_up:.1f} s.",
        "",
        f"From the start of a job to the end of its first step, {len(splits)} starts, seconds:",
        "",
        "| part | median | longest |",
        "|---|---|---|",
    ]
    for name in names:
        values = [split.get(name, 0.0) for split in splits]
        lines.append(f"| {name} | {statistics.median(values):.1f} | {max(values):.1f} |")
    totals = [sum(split.values()) for split in splits]
    lines.append(f"| together | {statistics.median(totals):.1f} | {max(totals):.1f} |")
    lines += ["", "From what happened to the end of the first step after it:", ""]
    lines += ["| what | seconds | the run went on | steps done again |", "|---|---|---|---|"]
    numbers = sorted(starts)
    for what, start, when in happened:
        after = next(number for number in numbers if number > start and number in first)
        before = max(record["step"] for record in ledger if record["kind"] == "attempt" and record["start"] == start)
        again = before - starts[after]["resumed_step"]
        nodes = ", ".join(starts[after]["job"]["nodes"])
        lines.append(f"| {EVENTS[what]} | {first[after]['time'] - when:.1f} | on {nodes} | {again} |")
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.0f} s" for name, seconds in goodput["parts"].items())
    whole = f"allocated {goodput['allocated']:.0f} s, of it {parts}"
    lines += ["", f"Where its time went, as the ledger has it (steps are slowed to 2 s on purpose): {whole}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
