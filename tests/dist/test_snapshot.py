"""Snapshots in memory: exact, refused when damaged, looked through for what training cannot have produced."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pool import RankPool
from workload import OTHER_SETTINGS, make_batch, make_config, make_engine, weights

from trainer.config.schema import RunConfig
from trainer.engine.injection import Injector
from trainer.engine.snapshot import SnapshotRing
from trainer.engine.state import read_state, reset_moments
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError

STAGES = [0, 1, 2, 3]
LR = 3e-3
EVERY_SETTING = [
    *(pytest.param({"stage": stage}, precision) for stage in STAGES for precision in ("fp32", "bf16")),
    *OTHER_SETTINGS,
]


def bits(engine: Engine) -> list[bytes]:
    """Everything that a later step depends on."""
    tensors, numbers = read_state(engine)
    state = [tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
    return [*state, *(value.tobytes() for value in weights(engine).values()), repr(numbers).encode()]


def step(engine: Engine, config: RunConfig, index: int, rank: int, world_size: int, ring: SnapshotRing) -> None:
    engine.accumulate(make_batch(config, index, rank, world_size), attempt=index + 1, step=index + 1)
    ring.fence()
    engine.apply(config.optim.clip, LR)


def there_and_back(rank: int, world_size: int, config: RunConfig) -> Any:
    """Train 6 steps with snapshots of steps 0 and 3; go back to each and train again."""
    engine = make_engine(config, rank, world_size, dropout=0.1)
    ring = SnapshotRing(engine, keep=2)
    ring.take(0, {"step": 0})
    for index in range(6):
        if index == 3:
            # the copy runs beside the next accumulate
            ring.take(3, {"step": 3, "history": [1.5, None]})
        step(engine, config, index, rank, world_size, ring)
    straight = bits(engine)
    again = []
    for start in (3, 0):
        notes = ring.restore(start)
        assert notes is not None
        assert notes["step"] == start
        for index in range(start, 6):
            step(engine, config, index, rank, world_size, ring)
        again.append(bits(engine) == straight)
    found = ring.impossible()
    sizes = ring.num_bytes, ring.steps(), ring.newest(5), ring.newest(2), ring.newest(-1)
    ring.close()
    return again, found, sizes


@pytest.mark.parametrize(("zero", "precision"), EVERY_SETTING)
def test_back_and_again_gives_the_same_bits(two_ranks: RankPool, zero: dict[str, Any], precision: str) -> None:
    config = make_config(zero=zero, precision=precision)
    for again, found, (num_bytes, steps, *newest) in two_ranks(there_and_back, config=config):
        assert again == [True, True]
        assert found == 0
        assert num_bytes > 0
        assert (steps, newest) == ([0, 3], [3, 0, None])


def changed_after_the_fence(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    ring = SnapshotRing(engine, keep=1)
    same = []
    for step in range(5):
        before = bits(engine)
        ring.take(step, {})
        waited = ring.fence()
        for flat in engine.shards.flats():
            flat.fill_(7.0)
        ring.restore(step)
        same.append(bits(engine) == before and waited >= 0 and ring.fence() == 0.0)
    return same


@pytest.mark.parametrize("stage", [0, 3])
def test_after_the_fence_the_live_state_may_change(two_ranks: RankPool, stage: int) -> None:
    assert two_ranks(changed_after_the_fence, config=make_config(zero={"stage": stage})) == [[True] * 5] * 2


class DamageCopy(Injector):
    """Flips a bit of the copy of one step on one rank, after it was checksummed."""

    def __init__(self, step: int):
        self.step = step

    def snapshot(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        if step == self.step:
            tensors["flat.0.master"].view(-1).view(torch.int32)[-1] ^= 1


def damaged_copy(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size, injector=DamageCopy(2 if rank == 1 else -1))
    ring = SnapshotRing(engine, keep=3)
    for index in range(3):
        ring.take(index, {"step": index})
        step(engine, config, index, rank, world_size, ring)
    before = bits(engine)
    refused = ring.restore(2)
    unchanged = bits(engine) == before
    notes = ring.restore(1)
    kept = ring.steps()
    ring.drop_after(0)
    return refused, unchanged, notes, kept, ring.steps()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_copy_damaged_on_one_rank_is_refused_on_all(two_ranks: RankPool, stage: int) -> None:
    for refused, unchanged, notes, kept, left in two_ranks(damaged_copy, config=make_config(zero={"stage": stage})):
        assert refused is None
        assert unchanged
        assert notes == {"step": 1}
        assert kept == [0, 1]
        assert left == [0]


def slots_reused(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    ring = SnapshotRing(engine, keep=2)
    sizes, places = [], []
    for index in range(7):
        step(engine, config, index, rank, world_size, ring)
        ring.take(index + 1, {})
        sizes.append(ring.num_bytes)
        places.append({tensor.data_ptr() for slot in ring._slots.values() for tensor in slot.storage.values()})
    ring.take(7, {"again": True})
    places.append({tensor.data_ptr() for slot in ring._slots.values() for tensor in slot.storage.values()})
    # the audit of the next one counts from here
    assert engine.updates.num == 0
    steps = ring.steps()
    return sizes, places, steps, ring.restore(7), read_state(engine)[0]


def test_memory_is_used_again(two_ranks: RankPool) -> None:
    for sizes, places, steps, notes, state in two_ranks(slots_reused, config=make_config()):
        one = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        assert sizes == [one, *[2 * one] * 6]
        assert all(place == places[1] for place in places[2:])
        assert steps == [6, 7]
        assert notes == {"again": True}


class Broken(Injector):
    def snapshot(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        raise RuntimeError(f"no memory for step {step}")


def errors_of_the_thread(rank: int, world_size: int, config: RunConfig) -> str:
    engine = make_engine(config, rank, world_size, injector=Broken())
    ring = SnapshotRing(engine, keep=2)
    ring.take(0, {})
    with pytest.raises(RuntimeError) as caught:
        ring.take(1, {})
    return str(caught.value)


def test_an_error_of_the_thread_is_raised_at_the_next_call(two_ranks: RankPool) -> None:
    assert two_ranks(errors_of_the_thread, config=make_config()) == ["no memory for step 0"] * 2


def moments_reset(rank: int, world_size: int, config: RunConfig) -> Any:
    """Train, start the moments anew, take back the weights' past: the first step is that of a fresh optimizer."""
    fresh = make_engine(config, rank, world_size)
    engine = make_engine(config, rank, world_size)
    for index in range(3):
        engine.accumulate(make_batch(config, index, rank, world_size), attempt=1, step=1)
        engine.apply(config.optim.clip, LR)
    reset_moments(engine)
    for trained, new in zip(engine.shards.flats(), fresh.shards.flats(), strict=True):
        trained.copy_(new)
    engine.shards.publish()
    for each in (engine, fresh):
        each.accumulate(make_batch(config, 5, rank, world_size), attempt=1, step=1)
        each.apply(config.optim.clip, LR)
    found, expected = weights(engine), weights(fresh)
    return all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", STAGES)
def test_moments_start_anew(two_ranks: RankPool, stage: int) -> None:
    assert all(two_ranks(moments_reset, config=make_config(zero={"stage": stage})))


class FlipBit(Injector):
    """Flips the highest exponent bit of one value in the live state, on one rank, after one update."""

    def __init__(self, key: str | None, at: int):
        self.key, self.at, self.num = key, at, 0

    def updated(self, engine: Engine) -> None:
        self.num += 1
        if self.key is None or self.num != self.at:
            return
        tensors, _ = read_state(engine)
        values = tensors[f"flat.0.{self.key}"].view(-1)
        # a value whose highest exponent bit is 0, as that of every number below 2
        index = int(((values.abs() > 0) & (values.abs() < 2)).nonzero()[0])
        values.view(torch.int32)[index] ^= 1 << 30


def audited(rank: int, world_size: int, config: RunConfig, key: str | None, rates: list[float], keep: int = 3) -> Any:
    engine = make_engine(config, rank, world_size, injector=FlipBit(key if rank == 1 else None, 4))
    ring = SnapshotRing(engine, keep=keep)
    ring.take(0, {})
    asked = []
    for index, rate in enumerate(rates):
        asked.append(ring.impossible())
        engine.accumulate(make_batch(config, index, rank, world_size), attempt=1, step=1, impossible=asked[-1])
        ring.fence()
        engine.apply(config.optim.clip, rate)
        if index % 2:
            ring.take(index + 1, {})
    asked += [ring.impossible(), ring.impossible()]
    return asked, ring.audit.first


@pytest.mark.parametrize("key", ["master", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_flipped_exponent_bit_is_found_and_named(two_ranks: RankPool, stage: int, key: str) -> None:
    config = make_config(zero={"stage": stage})
    clean, (asked, first) = two_ranks(audited, config=config, key=key, rates=[LR] * 4)
    assert clean == ([0] * 6, "")
    # taken after step 4: the first question after it is answered from the snapshot before, the second waits
    assert asked[:-1] == [0] * 5
    assert asked[-1] >= 1
    assert first.startswith(f"{key} of transformer.")


CLEAN = [
    pytest.param({}, [LR] * 12, id="plain"),
    pytest.param({}, [0.0, 0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.1, 0.05, 0.0, 0.0, 1e-3, 1e-3], id="warm-up"),
    pytest.param({"optim": {"clip": 0.0}}, [3e-2] * 12, id="no clipping"),
    pytest.param({"precision": "bf16"}, [LR] * 12, id="bf16"),
    pytest.param({"optim": {"betas": (0.9, 0.999), "weight_decay": 0.5}}, [0.1] * 12, id="large steps"),
    pytest.param({"optim": {"betas": (0.95, 0.9)}}, [0.1] * 12, id="nothing bounds the update"),
    pytest.param({"optim": {"betas": (0.0, 0.0), "eps": 1e-12}}, [LR] * 12, id="no memory"),
]


@pytest.mark.parametrize(("changes", "rates"), CLEAN)
@pytest.mark.parametrize(("stage", "keep"), [(0, 3), (2, 1), (3, 2)])
def test_clean_training_never_looks_impossible(
    two_ranks: RankPool, changes: dict[str, Any], rates: list[float], stage: int, keep: int
) -> None:
    config = make_config(**changes, zero={"stage": stage})
    for asked, first in two_ranks(audited, config=config, key=None, rates=rates, keep=keep):
        assert set(asked) == {0}, first


def not_finite(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    engine.shards.flats()[0][3] = math.inf if rank else math.nan
    ring = SnapshotRing(engine, keep=1)
    ring.take(0, {})
    ring.impossible()
    return ring.impossible()


def test_the_first_snapshot_is_looked_through_too(two_ranks: RankPool) -> None:
    assert two_ranks(not_finite, config=make_config()) == [1, 1]


def held_while_training(rank: int, world_size: int, config: RunConfig) -> Any:
    """Copies of steps 2 (a snapshot), 3 (a copy of its own) and 4 held while the ring turns over under them."""
    engine = make_engine(config, rank, world_size, dropout=0.1)
    ring = SnapshotRing(engine, keep=1, spare=2)
    ring.take(0, {})
    kept = {}
    for index in range(6):
        if index == 2:
            ring.take(2, {})
        if index in (2, 3):
            live, numbers = read_state(engine)
            kept[index] = ({name: tensor.clone() for name, tensor in live.items()}, numbers, ring.hold(index))
        elif index > 3:
            ring.take(index, {})
        step(engine, config, index, rank, world_size, ring)
    same = [
        all(torch.equal(tensors[name], held.state()[0][name]) for name in tensors) and numbers == held.state()[1]
        for tensors, numbers, held in kept.values()
    ]
    memory = ring.num_bytes
    for _, _, held in kept.values():
        held.release()
    ring.take(6, {})
    ring.hold(6).release()
    assert ring.hold(6).state()[0].keys() == ring.hold(6).state()[0].keys()
    shared = ring.num_bytes == memory, ring.steps()
    ring.close()
    return same, shared


@pytest.mark.parametrize("stage", STAGES)
def test_a_held_copy_stays_while_training_goes_on(two_ranks: RankPool, stage: int) -> None:
    config = make_config(zero={"stage": stage})
    for same, (no_more_memory, steps) in two_ranks(held_while_training, config=config):
        assert same == [True, True]
        assert no_more_memory
        assert steps == [6]


def held_and_harmed(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    ring = SnapshotRing(engine, keep=1, spare=1)
    ring.take(0, {})
    held = ring.hold(0)
    tensors, _ = held.state()
    next(iter(tensors.values()))[0] += 1.0
    try:
        held.state()
    except CheckpointError as error:
        return str(error)
    finally:
        held.release()
        ring.close()
    return None


def test_a_copy_that_changed_in_memory_is_not_saved(two_ranks: RankPool) -> None:
    for text in two_ranks(held_and_harmed, config=make_config()):
        assert "has changed since it was made; nothing was saved from it" in text


def held_after_reset(rank: int, world_size: int, config: RunConfig) -> Any:
    """The moments were begun anew since the snapshot: it is no copy of the live state any more."""
    engine = make_engine(config, rank, world_size)
    ring = SnapshotRing(engine, keep=1, spare=1)
    step(engine, config, 0, rank, world_size, ring)
    ring.take(1, {})
    reset_moments(engine)
    held = ring.hold(1)
    ring.fence()
    tensors, _ = held.state()
    live, _ = read_state(engine)
    result = all(torch.equal(live[name], tensors[name]) for name in live)
    held.release()
    ring.close()
    return result


def test_what_is_held_is_the_live_state_even_where_no_update_changed_it(two_ranks: RankPool) -> None:
    assert two_ranks(held_after_reset, config=make_config()) == [True, True]
