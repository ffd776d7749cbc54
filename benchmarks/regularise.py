"""What each regulariser, adversarial method and augmentation does to held-out and noisy scores.

    python benchmarks/corpora.py corpora wordnet
    python benchmarks/regularise.py [--runs DIR] [--seeds 1 2 3] [--only NAME …] [--write FILE] [a.b=c …]

Two of MiniLM's layers learn a tenth of the film reviews (configs/finetune-sentiment.yaml) in four epochs, once a seed
with each method, everything else equal. Accuracy on held-out reviews, and on the same reviews with typing errors and
lost words; what does not help is in the table too. Runs that are complete in DIR are not made again.
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

ROOT = Path(__file__).resolve().parent.parent
NOISE = "typos=0.05,delete=0.1"
SAMPLES = 1500
"""Held-out reviews."""
COMMON = (
    "model.layers=0, 5",
    "data.held_out=0.9",
    "data.tokenizer.keep=used",
    "precision=bf16",
    "optim.lr=2e-4",
    "schedule.duration=160",
    "schedule.warmup=16",
    "evaluation.every=160",
    "evaluation.patience=null",
    f"evaluation.max_samples={SAMPLES}",
    "checkpoint.every=160",
)
METHODS: dict[str, tuple[str, ...]] = {
    "none": ("optim.weight_decay=0.0",),
    "weight decay 0.01": (),
    "weight decay 0.1": ("optim.weight_decay=0.1",),
    "L1 1e-6": ("objective.l1=1e-6",),
    "L2 1e-4": ("objective.l2=1e-4",),
    "L2 to the start 1e-3": ("objective.l2_start=1e-3",),
    "dropout 0.2": ("model.dropout=0.2",),
    "label smoothing 0.1": ("objective.label_smoothing=0.1",),
    "R-Drop 1": ("objective.r_drop=1.0",),
    "layer decay 0.8": ("optim.layer_decay=0.8",),
    "embeddings frozen": ("optim.freeze=['bert.embeddings.*']",),
    "LoRA 8": ("model.lora={rank: 8}", "optim.lr=2e-3"),
    "moving average 0.99": ("optim.ema=0.99",),
    "FGM 0.1": ("objective.adversarial={kind: fgm, epsilon: 0.1}",),
    "FGM 1": ("objective.adversarial={kind: fgm, epsilon: 1.0}",),
    "PGD 0.1": ("objective.adversarial={kind: pgd, steps: 2, epsilon: 0.1}",),
    "FreeLB 0.1": ("objective.adversarial={kind: freelb, steps: 2, epsilon: 0.1}",),
    "mixup 0.2": ("objective.mixup=0.2",),
    "synonyms": (f"data.augment={{synonyms: 0.2, lexicon: {ROOT / 'corpora/wordnet'}}}",),
    "typos": ("data.augment={typos: 0.05}",),
    "words deleted": ("data.augment={delete: 0.1}",),
    "words swapped": ("data.augment={swap: 0.1}",),
    "tokens masked": ("data.augment={mask: 0.1}",),
}


def trimtab(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launcher.cli", *arguments], check=True, cwd=ROOT)


def measure(runs: Path, name: str, seed: int, overrides: Sequence[str]) -> dict[str, float]:
    """Clean and noisy accuracy, flips between both, and seconds a step, of one run."""
    root = runs / f"{name.replace(' ', '-').replace('.', '_')}-{seed}"
    written = root / "scores.json"
    if not written.exists():
        options = [f"runs={runs}", f"name={root.name}", f"seed={seed}", *COMMON, *METHODS[name], *overrides]
        trimtab("run", "configs/finetune-sentiment.yaml", *options)
        options = ["--samples", str(SAMPLES), "--resamples", "1"]
        trimtab("evaluate", str(root), "--noise", NOISE, *options, "--json", str(written))
    (found,) = json.loads(written.read_text())["models"]
    records = [json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()]
    seconds = statistics.median(record["seconds"] for record in records if record["kind"] == "attempt")
    noisy = found["noisy"]
    return {
        "clean": found["scores"]["accuracy"],
        "noisy": noisy["scores"]["accuracy"],
        "flips": noisy["flips"],
        "ece": found["scores"]["ece"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "regularise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--write", type=Path)
    options = parser.parse_intermixed_args()
    rows = [
        "| method | accuracy | by seed | with noise | predictions that noise flips | calibration error | s a step |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in options.only:
        found = [measure(options.runs.absolute(), name, seed, options.overrides) for seed in options.seeds]
        mean = {key: statistics.fmean(each[key] for each in found) for key in found[0]}
        each = ", ".join(f"{one['clean']:.2%}" for one in found)
        rows.append(
            f"| {name} | {mean['clean']:.2%} | {each} | {mean['noisy']:.2%} | {mean['flips']:.1%} "
            f"| {mean['ece']:.3f} | {mean['seconds']:.2f} |"
        )
    text = "\n".join([f"{date.today()}, noise {NOISE} {' '.join(options.overrides)}".rstrip(), "", *rows, ""])
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
