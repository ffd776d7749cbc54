"""Speed of the loop beside a bare DeepSpeed loop and beside transformers' Trainer: `python benchmarks/throughput.py`.

All contestants train the same model on the same samples, on two gloo ranks with one thread each, in the same
processes; blocks of a few steps take turns, so that a busy machine slows all of them alike. Ours has all telemetry on
every step (ledger with every parameter's norm, TensorBoard, console lines), the guard with snapshots every 25 steps,
and the data stream; the bare loop has its data in memory.
A ratio above 1 means that ours is faster. Printed and, with `--write`, put into benchmarks/results/throughput.md.
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

BLOCK = 4
"""Steps in one turn."""
SAMPLES, MICRO, LENGTH = 16, 4, 256
SHORT = "TRIMTAB_BENCHMARK_SHORT"
"""Set for a model so small that a step is mostly the loop itself."""


def make_config(folder: Path, stage: int) -> Any:
    from trainer.config.schema import RunConfig

    return RunConfig.model_validate(
        {
            "name": f"stage{stage}",
            "precision": "fp32",
            "data": {
                "sources": ({"stdlib": True},),
                "tokenizer": {"train": {"vocabulary": 512 if SHORT in os.environ else 4096}},
                "sequence_length": LENGTH,
                "prepared": str(folder / "data"),
                "boundaries": "join",
            },
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32 if SHORT in os.environ else 256,
                    "intermediate_size": 64 if SHORT in os.environ else 704,
                    "num_hidden_layers": 2 if SHORT in os.environ else 4,
                    "num_attention_heads": 4,
                    "max_position_embeddings": LENGTH,
                    "tie_word_embeddings": True,
                }
            },
            "batch": {"samples": SAMPLES, "micro": MICRO},
            "optim": {"lr": 1e-3},
            "schedule": {"duration": 1_000_000, "kind": "constant"},
            "zero": {"stage": stage},
            "telemetry": {"weights_every": None, "console": "lines"},
            "cluster": {"device": "cpu", "ranks_per_node": 2},
        }
    )


def ours(config: Any, ranks: Any, prepared: Any, folder: Path, stack: contextlib.ExitStack) -> Callable[[], float]:
    """The project's own loop. Returns a function that trains one block and gives its seconds."""
    from trainer.config.files import RunFiles
    from trainer.loop import train
    from trainer.model.describe import describe
    from trainer.saving import NoSaving
    from trainer.stages.build import Setting
    from trainer.stages.training import Training
    from trainer.stop import StopRequest

    run = folder / config.name
    run.mkdir(exist_ok=True)
    setting = Setting(
        RunFiles(run), config, ranks, "cpu", "fp32", prepared, describe(config, prepared.vocabulary), StopRequest()
    )
    stage = Training(setting)
    whole = stack.enter_context(stage.parts())

    def block() -> float:
        steps = stage.progress.position.step + BLOCK
        parts = dataclasses.replace(whole, steps=steps, evaluate=lambda _: float("nan"), saver=NoSaving())
        began = time.perf_counter()
        train(parts, stage.progress)
        return time.perf_counter() - began

    return block


def batches_in_memory(config: Any, ranks: Any, prepared: Any, count: int) -> list[Any]:
    from trainer.data.order import Order
    from trainer.data.stream import Stream

    samples = prepared.samples("train", LENGTH, "join")
    order = Order(config.seed, samples.sizes, samples.weights, True)
    stream = Stream(
        samples,
        order,
        batch=SAMPLES,
        micro=MICRO,
        rank=ranks.rank,
        ranks=ranks.world_size,
        objective=config.objective,
        seed=0,
        prefetch=0,
    )
    return [next(stream) for _ in range(count)]


def model_of(config: Any, prepared: Any, ranks: Any) -> Any:
    import torch

    from trainer.config.resolve import deepspeed_config
    from trainer.model.build import build_model

    zero3 = deepspeed_config(config, ranks.world_size, "cpu", "fp32") if config.zero.stage == 3 else None
    return build_model(config, vocabulary=prepared.vocabulary, zero3=zero3, dtype=torch.float32)


def bare(config: Any, ranks: Any, prepared: Any, *, defaults: bool) -> Callable[[], float]:
    """What a user of DeepSpeed writes, with the same optimizer and clipping.

    Args:
        defaults: DeepSpeed's own settings of how it shards, where ours are tuned; the stage is the same.
    """
    import deepspeed
    import torch
    import torch.nn.functional as F

    from trainer.config.resolve import deepspeed_config
    from trainer.model.groups import parameter_groups
    from trainer.optim.build import build_optimizer

    model = model_of(config, prepared, ranks)
    settings = deepspeed_config(config, ranks.world_size, "cpu", "fp32")
    if defaults:
        settings["zero_optimization"] = {"stage": config.zero.stage}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(parameter_groups(model, config), config, "cpu"),
        config=settings,
    )
    batches = [
        [{name: torch.from_numpy(array) for name, array in micro.items()} for micro in batch.micro_batches]
        for batch in batches_in_memory(config, ranks, prepared, BLOCK)
    ]

    def block() -> float:
        began = time.perf_counter()
        for batch in batches:
            for micro in batch:
                logits = engine(input_ids=micro["input_ids"]).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), micro["labels"].flatten())
                engine.backward(loss)
                engine.step()
            loss.item()  # every loop looks at its loss
        return time.perf_counter() - began

    return block


def transformers_trainer(config: Any, ranks: Any, prepared: Any, folder: Path) -> Callable[[], float]:
    """transformers' Trainer as its documentation starts it: DDP, since its DeepSpeed integration has no CPU case."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = []
    for batch in batches_in_memory(config, ranks, prepared, BLOCK):
        for micro in batch.micro_batches:
            rows += [
                {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids)} for ids in micro["input_ids"]
            ]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    clock = Clock()
    trainer = Trainer(
        model=model_of(config, prepared, ranks),
        args=TrainingArguments(
            output_dir=str(folder / "hf"),
            use_cpu=True,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=SAMPLES // MICRO // ranks.world_size,
            max_steps=BLOCK,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_steps=1,
            report_to=["tensorboard"],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=rows * ranks.world_size,
        callbacks=[clock],
    )

    def block() -> float:
        clock.marks.clear()
        trainer.train()
        # from the beginning of the first step to the end of the last, without Trainer's own set-up
        return clock.marks[-1] - clock.marks[0]

    return block


def rank_main(folder: Path, rounds: int) -> None:
    """One rank of the contest; rank 0 writes the seconds of each block."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    from trainer.data.prepare import prepare
    from trainer.engine.ranks import join

    torch.set_num_threads(1)
    ranks = join("cpu")
    results: dict[str, list[float]] = {}
    stack = contextlib.ExitStack()  # left open: the process ends at once
    for stage in (1, 2, 3):
        config = make_config(folder, stage)
        prepared = prepare(config.data, base=folder, tokenizer_fallback=None, trust_remote_code=False)
        dist.barrier()
        contestants = {
            "ours": ours(config, ranks, prepared, folder, stack),
            "bare, our settings": bare(config, ranks, prepared, defaults=False),
            "bare": bare(config, ranks, prepared, defaults=True),
        }
        if stage == 1:
            replicated = config.model_copy(
                update={"zero": config.zero.model_copy(update={"stage": 0}), "name": "stage0"}
            )
            contestants["ours, ZeRO 0"] = ours(replicated, ranks, prepared, folder, stack)
            contestants["Trainer"] = transformers_trainer(replicated, ranks, prepared, folder)
        names = list(contestants)
        for turn in range(rounds + 1):
            for name in names if turn % 2 else reversed(names):
                dist.barrier()
                seconds = contestants[name]()
                if turn:  # the first turn warms up
                    results.setdefault(f"{stage} {name}", []).append(seconds)
    if ranks.is_first:
        (folder / "seconds.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    # many engines in one process: an ordinary exit can abort in threads that are still alive
    os._exit(0)


def report(results: dict[str, list[float]]) -> str:
    """Markdown table of median seconds a step and median of the ratios of neighbouring blocks."""
    lines = [
        "| compared | theirs, ms a step | ours, ms a step | theirs ÷ ours (median of rounds) |",
        "|---|---|---|---|",
    ]
    pairs = [
        (f"bare DeepSpeed loop, ZeRO {stage}{title}", f"{stage} {name}", f"{stage} ours")
        for title, name in ((", DeepSpeed's defaults", "bare"), (", our ZeRO settings", "bare, our settings"))
        for stage in (1, 2, 3)
    ]
    pairs.append(("transformers' Trainer (DDP)", "1 Trainer", "1 ours, ZeRO 0"))
    for title, theirs, our in pairs:
        ratio = statistics.median(a / b for a, b in zip(results[theirs], results[our], strict=True))
        milliseconds = [1000 * statistics.median(results[name]) / BLOCK for name in (theirs, our)]
        lines.append(f"| {title} | {milliseconds[0]:.0f} | {milliseconds[1]:.0f} | **{ratio:.3f}** |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help=f"blocks of {BLOCK} steps for each contestant")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/throughput.md")
    parser.add_argument("--short", action="store_true", help="a tiny model: steps that are mostly the loop itself")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        os.environ[SHORT] = "1"
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
        model = "a tiny model" if options.short else "3.7 M parameters"
        work = f"{model}, {SAMPLES} × {LENGTH} tokens a step, {options.rounds} turns of {BLOCK} steps"
        command = "python benchmarks/throughput.py --write" + (" --short" if options.short else "")
        text = f"# Throughput\n\n{machine}, {work}.\nCommand: `{command}`.\n\n{table}\n"
        name = "throughput-short.md" if options.short else "throughput.md"
        (ROOT / "benchmarks/results" / name).write_text(text)


if __name__ == "__main__":
    main()
