"""Predicted beside measured memory of a rank: a Llama of some ten million parameters on 2 CPU ranks, each ZeRO stage.

    python benchmarks/memory.py [--write benchmarks/results/memory.md] [--only bf16,accumulation]

Each line is a fresh run of two processes with the trainer's own engine. The kernel's high-water mark of resident memory
is reset after the libraries are imported and the ranks have met, so what is measured is what the training adds. With
glibc made to give back what is freed (`MALLOC_MMAP_THRESHOLD_`) that is the live tensors: the plan's `peak`. By default
glibc keeps most of it: the plan's `needed` on CPU, measured for some of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from launcher.memory import STAGES, rank_memory  # noqa: E402
from trainer.config.schema import RunConfig  # noqa: E402
from trainer.records import ModelFacts  # noqa: E402

RANKS = 2
STEPS = 2
MIB = 2**20
VOCABULARY = 8192
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"": {"precision": "bf16"}},
    "accumulation": {"batch": {"samples": 16}},
    "large batch": {"batch": {"samples": 16, "micro": 8}},
    "small batch": {"batch": {"samples": 2, "micro": 1}, "data": {"sequence_length": 64}},
    "small buckets": {"zero": {"bucket_elements": 4_000_000}},
    "checkpointing": {"model": {"activation_checkpointing": True}},
}
"""Changes of the config by section; `fp32` is 8 samples of 256 tokens, micro-batch 4, no accumulation."""


AS_IT_IS = ("fp32", "bf16")
"""Variants that are measured with glibc's defaults too."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
PARTS = ("weights", "gradients", "optimizer", "activations", "communication", "update")


def make_data(stage: int, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": "memory",
        "precision": "fp32",
        "data": {
            "sources": [{"stdlib": True}],
            "sequence_length": 256,
            "tokenizer": {"train": {"vocabulary": VOCABULARY}},
        },
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 512,
                "intermediate_size": 1408,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "vocab_size": VOCABULARY,
            }
        },
        "batch": {"samples": 8, "micro": 4},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": STEPS},
        "zero": {"stage": stage},
        "snapshots": {"every": None},
        "cluster": {"device": "cpu", "ranks_per_node": RANKS},
    }
    for section, options in changes.items():
        (data[section] if section else data).update(options)
    return data


def status(key: str) -> int:
    """A line of /proc/self/status in bytes (VmRSS: resident now; VmHWM: its high-water mark)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def measure(path: Path) -> None:
    """One rank: train for a few steps, print the high-water marks of its memory."""
    import numpy as np
    import torch
    import transformers  # noqa: F401 (part of the baseline)

    from trainer.config.resolve import arithmetic, deepspeed_config
    from trainer.engine.ranks import join, leave
    from trainer.engine.zero import Engine
    from trainer.model.build import build_model
    from trainer.model.groups import parameter_facts, parameter_groups
    from trainer.objectives.objective import make_objective
    from trainer.optim.build import build_optimizer
    from trainer.records import Batch

    torch.set_num_threads(1)
    config = RunConfig.model_validate_json(path.read_text())
    assert config.precision in ("fp32", "bf16")
    ranks = join("cpu")
    torch.distributed.barrier()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")

    zero3 = deepspeed_config(config, RANKS, "cpu", config.precision) if config.zero.stage == 3 else None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = build_model(config, vocabulary=VOCABULARY, zero3=zero3, dtype=dtype)
    numbers = arithmetic(config, RANKS)
    engine = Engine(
        model,
        build_optimizer(parameter_groups(model, config), config, "cpu"),
        make_objective(config.objective),
        config=config,
        numbers=numbers,
        parameters=parameter_facts(model),
        ranks=ranks,
        device="cpu",
        precision=config.precision,
    )
    built = status("VmHWM")
    accumulated = applied = 0
    for step in range(STEPS):
        generator = np.random.default_rng((step, ranks.rank))
        shape = (numbers.micro, config.data.sequence_length)
        tokens = [generator.integers(0, VOCABULARY, shape) for _ in range(numbers.accumulation)]
        batch = Batch(
            batch_index=step,
            epoch=0,
            samples=np.arange(numbers.samples),
            num_targets=numbers.tokens_per_step,
            micro_batches=tuple({"input_ids": ids, "labels": ids} for ids in tokens),
        )
        Path("/proc/self/clear_refs").write_text("5")
        engine.accumulate(batch, attempt=step, step=step + 1)
        accumulated = max(accumulated, status("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        engine.apply(1.0, 1e-3)
        applied = max(applied, status("VmHWM"))
    peaks = {"build": built, "accumulate": accumulated, "apply": applied}
    print(
        "RESULT " + json.dumps({"before": before, **{name: peak - before for name, peak in peaks.items()}}), flush=True
    )
    leave()


def run_ranks(data: dict[str, Any], variables: dict[str, str]) -> dict[str, int]:
    """The larger of the ranks' figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(data))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
        done = subprocess.run(
            [*command, __file__, "--rank", str(path)], env=environment, capture_output=True, text=True
        )
    found = [json.loads(part.split("\n")[0]) for part in done.stdout.split("RESULT ")[1:]]
    if done.returncode or len(found) != RANKS:
        raise SystemExit(done.stderr[-6000:])
    return {key: max(result[key] for result in found) for key in found[0]}


def facts_of(data: dict[str, Any]) -> tuple[RunConfig, ModelFacts]:
    from trainer.model.describe import describe

    config = RunConfig.model_validate_json(json.dumps(data))
    return config, describe(config, VOCABULARY)


def compare(names: list[str]) -> str:
    head = ["run", "ZeRO", *PARTS, "peak", "measured", "error", "needed", "measured", "error"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    baselines: list[int] = []
    errors: dict[str, list[float]] = {"peak": [], "needed": []}
    for name in names:
        for stage in STAGES:
            data = make_data(stage, VARIANTS[name])
            config, facts = facts_of(data)
            assert config.precision != "auto"
            memory = rank_memory(facts, config, RANKS, "cpu", config.precision, stage)
            cells = [name, str(stage), *(f"{getattr(memory, part) / MIB:.0f}" for part in PARTS)]
            for figure, variables in (("peak", GIVES_BACK), ("needed", {})):
                predicted = getattr(memory, figure) - memory.process
                if figure == "needed" and name not in AS_IT_IS:
                    cells += [f"{predicted / MIB:.0f}", "", ""]
                    continue
                result = run_ranks(data, variables)
                print(name, stage, figure, {key: round(value / MIB) for key, value in result.items()}, file=sys.stderr)
                measured = max(result["accumulate"], result["apply"])
                errors[figure].append(predicted / measured - 1)
                baselines.append(result["before"])
                cells += [f"{predicted / MIB:.0f}", f"{measured / MIB:.0f}", f"{errors[figure][-1]:+.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    lines.append("")
    for figure, found in errors.items():
        if found:
            mean = sum(map(abs, found)) / len(found)
            lines.append(f"- `{figure}`: mean absolute error {mean:.0%}, from {min(found):+.0%} to {max(found):+.0%}.")
    lines.append(f"- A process before it holds a model: {min(baselines) / MIB:.0f}–{max(baselines) / MIB:.0f} MiB.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=Path)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        measure(arguments.rank)
        return
    table = compare(arguments.only.split(","))
    import deepspeed
    import torch

    text = (
        f"# Memory of a rank: predicted and measured ({date.today()})\n\n"
        f"`python benchmarks/memory.py`: {RANKS} CPU ranks over gloo, a Llama of 8 layers, width 512 and {VOCABULARY} "
        f"tokens of vocabulary (34 M parameters), torch {torch.__version__}, DeepSpeed {deepspeed.__version__}. MiB "
        "above the process before it holds a model; the larger of the ranks. `peak` is measured with glibc giving back "
        f"what is freed, `needed` with its defaults.\n\n{table}"
    )
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
