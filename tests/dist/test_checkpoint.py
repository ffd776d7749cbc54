"""Saving and resuming: the same bits as uninterrupted, and nothing damaged is ever loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankFailedError, RankPool
from workload import OTHER_SETTINGS, make_batch, make_config, make_engine, weights

from trainer.checkpoint.assemble import whole_parameters
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import CheckpointStore, committed_steps
from trainer.config.schema import RunConfig
from trainer.engine.state import read_state, write_state
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError

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
        return str(error)
    return "loaded"


def test_keeps_the_newest_and_forgets_the_rest(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks(save_steps, config=make_config(), folder=tmp_path, steps=[1, 2, 3, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_damaged_shard_is_named_on_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks(save_steps, config=make_config(), folder=tmp_path, steps=[1])
    assert two_ranks(load, folder=tmp_path, replicated=False) == ["loaded", "loaded"]
    shard = tmp_path / "step-00000001" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for message in two_ranks(load, folder=tmp_path, replicated=False):
        assert "rank-00001.safetensors has hash" in message
        assert "expected" in message
    shard.write_bytes(content[:-4])
    for message in two_ranks(load, folder=tmp_path, replicated=False):
        assert f"has {len(content) - 4} bytes, expected {len(content)}" in message
    shard.unlink()
    for message in two_ranks(load, folder=tmp_path, replicated=False):
        assert "rank-00001.safetensors is missing" in message


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
    with pytest.raises(RankFailedError, match="the checkpoint could not be written"):
        two_ranks(save_steps, config=make_config(), folder=tmp_path / "file", steps=[1])
