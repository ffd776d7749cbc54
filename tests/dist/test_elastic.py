"""Resuming in another shape: any world size and ZeRO stage from any other; the same bits of state, the same course."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import RankPool
from workload import FP16, make_batch, make_config, make_engine, weights

from trainer.checkpoint.assemble import whole_parameters
from trainer.checkpoint.elastic import Shape
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import CheckpointStore
from trainer.config.schema import RunConfig
from trainer.engine.state import compute_precision, optimizer_kind, read_shape, read_state, write_state
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError

# three pools of ranks may have to start
pytestmark = pytest.mark.timeout(300)

LR = 3e-3
SAVED, LAST = 3, 5
WORLDS = (1, 2, 4)
STAGES = (0, 1, 2, 3)
KEYS = ("master", "exp_avg", "exp_avg_sq")
MICRO = {1: 4, 2: 1, 4: 2}
"""Micro-batch of a resume on so many ranks; that of the sources is 2."""
SPARED = {"weight_decay": 0.03, "betas": (0.8, 0.97), "eps": 1e-6}
"""Hyperparameters of the second group, unlike any of the first and of any config."""


@dataclass(frozen=True)
class Resumed:
    """What one rank found after a conversion."""

    wrong: list[str]
    """Tensors that are not those of the checkpoint."""
    elements: dict[str, int]
    """Of each parameter, on this rank."""
    groups: list[dict[str, Any]]
    counters: dict[str, int]
    loss_scale: float
    losses: list[float]


def advance(engine: Engine, config: RunConfig, rank: int, world_size: int, first: int, last: int) -> list[float]:
    losses = []
    for index in range(first, last):
        stats = engine.accumulate(make_batch(config, index, rank, world_size), attempt=index, step=index + 1)
        engine.apply(config.optim.clip, LR)
        losses.append(stats.loss)
    return losses


def open_store(engine: Engine, folder: Path, rank: int, world_size: int) -> CheckpointStore:
    return CheckpointStore(folder, rank=rank, world_size=world_size, keep=9, replicated=engine.stage == 0)


def manifest_of(engine: Engine, config: RunConfig, step: int, world_size: int) -> Manifest:
    return Manifest(
        step=step,
        attempt=step,
        next_batch=step,
        quarantine=(),
        world_size=world_size,
        stage=engine.stage,
        precision=compute_precision(engine),
        optimizer=optimizer_kind(engine),
        global_batch=config.batch.samples,
        config_fingerprint="c",
        data_fingerprint="d",
        parameters=engine.names,
        files=(),
    )


def train(rank: int, world_size: int, configs: dict[str, RunConfig], folder: Path, saved: int = SAVED) -> Any:
    """name → losses after the checkpoint, of runs that went on unchanged."""
    losses = {}
    for name, config in configs.items():
        engine = make_engine(config, rank, world_size)
        if config.precision == "fp16":
            # as after overflows: not what a fresh engine begins with
            scaler = engine.deepspeed.optimizer
            vars(getattr(scaler, "loss_scaler", None) or scaler.loss_scale_config)["cur_scale"] = 2.0**10
        engine.shards.inner.param_groups[1].update(SPARED)
        advance(engine, config, rank, world_size, 0, saved)
        store = open_store(engine, folder / name, rank, world_size)
        store.save(read_state(engine), manifest_of(engine, config, saved, world_size))
        store.close()
        losses[name] = advance(engine, config, rank, world_size, saved, LAST)
    return losses


def load(engine: Engine, folder: Path, rank: int, world_size: int) -> tuple[Path, Manifest, Any]:
    store = open_store(engine, folder, rank, world_size)
    found = store.load_newest(Shape(**read_shape(engine)))
    store.close()
    assert found is not None
    return found


def resume(rank: int, world_size: int, config: RunConfig, folders: list[Path]) -> list[Resumed]:
    """Go on from each of the checkpoints, one after the other, in the same engine."""
    engine = make_engine(config, rank, world_size)
    results = []
    for folder in folders:
        directory, manifest, (tensors, numbers) = load(engine, folder, rank, world_size)
        write_state(engine, tensors, numbers)
        wrong, elements = differing(engine, directory)
        groups = [{key: group[key] for key in SPARED} for group in engine.shards.inner.param_groups]
        counters = read_state(engine)[1]["counters"]
        scale = engine.loss_scale
        losses = advance(engine, config, rank, world_size, manifest.step, LAST)
        results.append(Resumed(wrong, elements, groups, counters, scale, losses))
    return results


def differing(engine: Engine, directory: Path) -> tuple[list[str], dict[str, int]]:
    """The tensors of this rank that are not what the checkpoint holds; elements that it has of each parameter."""
    tensors, numbers = read_state(engine)
    wrong = []
    elements: dict[str, int] = {}
    for key in KEYS if "flat.0.exp_avg" in tensors else KEYS[:1]:
        whole = dict(whole_parameters(directory, key=key, verify=False))
        for fragment in numbers["fragments"]:
            name, first, count = fragment["name"], fragment["start"], fragment["num_elements"]
            own = tensors[f"flat.{fragment['flat']}.{key}"].narrow(0, fragment["offset"], count)
            if not torch.equal(own, whole[name].view(-1).narrow(0, first, count)):
                wrong.append(f"{key} of {name}")
            if key == "master":
                elements[name] = elements.get(name, 0) + count
        if key == "master":
            used = weights(engine)
            exact = torch.float32 if compute_precision(engine) == "fp32" else torch.bfloat16
            if compute_precision(engine) != "fp16":
                wrong += [
                    name for name in used if not np.array_equal(used[name], whole[name].to(exact).float().numpy())
                ]
    return wrong, elements


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pools(one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


@pytest.fixture(scope="module")
def sources(pools: dict[int, RankPool], tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[float]]:
    """Folder of checkpoints → losses of the run that went on unchanged; one of each world size and stage."""
    found = {}
    for world, pool in pools.items():
        folder = tmp_path_factory.mktemp(f"ranks-{world}")
        configs = {f"stage-{stage}": make_config(zero={"stage": stage}) for stage in STAGES}
        for name, losses in pool(train, configs=configs, folder=folder)[0].items():
            found[folder / name] = losses
    return found


def check(results: list[list[Resumed]], expected: list[list[float]], stage: int, tolerance: float) -> None:
    """`results`: by rank, then by checkpoint."""
    for place, losses in enumerate(expected):
        ranks = [result[place] for result in results]
        assert [result.wrong for result in ranks] == [[]] * len(ranks)
        for result in ranks:
            assert result.losses == pytest.approx(losses, abs=tolerance)
            assert result.groups[1] == SPARED
            assert result.groups[0] == {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        held = sum(count for result in ranks for count in result.elements.values())
        assert held == NUM_PARAMETERS * (len(ranks) if stage == 0 else 1)


NUM_PARAMETERS = 97 * 32 + 24 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_shape_goes_on_in_every_other(
    pools: dict[int, RankPool], sources: dict[Path, list[float]], world: int, stage: int
) -> None:
    config = make_config(zero={"stage": stage}, batch={"micro": MICRO[world]})
    results = pools[world](resume, config=config, folders=list(sources))
    check(results, list(sources.values()), stage, 1e-5)
    accumulation = config.batch.samples // world // MICRO[world]
    for result in results[0]:
        assert result.counters["micro_steps"] == SAVED * accumulation
        assert result.counters["global_steps"] == SAVED


def test_bf16_offload_and_back(two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path) -> None:
    there = {"there": make_config(zero={"stage": 2}, precision="bf16")}
    [losses, *_] = two_ranks(train, configs=there, folder=tmp_path)
    offloaded = make_config(zero={"stage": 3, "offload": "optimizer"}, precision="bf16")
    check(four_ranks(resume, config=offloaded, folders=[tmp_path / "there"]), [losses["there"]], 3, 2e-2)
    [losses, *_] = four_ranks(train, configs={"back": offloaded}, folder=tmp_path)
    back = make_config(zero={"stage": 1}, precision="bf16")
    check(two_ranks(resume, config=back, folders=[tmp_path / "back"]), [losses["back"]], 1, 2e-2)


@pytest.mark.parametrize("stage", [0, 3], ids=["to-0", "to-3"])
@pytest.mark.parametrize("pair", [pytest.param((0, 2), marks=[FP16])], ids=["fp16"])
def test_the_loss_scale_goes_along(two_ranks: RankPool, tmp_path: Path, stage: int, pair: tuple[int, int]) -> None:
    configs = {str(source): make_config(zero={"stage": source}, precision="fp16") for source in pair}
    two_ranks(train, configs=configs, folder=tmp_path)
    config = make_config(zero={"stage": stage}, precision="fp16")
    for results in two_ranks(resume, config=config, folders=[tmp_path / name for name in configs]):
        assert [result.loss_scale for result in results] == [2.0**10] * 2
        assert [result.wrong for result in results] == [[], []]


def test_a_state_from_before_the_first_step(two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path) -> None:
    source = {"new": make_config(zero={"stage": 1})}
    [losses, *_] = two_ranks(train, configs=source, folder=tmp_path, saved=0)
    # the engine that goes on has moments of its own by then
    config = make_config(zero={"stage": 3})
    results = four_ranks(resume, config=config, folders=[tmp_path / "new", tmp_path / "new"])
    check(results, [losses["new"]] * 2, 3, 1e-5)


def refused(rank: int, world_size: int, config: RunConfig, folder: Path, hostile: list[Any]) -> list[str]:
    """What is said of a state with each change; the engine must stay as it is."""
    engine = make_engine(config, rank, world_size)
    advance(engine, config, rank, world_size, 0, 1)
    _, _, (tensors, numbers) = load(engine, folder, rank, world_size)
    before = {name: tensor.clone() for name, tensor in read_state(engine)[0].items()}
    numbers_before = read_state(engine)[1]
    said = []
    for section, change in hostile:
        if section == "tensors":
            state = tensors | {name: torch.zeros(size) for name, size in change.items()}, numbers
        elif isinstance(numbers[section], list):
            state = tensors, numbers | {section: [value | change for value in numbers[section]]}
        else:
            state = tensors, numbers | {section: numbers[section] | change}
        try:
            write_state(engine, *state)
            said.append("accepted")
        except CheckpointError as error:
            said.append(str(error))
    after, numbers_after = read_state(engine)
    assert numbers_after == numbers_before
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    return said


HOSTILE = [
    ("counters", {"__class__": 1}, "the counters"),
    ("counters", {"micro_steps": -2}, "the counters"),
    ("counters", {"micro_steps": True}, "the counters"),
    ("loss_scaler", {"backward": 1.0}, "the loss scaler's 'backward'"),
    ("loss_scaler", {"cur_scale": float("nan")}, "the loss scaler's 'cur_scale'"),
    ("groups", {"params": [1]}, "the hyperparameter 'params'"),
    ("groups", {"closure": "x"}, "the hyperparameter 'closure'"),
    ("groups", {"betas": [0.9]}, "the hyperparameter 'betas'"),
    ("groups", {"lr": "0.1"}, "the hyperparameter 'lr'"),
    ("scalars", {"0": {"__dict__": 1}}, "the optimizer state '__dict__'"),
    ("scalars", {"7": {"step": 1}}, "scalars of a flat tensor '7'"),
    ("tensors", {"flat.0.hook": 4}, "the tensor 'flat.0.hook'"),
    ("tensors", {"buffer.x": 4}, "the tensor 'buffer.x'"),
    ("tensors", {"flat.1.exp_avg": 4}, "'flat.1.exp_avg' .torch.float32, .4.. does not fit"),
]


def test_a_state_sets_what_it_should_and_nothing_else(two_ranks: RankPool, sources: dict[Path, list[float]]) -> None:
    folder = next(folder for folder in sources if folder.name == "stage-2" and "ranks-2" in str(folder))
    hostile = [(section, change) for section, change, _ in HOSTILE]
    for said in two_ranks(refused, config=make_config(zero={"stage": 2}), folder=folder, hostile=hostile):
        for (_, _, message), text in zip(HOSTILE, said, strict=True):
            with pytest.raises(CheckpointError, match=message):
                raise CheckpointError(text)


def load_error(rank: int, world_size: int, config: RunConfig, folder: Path) -> str:
    engine = make_engine(config, rank, world_size)
    try:
        load(engine, folder, rank, world_size)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_another_precision_is_refused_on_every_rank_before_files_are_read(
    four_ranks: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks(train, configs={"c": make_config(zero={"stage": 2})}, folder=tmp_path)
    for shard in (tmp_path / "c" / "step-00000003").glob("rank-*"):
        shard.unlink()
    other = make_config(zero={"stage": 3}, precision="bf16")
    for text in four_ranks(load_error, config=other, folder=tmp_path / "c"):
        assert text.endswith(
            "precision fp32 and this start has bf16, which cannot be converted; go on with fp32, or use another name"
        )
