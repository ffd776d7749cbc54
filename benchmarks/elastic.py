"""Every world size and ZeRO stage resumed in every other: {1, 2, 4} × {1, 2, 3} → {1, 2, 4} × {1, 2, 3}.

    python benchmarks/elastic.py [--write benchmarks/results/elastic.md] [--steps 20] [--after 10]

Each of the 9 sources trains a small Llama on this repository's own text, commits a checkpoint, and goes on unchanged.
Each of the 9 targets goes on from each of the 9 checkpoints, with another micro-batch where the world size is another.
It must see the same samples in the same order as the run that went on unchanged; shown is the largest difference of
its loss to that run's. Weights and moments right after the conversion are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "dist")]

from pool import RankPool  # noqa: E402

from trainer.config.files import RunFiles  # noqa: E402
from trainer.config.schema import RunConfig  # noqa: E402

WORLDS = (1, 2, 4)
STAGES = (1, 2, 3)
MICRO = {1: 8, 2: 2, 4: 1}
"""Micro-batch of each world size: no two accumulate alike."""
TOLERANCE = 1e-4
"""Nats: what the loss may differ by after the steps that are compared."""
KEYS = ("master", "exp_avg", "exp_avg_sq")
Shape = tuple[int, int]
"""(ranks, ZeRO stage)"""


@dataclass(frozen=True)
class Course:
    """Steps of one rank."""

    losses: list[float]
    rows: list[dict[int, str]]
    """For each batch, place in the global batch → hash of what this rank trained on there."""


def make_config(root: Path, world: int, stage: int) -> RunConfig:
    text = [str(ROOT / "docs" / "*.md"), str(ROOT / "trainer" / "**" / "*.py"), str(ROOT / "tests" / "**" / "*.py")]
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "name": "elastic",
                "precision": "fp32",
                "data": {
                    "sources": [{"files": text}],
                    "tokenizer": {"train": {"vocabulary": 1024}},
                    "sequence_length": 64,
                    "prepared": str(root / "data"),
                    "held_out": 0.05,
                },
                "model": {
                    "config": {
                        "model_type": "llama",
                        "hidden_size": 96,
                        "intermediate_size": 256,
                        "num_hidden_layers": 3,
                        "num_attention_heads": 4,
                    }
                },
                "batch": {"samples": 16, "micro": MICRO[world]},
                "optim": {"lr": 3e-3},
                "schedule": {"duration": 1000, "warmup": 10},
                "zero": {"stage": stage},
                "cluster": {"device": "cpu", "ranks_per_node": world},
            }
        )
    )


def build(config: RunConfig, files: RunFiles, rank: int, world: int) -> tuple[Any, Any]:
    """(engine, the run's samples)"""
    import torch

    from trainer.config.resolve import arithmetic, deepspeed_config
    from trainer.engine.ranks import Ranks
    from trainer.engine.zero import Engine
    from trainer.model.build import build_model
    from trainer.model.groups import parameter_groups
    from trainer.objectives.objective import make_objective
    from trainer.optim.build import build_optimizer
    from trainer.stages.prepare import open_run

    prepared, facts = open_run(files, config)
    zero3 = deepspeed_config(config, world, "cpu", "fp32") if config.zero.stage == 3 else None
    model = build_model(config, vocabulary=prepared.vocabulary, zero3=zero3, dtype=torch.float32)
    engine = Engine(
        model,
        build_optimizer(parameter_groups(model, config), config, "cpu"),
        make_objective(config.objective),
        config=config,
        numbers=arithmetic(config, world),
        parameters=facts.parameters,
        ranks=Ranks(rank, world, rank),
        device="cpu",
        precision="fp32",
    )
    return engine, prepared.samples("train", config.data.sequence_length, config.data.boundaries)


def advance(engine: Any, samples: Any, config: RunConfig, rank: int, world: int, first: int, last: int) -> Course:
    """Train on batches `first` … `last` − 1 of the run's own order."""
    import xxhash

    from trainer.config.resolve import arithmetic
    from trainer.data.order import Order
    from trainer.data.stream import Stream
    from trainer.optim.schedule import learning_rate

    numbers = arithmetic(config, world)
    order = Order(config.seed, samples.sizes, samples.weights, config.data.shuffle)
    stream = Stream(
        samples, order, batch=numbers.samples, micro=numbers.micro, rank=rank, ranks=world,
        objective=config.objective, seed=config.seed, next_batch=first, prefetch=0,
    )  # fmt: skip
    course = Course([], [])
    for step in range(first + 1, last + 1):
        batch = next(stream)
        rows = {}
        for index, arrays in enumerate(batch.micro_batches):
            for row in range(numbers.micro):
                content = b"".join(arrays[name][row].tobytes() for name in sorted(arrays))
                rows[(index * world + rank) * numbers.micro + row] = xxhash.xxh3_64_hexdigest(content)
        course.rows.append(rows)
        course.losses.append(engine.accumulate(batch, attempt=step, step=step).loss)
        engine.apply(config.optim.clip, learning_rate(config.optim, config.schedule, numbers, step))
    stream.close()
    return course


def train(rank: int, world: int, configs: dict[int, RunConfig], root: Path, saved: int, last: int) -> dict[int, Course]:
    """A run in each stage, a checkpoint within it; what came after."""
    from trainer.checkpoint.manifest import Manifest
    from trainer.checkpoint.store import CheckpointStore
    from trainer.engine.state import compute_precision, optimizer_kind, read_state

    courses = {}
    for stage, config in configs.items():
        engine, samples = build(config, RunFiles(root / "run"), rank, world)
        advance(engine, samples, config, rank, world, 0, saved)
        folder = root / f"{world}-{stage}"
        store = CheckpointStore(folder, rank=rank, world_size=world, replicated=False, keep=1)
        store.save(
            read_state(engine),
            Manifest(
                step=saved, attempt=saved, next_batch=saved, quarantine=(), world_size=world, stage=stage,
                precision=compute_precision(engine), optimizer=optimizer_kind(engine),
                global_batch=config.batch.samples, config_fingerprint="", data_fingerprint="",
                parameters=engine.names, files=(),
            ),
        )  # fmt: skip
        store.close()
        courses[stage] = advance(engine, samples, config, rank, world, saved, last)
    return courses


def resume(rank: int, world: int, config: RunConfig, root: Path, sources: list[Shape], last: int) -> list[Any]:
    """Go on from each source: (seconds of loading and converting, tensors that differ, hyperparameters, course)."""
    from trainer.checkpoint.elastic import Shape as Part
    from trainer.checkpoint.store import CheckpointStore
    from trainer.engine.state import read_shape, read_state, write_state

    engine, samples = build(config, RunFiles(root / "run"), rank, world)
    results = []
    for source in sources:
        store = CheckpointStore(
            root / f"{source[0]}-{source[1]}", rank=rank, world_size=world, replicated=False, keep=1
        )
        began = time.perf_counter()
        found = store.load_newest(Part(**read_shape(engine)))
        assert found is not None
        directory, manifest, (tensors, numbers) = found
        write_state(engine, tensors, numbers)
        seconds = time.perf_counter() - began
        store.close()
        wrong = differing(*read_state(engine), directory)
        groups = [{key: group[key] for key in ("weight_decay", "betas", "eps")} for group in numbers["groups"]]
        course = advance(engine, samples, config, rank, world, manifest.step, last)
        results.append((seconds, wrong, groups, course))
    return results


def differing(tensors: dict[str, Any], numbers: dict[str, Any], directory: Path) -> list[str]:
    """Parameters whose weights or moments on this rank are not, bit for bit, those of the checkpoint."""
    import torch

    from trainer.checkpoint.assemble import whole_parameters

    wrong = []
    for key in KEYS:
        whole = dict(whole_parameters(directory, key=key, verify=False))
        for own in numbers["fragments"]:
            held = tensors[f"flat.{own['flat']}.{key}"].narrow(0, own["offset"], own["num_elements"])
            if not torch.equal(held, whole[own["name"]].view(-1).narrow(0, own["start"], own["num_elements"])):
                wrong.append(f"{key} of {own['name']}")
    return wrong


def seen(courses: list[Course], samples: int) -> list[list[str]]:
    """What all ranks together trained on, in order: [batches][samples]."""
    batches = []
    for parts in zip(*(course.rows for course in courses), strict=True):
        together = {place: row for part in parts for place, row in part.items()}
        assert sorted(together) == list(range(samples)), "a batch has holes"
        batches.append([together[place] for place in range(samples)])
    return batches


def campaign(root: Path, saved: int, last: int) -> str:
    from trainer.stages.prepare import prepare_run

    files = RunFiles(root / "run")
    files.root.mkdir()
    _, facts = prepare_run(files, make_config(root, 1, 1))
    shapes = [(world, stage) for world in WORLDS for stage in STAGES]
    unchanged: dict[Shape, list[Course]] = {}
    pools: dict[int, RankPool] = {}
    try:
        for world in WORLDS:
            pools[world] = RankPool(world)
            configs = {stage: make_config(root, world, stage) for stage in STAGES}
            by_rank = pools[world](train, configs=configs, root=root, saved=saved, last=last)
            unchanged |= {(world, stage): [courses[stage] for courses in by_rank] for stage in STAGES}
            print(f"trained on {world} ranks", file=sys.stderr, flush=True)
        samples = make_config(root, 1, 1).batch.samples
        expected = {shape: seen(courses, samples) for shape, courses in unchanged.items()}
        reference = unchanged[shapes[0]][0].losses
        noise = max(gap(reference, courses[0].losses) for courses in unchanged.values())
        cells: dict[tuple[Shape, Shape], float] = {}
        seconds: list[float] = []
        for target in shapes:
            config = make_config(root, *target)
            by_rank = pools[target[0]](resume, config=config, root=root, sources=shapes, last=last)
            for index, source in enumerate(shapes):
                ranks = [results[index] for results in by_rank]
                assert not any(wrong for _, wrong, _, _ in ranks), (source, target, ranks[0][1])
                assert seen([course for *_, course in ranks], samples) == expected[source], (source, target)
                decays = [group["weight_decay"] for group in ranks[0][2]]
                assert decays == [config.optim.weight_decay, 0.0], decays
                cells[source, target] = gap(unchanged[source][0].losses, ranks[0][3].losses)
                assert cells[source, target] < TOLERANCE, (source, target, cells[source, target])
                seconds.append(max(result[0] for result in ranks))
            print(f"resumed on {target[0]} ranks in ZeRO {target[1]}", file=sys.stderr, flush=True)
    finally:
        for pool in pools.values():
            pool.close()
    return report(shapes, cells, noise, seconds, facts.num_parameters, saved, last)


def gap(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def report(
    shapes: list[Shape],
    cells: dict[tuple[Shape, Shape], float],
    noise: float,
    seconds: list[float],
    num_parameters: int,
    saved: int,
    last: int,
) -> str:
    import deepspeed
    import torch

    def name(shape: Shape) -> str:
        return f"{shape[0]} × Z{shape[1]}"

    head = ["from \\ to", *map(name, shapes)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    lines += [
        f"| {name(source)} | {' | '.join(f'{cells[source, target]:.1e}' for target in shapes)} |" for source in shapes
    ]
    changed = max(cells[pair] for pair in cells if pair[0] != pair[1])
    same = max(cells[shape, shape] for shape in shapes)
    micro = ", ".join(f"{MICRO[world]} on {world}" for world in WORLDS)
    about = (
        f"`python benchmarks/elastic.py`: a Llama of {num_parameters / 1e6:.2f} M parameters, fp32, batches of 16 "
        f"samples of 64 tokens, CPU ranks over gloo, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}. "
        f"Every run commits a checkpoint after {saved} steps and goes on unchanged to step {last}; every other shape "
        "goes on from that checkpoint. Rows: ranks × ZeRO stage that wrote it; columns: that went on. In the cells: "
        f"the largest difference, over steps {saved + 1} to {last}, of the loss to that of the run that went on "
        f"unchanged, in nats. The micro-batch changes with the ranks ({micro})."
    )
    notes = [
        f"{len(cells)} resumes. In each the samples of every batch are the same in the same order (hashes of all "
        "inputs and labels), weights and both moments right after the conversion are those of the checkpoint bit for "
        "bit, and both optimizer groups have their weight decay.",
        f"Largest difference with a change of shape {changed:.1e}, without one {same:.1e}. The runs themselves, each "
        f"in its shape from the first step on, differ by {noise:.1e} over the same steps: what the order of a sum of "
        "floating-point numbers does.",
        f"Checking hashes, converting and putting into the engine took {sum(seconds) / len(seconds):.2f} s on average, "
        f"{max(seconds):.2f} s at most.",
    ]
    text = [f"# Resumed in another shape ({date.today()})", about, "\n".join(lines), "\n".join(f"- {n}" for n in notes)]
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="before the checkpoint")
    parser.add_argument("--after", type=int, default=10, help="steps that are compared")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
        text = campaign(Path(folder), arguments.steps, arguments.steps + arguments.after)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
