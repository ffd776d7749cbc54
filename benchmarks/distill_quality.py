"""What a student keeps of its teacher, beside the same student trained without one.

    python benchmarks/distill_quality.py classifier [--runs DIR] [--seeds 1 2 3] [--write FILE] [a.b=c …]
    python benchmarks/distill_quality.py language [--runs DIR] [--write FILE] [a.b=c …]

`classifier`: configs/finetune-sentiment.yaml makes the teacher, configs/distill-sentiment.yaml the students, once a
seed; accuracy on held-out reviews. `language`: configs/distill-quickstart.yaml; held-out loss against tokens. Runs that
are complete in DIR are not made again; overrides go to the students.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def trimtab(*arguments: str) -> None:
    argv = [sys.executable, "-m", "launcher.cli", *arguments]
    subprocess.run(argv, check=True, cwd=ROOT)


def classifier(runs: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[str]:
    """Teacher and students of each seed, as a table."""
    exported = runs / "finetune-sentiment" / "export"
    if not exported.exists():
        trimtab("run", "configs/finetune-sentiment.yaml", f"runs={runs}")
    teacher = f"distill.teacher.pretrained={exported}"
    found: dict[str, list[dict[str, Any]]] = {"teacher": [], "distilled": [], "plain": []}
    for seed in seeds:
        name = f"distill-sentiment-{seed}"
        trimtab(
            "run", "configs/distill-sentiment.yaml", f"runs={runs}", teacher, f"name={name}", f"seed={seed}", *overrides
        )
        for entry in json.loads((runs / name / "comparison.json").read_text())["entries"]:
            found[entry["name"]].append(entry)
    reference = statistics.fmean(entry["accuracy"] for entry in found["teacher"])
    size = found["teacher"][0]["parameters"]
    rows = [
        "|  | parameters | of the teacher's | accuracy | of the teacher's | by seed |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, entries in found.items():
        accuracies = [entry["accuracy"] for entry in entries]
        mean, parameters = statistics.fmean(accuracies), entries[0]["parameters"]
        each = ", ".join(f"{value:.2%}" for value in accuracies)
        rows.append(
            f"| {name} | {parameters:,} | {parameters / size:.1%} | {mean:.2%} | {mean / reference:.2%} | {each} |"
        )
    return rows


def language(runs: Path, overrides: Sequence[str]) -> list[str]:
    """Held-out loss of both students against the tokens that they have seen."""
    trimtab("run", "configs/distill-quickstart.yaml", f"runs={runs}", *overrides)
    curves = [evaluations(runs / name) for name in ("distill-quickstart", "distill-quickstart-plain")]
    entries = json.loads((runs / "distill-quickstart" / "comparison.json").read_text())["entries"]
    rows = [
        f"teacher: {entries[0]['held_out_loss']:.4f}",
        "",
        "| tokens | distilled | plain |",
        "| ---: | ---: | ---: |",
    ]
    rows += [f"| {tokens:,} | {curves[0][tokens]:.4f} | {curves[1][tokens]:.4f} |" for tokens in sorted(curves[0])]
    return rows


def evaluations(run: Path) -> dict[int, float]:
    """Tokens seen → held-out loss."""
    records = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    per_step = next(record["tokens_per_step"] for record in records if record["kind"] == "start")
    return {record["step"] * per_step: record["loss"] for record in records if record["kind"] == "evaluation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["classifier", "language"])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--write", type=Path)
    options = parser.parse_intermixed_args()
    runs = options.runs.absolute()
    if options.what == "classifier":
        rows = classifier(runs, options.seeds, options.overrides)
    else:
        rows = language(runs, options.overrides)
    text = "\n".join([f"{date.today()}, {options.what} {' '.join(options.overrides)}".rstrip(), "", *rows, ""])
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
