"""A fine-tuning run beside transformers' Trainer on the same samples, settings and ranks: score and time.

    python benchmarks/finetune.py configs/finetune-topics.yaml [--runs DIR] [--seeds 1 2 3] [--write FILE]
        [--their-micro N] [a.b=c …]

Ours and theirs take turns, seed by seed. Time is the median step without evaluation and saving, so that a start-up
counts for neither; a ratio above 1 means that ours is faster. Both fill a micro-batch up to its longest text, rounded
up to 8 tokens; theirs is as large as given, so that each has the one that suits it. Runs that are complete in DIR are
not made again. Classification only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def ours(config: str, runs: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Score and seconds a step of a run of ours."""
    from trainer.config.files import RunFiles

    name = f"{Path(config).stem}-{seed}"
    argv = [sys.executable, "-m", "launcher.cli", "run", config, f"runs={runs}", f"name={name}", f"seed={seed}"]
    subprocess.run([*argv, *overrides], check=True, cwd=ROOT)
    files = RunFiles(runs / name)
    records = [json.loads(line) for line in files.ledger.read_text().splitlines()]
    last = [record for record in records if record["kind"] == "evaluation"][-1]
    seconds = statistics.median(record["seconds"] for record in records if record["kind"] == "attempt")
    return {"run": str(files.root), "score": last["scores"]["accuracy"], "loss": last["loss"], "seconds": seconds}


def theirs(run: Path, output: Path, micro: int | None) -> dict[str, Any]:
    """The same by transformers' Trainer, on as many ranks."""
    from trainer.config.load import read_run_config

    if not output.exists():
        config = read_run_config(run)
        ranks = config.cluster.ranks_per_node
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"}
        argv += [str(Path(__file__).resolve()), "--rank-of", str(run), str(output), str(micro or config.batch.micro)]
        subprocess.run(argv, check=True, cwd=ROOT, env=environment)
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def train_theirs(run: Path, output: Path, micro: int) -> None:
    """A rank of theirs."""
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    from trainer.config.files import RunFiles
    from trainer.config.load import read_run_config
    from trainer.data.labelled import trimmed
    from trainer.stages.prepare import open_run

    config = read_run_config(run)
    prepared, _ = open_run(RunFiles(run), config)
    assert prepared.classes is not None
    data = config.data
    splits = {name: prepared.samples(name, data.sequence_length, data.boundaries) for name in ("train", "held_out")}

    class Texts(torch.utils.data.Dataset[dict[str, Any]]):
        def __init__(self, name: str):
            self.samples = splits[name]

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {name: array[0] for name, array in self.samples.fetch(np.array([index])).items()}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        arrays = trimmed({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model.pretrained, num_labels=len(prepared.classes.names)
    )
    clock = Clock()
    ranks = config.cluster.ranks_per_node
    arguments = TrainingArguments(
        output_dir=str(output.with_suffix("")),
        use_cpu=True,
        seed=config.seed,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=config.batch.samples // (micro * ranks),
        max_steps=config.schedule.duration,
        learning_rate=config.optim.lr,
        adam_beta1=config.optim.betas[0],
        adam_beta2=config.optim.betas[1],
        adam_epsilon=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.clip,
        lr_scheduler_type="linear",
        warmup_steps=config.schedule.warmup,
        bf16=config.precision == "bf16",
        ddp_backend="gloo",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        logging_steps=100,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        # else it multiplies the loss of a classifier, which is a mean already, by the number of ranks
        average_tokens_across_devices=False,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=Texts("train"), callbacks=[clock])
    trainer.train()
    found = trainer.predict(Texts("held_out"))
    if trainer.is_world_process_zero():
        right = (found.predictions.argmax(axis=-1) == found.label_ids).mean()
        result = {
            "score": float(right),
            "loss": found.metrics["test_loss"],
            "seconds": statistics.median(clock.seconds),
        }
        output.write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--their-micro", type=int, help="samples in one forward pass of theirs; default: as ours")
    parser.add_argument("--write", type=Path)
    options = parser.parse_intermixed_args()
    runs = options.runs.absolute()
    pairs = []
    for seed in options.seeds:
        our = ours(options.config, runs, seed, options.overrides)
        pairs.append((our, theirs(Path(our["run"]), Path(our["run"]) / "trainer.json", options.their_micro)))
    rows = ["|  | accuracy, mean | by seed | held-out loss | s a step |", "| --- | ---: | --- | ---: | ---: |"]
    for name, entries in (("Trimtab", [pair[0] for pair in pairs]), ("transformers' Trainer", [p[1] for p in pairs])):
        each = ", ".join(f"{entry['score']:.2%}" for entry in entries)
        means = [statistics.fmean(entry[key] for entry in entries) for key in ("score", "loss", "seconds")]
        rows.append(f"| {name} | {means[0]:.2%} | {each} | {means[1]:.4f} | {means[2]:.3f} |")
    ratio = statistics.median(their["seconds"] / our["seconds"] for our, their in pairs)
    rows += ["", f"Time, theirs ÷ ours, median over the seeds: **{ratio:.3f}**."]
    text = "\n".join([f"{date.today()}, {options.config} {' '.join(options.overrides)}".rstrip(), "", *rows, ""])
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        train_theirs(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
