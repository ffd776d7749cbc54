"""Saving and resuming: the same bits as uninterrupted, and nothing damaged is ever loaded."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import RankFailedError, RankPool
from workload import OTHER_SETTINGS, make_batch, make_config, make_engine, weights

from trainer.checkpoint.assemble import whole_parameters
from trainer.checkpoint.elastic import Shape
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import CheckpointStore, Failed, Saved, State, committed_steps
from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig
from trainer.engine.state import read_state, write_state
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError, SupersededError
from trainer.starts import RunFence, begin

LR = 3e-3


def manifest(engine: Engine, config: RunConfig, step: int, world_size: int) -> Manifest:
    return Manifest(
        step=step,
        attempt=step,
        next_batch=step,
        quarantine=(),
        world_size=world_size,
        stage=engine.stage,
        global_batch=config.batch.samples,
        config_fingerprint="c",
        data_fingerprint="d",
        parameters=engine.names,
        files=(),
    )


def store_of(engine: Engine, folder: Path, rank: int, world_size: int, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, rank=rank, world_size=world_size, keep=keep, replicated=engine.stage == 0)


def advance(engine: Engine, config: RunConfig, rank: int, world_size: int, first: int, last: int) -> list[float]:
    losses = []
    for index in range(first, last):
        stats = engine.accumulate(make_batch(config, index, rank, world_size), attempt=index, step=index + 1)
        engine.apply(config.optim.clip, LR)
        losses.append(stats.loss)
    return losses


def interrupted(rank: int, world_size: int, config: RunConfig, folder: Path) -> Any:
    """Six steps without a stop; and the same with a checkpoint after three, read by a new engine."""
    whole = make_engine(config, rank, world_size, dropout=0.2)
    if config.precision == "fp16":
        # as after overflows: not what a fresh engine begins with
        whole.deepspeed.optimizer.loss_scaler.cur_scale = 2.0**10
    losses = advance(whole, config, rank, world_size, 0, 3)
    store = store_of(whole, folder, rank, world_size)
    store.save(read_state(whole), manifest(whole, config, 3, world_size))
    losses += advance(whole, config, rank, world_size, 3, 6)
    expected = weights(whole)

    fresh = make_engine(config, rank, world_size, dropout=0.2)
    newest = store.newest()
    assert newest is not None
    read, (tensors, numbers) = store.load(newest)
    write_state(fresh, tensors, numbers)
    resumed = advance(fresh, config, rank, world_size, read.step, 6)
    assert fresh.loss_scale == whole.loss_scale
    store.save(read_state(fresh), manifest(fresh, config, 6, world_size))
    return expected, weights(fresh), losses[3:], resumed


EVERY_SETTING = [
    *(pytest.param({"stage": stage}, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")),
    *OTHER_SETTINGS,
]


@pytest.mark.parametrize(("zero", "precision"), EVERY_SETTING)
def test_resumes_with_the_same_bits(two_ranks: RankPool, tmp_path: Path, zero: dict[str, Any], precision: str) -> None:
    config = make_config(zero=zero, precision=precision)
    for expected, found, losses, resumed in two_ranks(interrupted, config=config, folder=tmp_path / "c"):
        assert losses == resumed
        for name in expected:
            assert np.array_equal(expected[name], found[name]), name
    assert committed_steps(tmp_path / "c") == [3, 6]
    exported = dict(whole_parameters(tmp_path / "c" / "step-00000006"))
    for name, value in expected.items():
        if name in exported:
            precise = exported[name].numpy()
            assert precise.shape == value.shape
            tolerance = 0 if precision == "fp32" else 1e-2
            np.testing.assert_allclose(precise, value, rtol=tolerance, atol=tolerance * 1e-2)


def save_steps(rank: int, world_size: int, config: RunConfig, folder: Path, steps: list[int]) -> None:
    engine = make_engine(config, rank, world_size)
    advance(engine, config, rank, world_size, 0, 1)
    store = store_of(engine, folder, rank, world_size)
    store.clean()
    for step in steps:
        store.save(read_state(engine), manifest(engine, config, step, world_size))


def load(rank: int, world_size: int, folder: Path, replicated: bool) -> str:
    store = CheckpointStore(folder, rank=rank, world_size=world_size, keep=2, replicated=replicated)
    newest = store.newest()
    assert newest is not None
    try:
        store.load(newest)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_keeps_the_newest_and_forgets_the_rest(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks(save_steps, config=make_config(), folder=tmp_path, steps=[1, 2, 3, 4, 4])
    # the first is the next to be proven healthy
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (1, 3, 4)]


def test_a_damaged_shard_is_named_on_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks(save_steps, config=make_config(), folder=tmp_path, steps=[1])
    assert two_ranks(load, folder=tmp_path, replicated=False) == ["loaded", "loaded"]
    shard = tmp_path / "step-00000001" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for message in two_ranks(load, folder=tmp_path, replicated=False):
        assert "DamagedError" in message
        assert "rank-00001.safetensors has hash" in message
        assert "of rank 1, is damaged" in message
        assert "expected" in message
    shard.write_bytes(content[:-4])
    for message in two_ranks(load, folder=tmp_path, replicated=False):
        assert f"has {len(content) - 4} bytes, expected {len(content)}" in message
    shard.unlink()
    for message in two_ranks(load, folder=tmp_path, replicated=False):
        assert "rank-00001.safetensors is missing" in message


def plain_state(step: int, rank: int) -> State:
    return {"flat.0.master": torch.full((50_000,), float(10 * step + rank))}, {"fragments": [], "rank": rank}


def plain_store(rank: int, world_size: int, folder: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder, rank=rank, world_size=world_size, replicated=False, keep=2, **options)


def plain_manifest(step: int, world_size: int, stage: int = 2) -> Manifest:
    return Manifest(
        step=step,
        attempt=step,
        next_batch=step,
        quarantine=(),
        world_size=world_size,
        stage=stage,
        global_batch=8,
        config_fingerprint="c",
        data_fingerprint="d",
        parameters=(),
        files=(),
    )


def save_plain(rank: int, world_size: int, folder: Path, steps: list[int]) -> None:
    store = plain_store(rank, world_size, folder)
    for step in steps:
        store.save(plain_state(step, rank), plain_manifest(step, world_size))


def load_newest(rank: int, world_size: int, folder: Path) -> Any:
    said: list[str] = []
    store = plain_store(rank, world_size, folder, say=lambda level, text: said.append(text))
    loaded = store.load_newest()
    if loaded is None:
        return None, said
    directory, manifest, (tensors, numbers) = loaded
    return (directory.name, manifest.step, tensors["flat.0.master"][-1].item(), numbers["rank"]), said


def test_the_newest_whole_one_is_used_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    """Each of the two newest is damaged in another rank's files."""
    two_ranks(save_plain, folder=tmp_path, steps=[1])
    two_ranks(save_plain, folder=tmp_path / "more", steps=[2, 3])
    for step in (2, 3):
        (tmp_path / "more" / f"step-0000000{step}").rename(tmp_path / f"step-0000000{step}")
    with (tmp_path / "step-00000003" / "rank-00001.json").open("ab") as file:
        file.write(b" ")
    with (tmp_path / "step-00000002" / "rank-00000.safetensors").open("r+b") as file:
        file.truncate(10)
    (first, said), (second, silent) = two_ranks(load_newest, folder=tmp_path)
    assert first == ("step-00000001", 1, 10.0, 0)
    assert second == ("step-00000001", 1, 11.0, 1)
    assert ["rank-00001.json" in said[0], "rank-00000.safetensors" in said[1], len(said)] == [True, True, 2]
    assert silent == []
    left = sorted(path.name for path in tmp_path.glob("step-*"))
    assert left == ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]


def test_an_unfinished_checkpoint_is_not_one(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks(save_steps, config=make_config(), folder=tmp_path, steps=[1])
    left_over = tmp_path / "step-00000002.partial-0000"
    left_over.mkdir()
    (left_over / "rank-00000.safetensors").write_bytes(b"torn")
    (tmp_path / "step-00000003").mkdir()
    assert committed_steps(tmp_path) == [1]
    two_ranks(save_steps, config=make_config(), folder=tmp_path, steps=[2])
    assert committed_steps(tmp_path) == [1, 2]
    assert not left_over.exists()


def test_a_folder_that_cannot_be_written_fails_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RankFailedError, match="the checkpoint of step 1 could not be written: rank 0"):
        two_ranks(save_plain, folder=tmp_path / "file", steps=[1])


def fail_on_the_second(rank: int, world_size: int, folder: Path) -> Any:
    """The second rank may not write files as large as its shard, for one save of three."""
    store = plain_store(rank, world_size, folder)
    results: list[Any] = [store.save(plain_state(1, rank), plain_manifest(1, world_size)).name]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        released: list[int] = []
        store.begin(
            plain_state(2, rank), plain_manifest(2, world_size), release=lambda: released.append(store.progress)
        )
        failed = store.drain()
        assert isinstance(failed, Failed)
        results += [failed.step, failed.reason, len(released), committed_steps(folder)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return [*results, store.save(plain_state(3, rank), plain_manifest(3, world_size)).name]


def test_a_write_that_fails_on_one_rank_fails_on_all_and_harms_nothing(two_ranks: RankPool, tmp_path: Path) -> None:
    reason = "the checkpoint of step 2 could not be written: rank 1: [Errno 27] File too large"
    expected = ["step-00000001", 2, reason, 1, [1], "step-00000003"]
    assert two_ranks(fail_on_the_second, folder=tmp_path) == [expected, expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def write_beside_training(rank: int, world_size: int, folder: Path) -> Any:
    """Rank 1 does not get on with its write before the ranks have talked to each other about other things."""
    go = threading.Event()

    def moment(name: str, path: Path) -> None:
        if name == "begin" and rank == 1:
            go.wait()

    store = plain_store(rank, world_size, folder, moment=moment)
    store.begin(plain_state(1, rank), plain_manifest(1, world_size))
    total = torch.ones(1000)
    for _ in range(20):
        dist.all_reduce(total)
    unfinished = (store.poll(), store.in_flight, committed_steps(folder))
    go.set()
    saved = store.drain()
    assert isinstance(saved, Saved)
    return total[0].item(), unfinished, (saved.step, saved.name, saved.num_bytes), store.drain()


def test_messages_of_training_and_of_a_write_do_not_meet(two_ranks: RankPool, tmp_path: Path) -> None:
    results = two_ranks(write_beside_training, folder=tmp_path)
    assert results[0] == results[1]
    total, unfinished, (step, name, num_bytes), again = results[0]
    assert (total, unfinished, again) == (2.0**20, (None, True, []), None)
    assert (step, name) == (1, "step-00000001")
    assert num_bytes == sum(path.stat().st_size for path in (tmp_path / name).glob("rank-*"))
    assert [found for found, _ in two_ranks(load_newest, folder=tmp_path)] == [(name, 1, 10.0, 0), (name, 1, 11.0, 1)]


def superseded(rank: int, world_size: int, root: Path, number: int, run: str) -> Any:
    """A newer start takes over while rank 1 still writes."""
    files = RunFiles(root)

    def moment(name: str, path: Path) -> None:
        if name == "written" and rank == 1 and path.suffix == ".safetensors":
            begin(files)

    store = plain_store(rank, world_size, files.checkpoints, fence=RunFence(files, number, run), moment=moment)
    store.begin(plain_state(1, rank), plain_manifest(1, world_size))
    try:
        store.drain()
    except SupersededError as error:
        return str(error), sorted(path.name for path in files.checkpoints.iterdir()) if rank == 0 else []
    return "saved"


def test_a_superseded_start_hears_of_it_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    fence = begin(RunFiles(tmp_path))
    fence.resumed(0, 0)
    first, second = two_ranks(superseded, root=tmp_path, number=fence.number, run=fence.run)
    assert first == (second[0], [])
    assert "start 2" in first[0]


def load_alone(rank: int, world_size: int, folder: Path) -> list[str]:
    """What each rank of two says to a checkpoint of one rank, without and with a shape."""
    store = plain_store(rank, world_size, folder)
    texts = []
    for stage in (None, 2):
        shape = None if stage is None else Shape(stage, world_size, (), (), parameters=("other",))
        try:
            store.load(folder / "step-00000001", shape)
        except CheckpointError as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_what_cannot_be_converted_is_refused_alike_and_not_taken_for_damaged(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    CheckpointStore(tmp_path, rank=0, world_size=1, replicated=False, keep=1).save(
        plain_state(1, 0), plain_manifest(1, 1)
    )
    first, second = two_ranks(load_alone, folder=tmp_path)
    assert first == second
    assert first[0].startswith("CheckpointError: ")
    assert "was written by 1 ranks in ZeRO 2 and this start has 2" in first[0]
    assert first[1].startswith("CheckpointError: ")
    assert "is of another model" in first[1]
