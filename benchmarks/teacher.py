"""What a teacher costs in memory: `python benchmarks/teacher.py`.

A Llama-type model of about 150 M parameters with random weights, saved as one safetensors file, is the teacher of 2 and
4 gloo ranks with one thread each: whole on every rank (`replica`), sharded over all (`zero3`), sharded over each of two
nodes of two ranks (`within_node`); and, to compare, loaded by transformers' own ZeRO-3 path. Every case has fresh
processes. Reported for each rank: the highest resident memory above that before the build, while it is built and while
it answers for a micro-batch; pages of mapped files count. glibc is told to give freed blocks of more than 1 MiB back
(`MALLOC_MMAP_THRESHOLD_`): by default it keeps those below 32 MiB, which says nothing of what is held. Then the seconds
of the build, of an answer with its head gathered, and of a comparison of all weights with what was loaded.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY, WIDTH, LENGTH, SAMPLES = 8_000, 768, 256, 2
CASES = (
    ("replica", 2),
    ("zero3", 2),
    ("transformers", 2),
    ("replica", 4),
    ("zero3", 4),
    ("within_node", 4),
    ("transformers", 4),
)
ANSWERS = 5


def make_model(folder: Path, layers: int) -> int:
    """Save the teacher; its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=12,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_config(teacher: Path, place: str) -> Any:
    from trainer.config.schema import RunConfig

    return RunConfig.model_validate(
        {
            "name": "teacher",
            "stage": "distill",
            "precision": "fp32",
            "data": {"sources": ({"stdlib": True},), "sequence_length": LENGTH},
            "model": {"pretrained": str(teacher)},
            "distill": {
                "teacher": {
                    "place": "replica" if place == "replica" else "zero3",
                    "pretrained": str(teacher),
                    "within_node": place == "within_node",
                }
            },
            "batch": {"samples": 4, "micro": 1},
            "optim": {"lr": 1e-4},
            "schedule": {"duration": 10},
            # buckets in proportion to the small model
            "zero": {"stage": 3, "bucket_elements": 5_000_000},
            "cluster": {"device": "cpu"},
        }
    )


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024


class Peak:
    """The highest resident memory since it was made, above what there was then."""

    def __init__(self, base: int | None = None):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._base = resident("VmRSS") if base is None else base
        self.base = self._base

    def read(self) -> int:
        return resident("VmHWM") - self._base


def rank_main(teacher: Path, place: str, output: Path) -> None:
    """One rank of a case; every rank writes what it measured."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    import deepspeed  # noqa: F401 - what is imported is no part of the build
    import torch
    import torch.distributed as dist

    from trainer.config.resolve import deepspeed_config
    from trainer.engine.ranks import Ranks, join
    from trainer.knowledge import DenseTargets
    from trainer.model.build import build_model
    from trainer.teacher.build import build_teacher

    torch.set_num_threads(1)
    ranks = join("cpu")
    if place == "within_node":
        ranks = Ranks(ranks.rank, ranks.world_size, ranks.rank % 2)
    config = make_config(teacher, place)
    # collectives take buffers when they are first used
    dist.all_gather_object([None] * ranks.world_size, "")
    dist.barrier()
    found: dict[str, float] = {}
    peak, began = Peak(), time.perf_counter()
    if place == "transformers":
        options = deepspeed_config(config, ranks.world_size, "cpu", "fp32")
        model = build_model(config, vocabulary=VOCABULARY, zero3=options, dtype=torch.float32)
        found |= {"build seconds": time.perf_counter() - began, "building": peak.read()}
        del model
    else:
        asked = build_teacher(config, ranks=ranks, device="cpu", vocabulary=VOCABULARY)
        found |= {"build seconds": time.perf_counter() - began, "building": peak.read()}
        found["shard"] = sum(tensor.nbytes for tensor in asked.tensors())
        ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
        peak = Peak(peak.base)
        seconds = []
        for _ in range(ANSWERS):
            dist.barrier()
            began = time.perf_counter()
            targets = asked.knowledge({"input_ids": ids}).targets
            assert isinstance(targets, DenseTargets)
            with targets.whole():
                assert targets.head.weight.shape == (VOCABULARY, WIDTH)
            seconds.append(time.perf_counter() - began)
        found |= {"answering": peak.read(), "answer seconds": min(seconds)}
        dist.barrier()
        began = time.perf_counter()
        assert asked.mend() is None
        found["compare seconds"] = time.perf_counter() - began
        asked.close()
    (output / f"{ranks.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def measure(teacher: Path, place: str, world_size: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += [__file__, "--rank", str(teacher), "--place", place, "--output", str(folder)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def report(parameters: int, results: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    size, largest = parameters * 4 / 2**20, VOCABULARY * WIDTH * 4 / 2**20
    lines = [
        "# Memory of a teacher",
        "",
        f"{datetime.date.today().isoformat()}, {platform.machine()}, {os.cpu_count()} cores, fp32, "
        f"{parameters / 1e6:.0f} M parameters ({size:.0f} MiB in one file), {SAMPLES} × {LENGTH} tokens an answer.",
        "Command: `python benchmarks/teacher.py --write`.",
        "",
        "| ranks | teacher | weights a rank | peak while building: rank 0 | others | peak while answering | "
        "build | answer | compare |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def mib(values: list[float]) -> str:
        low, high = min(values) / 2**20, max(values) / 2**20
        return f"{low:.0f} MiB" if round(low) == round(high) else f"{low:.0f}–{high:.0f} MiB"

    for (place, world_size), ranks in results.items():
        others = mib([rank["building"] for rank in ranks[1:]])
        row = [str(world_size), "*transformers' own loading*" if place == "transformers" else f"`{place}`"]
        build = f"{max(rank['build seconds'] for rank in ranks):.1f} s"
        if place == "transformers":
            row += ["", mib([ranks[0]["building"]]), others, "", build, "", ""]
        else:
            row += [
                mib([rank["shard"] for rank in ranks]),
                mib([ranks[0]["building"]]),
                others,
                mib([rank["answering"] for rank in ranks]),
                build,
                f"{max(rank['answer seconds'] for rank in ranks):.2f} s",
                f"{max(rank['compare seconds'] for rank in ranks) * 1000:.0f} ms",
            ]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "Peaks are resident memory above that before the build, with the pages of mapped files; freed blocks of more "
        f"than 1 MiB go back to the system. The largest tensors are those of the vocabulary, {largest:.0f} MiB each; "
        "an answer gathers the head for as long as its targets are used. Ranks share the cores.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--only", nargs="*", default=[], metavar="PLACE")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/teacher.md")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options.rank, options.place, options.output)
    with tempfile.TemporaryDirectory(prefix="teacher-") as name:
        teacher = Path(name) / "model"
        parameters = make_model(teacher, options.layers)
        results = {}
        for place, world_size in CASES:
            if not options.only or place in options.only:
                results[place, world_size] = measure(teacher, place, world_size)
                print(place, world_size, results[place, world_size], flush=True)
        text = report(parameters, results)
    print(text)
    if options.write:
        (ROOT / "benchmarks/results/teacher.md").write_text(text)


if __name__ == "__main__":
    main()
