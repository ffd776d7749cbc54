"""What is trained and how, under ZeRO 0 to 3: against dense references, and to the bit after rollback and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import RankPool
from tuned import LR, advance, open_engine, publish, tuned
from workload import VOCABULARY, global_batch, weights

from trainer.config.schema import RunConfig
from trainer.engine.snapshot import SnapshotRing
from trainer.engine.state import read_state, write_state
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError
from trainer.model.build import build_model
from trainer.model.depth import distances
from trainer.model.groups import parameter_facts

STAGES = [0, 1, 2, 3]
STEPS = 4
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(tmp_path_factory.mktemp("pretrained"))


def bits(engine: Engine) -> dict[str, bytes]:
    """Everything that a later step depends on."""
    tensors, numbers = read_state(engine)
    result = {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    return result | {name: value.tobytes() for name, value in weights(engine).items()} | {"": repr(numbers).encode()}


def averaged(engine: Engine) -> dict[str, np.ndarray]:
    with engine.averaged():
        return weights(engine)


def train(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = open_engine(config, rank, world_size)
    losses = advance(engine, config, rank, world_size, 0, STEPS)
    return losses, weights(engine), averaged(engine), engine.names


def dense(config: RunConfig) -> Any:
    """The same in one process without DeepSpeed, by torch's own parts."""
    model = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)
    optim, below = config.optim, distances(model)
    facts = parameter_facts(model)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [named[fact.name]],
                "lr": LR * optim.layer_decay ** below[fact.name],
                "weight_decay": optim.weight_decay if fact.decay else 0.0,
            }
            for fact in facts
        ],
        betas=optim.betas,
        eps=optim.eps,
    )
    starts = {fact.name: named[fact.name].detach().clone() for fact in facts if fact.decay}
    multi = torch.optim.swa_utils.get_ema_multi_avg_fn(optim.ema or 0.0)
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=multi)
    mean.update_parameters(model)
    losses = []
    for index in range(STEPS):
        ids, labels = global_batch(config, index)
        logits = model(input_ids=torch.from_numpy(ids)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())
        losses.append(loss.item())
        pull = sum((named[name] - start).square().sum() for name, start in starts.items())
        (loss + 0.5 * config.objective.l2_start * pull).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        mean.update_parameters(model)
    means = {name: each.detach().numpy() for name, each in mean.module.named_parameters()}
    return losses, {name: each.detach().numpy() for name, each in named.items()}, means


WAYS: dict[str, dict[str, Any]] = {
    "layer-decay": {"optim": {"layer_decay": 0.5}},
    "ema": {"optim": {"ema": 0.8}},
    "l2-start": {"objective": {"l2_start": 0.5}},
    "lora": {"lora": LORA},
    "frozen": {"optim": {"freeze": ("layers:1", "*.ln_f.*")}},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", WAYS)
def test_equals_a_dense_reference(two_ranks: RankPool, pretrained: str, way: str, stage: int) -> None:
    config = tuned(pretrained, stage, **WAYS[way])
    expected, last, means = dense(config)
    for losses, found, mean, names in two_ranks(train, config=config):
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert set(names) <= found.keys() == last.keys()
        assert (way in ("lora", "frozen")) == (len(names) < len(found))
        for name, value in last.items():
            np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
            if way == "ema":
                np.testing.assert_allclose(mean[name], means[name], atol=2e-5, err_msg=name)


EVERYTHING: dict[str, Any] = {
    "lora": LORA | {"dropout": 0.1},
    "optim": {"ema": 0.8, "layer_decay": 0.5, "freeze": ("*.1.mlp.*",)},
    "objective": {"l2_start": 0.5},
}


def there_and_back(rank: int, world_size: int, config: RunConfig) -> Any:
    """Straight on; gone back to a snapshot; resumed in another engine; an evaluation on the way."""
    engine = open_engine(config, rank, world_size)
    ring = SnapshotRing(engine, keep=2)
    advance(engine, config, rank, world_size, 0, 2)
    tensors, numbers = read_state(engine)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}, numbers
    ring.take(2, {})
    before = bits(engine)
    ids, labels = global_batch(config, 9)
    found = engine.evaluate([{"input_ids": ids, "labels": labels}])
    assert found is not None
    untouched = bits(engine) == before
    advance(engine, config, rank, world_size, 2, STEPS)
    straight = bits(engine)
    assert ring.restore(2) is not None
    restored = bits(engine) == before
    advance(engine, config, rank, world_size, 2, STEPS)
    back = bits(engine) == straight
    ring.close()
    other = open_engine(config, rank, world_size)
    write_state(other, *saved)
    resumed = bits(other) == before
    advance(other, config, rank, world_size, 2, STEPS)
    return untouched, restored, back, resumed, bits(other) == straight, found.loss


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_back_and_resumed_to_the_bit(two_ranks: RankPool, pretrained: str, stage: int, precision: str) -> None:
    config = tuned(pretrained, stage, precision=precision, **EVERYTHING)
    for *same, loss in two_ranks(there_and_back, config=config):
        assert same == [True] * 5
        assert np.isfinite(loss)


def evaluated(rank: int, world_size: int, config: RunConfig) -> Any:
    """(loss of an evaluation, loss of the same batch with the averaged weights put in by hand)."""
    engine = open_engine(config, rank, world_size)
    advance(engine, config, rank, world_size, 0, STEPS)
    ids, labels = global_batch(config, 9)
    found = engine.evaluate([{"input_ids": ids, "labels": labels}])
    assert found is not None
    model = build_model(
        config.model_copy(update={"zero": config.zero.model_copy(update={"stage": 0})}),
        vocabulary=VOCABULARY,
        zero3=None,
        dtype=torch.float32,
    )
    model.load_state_dict({name: torch.from_numpy(value) for name, value in averaged(engine).items()}, strict=False)
    model.tie_weights()
    logits = model(input_ids=torch.from_numpy(ids)).logits
    by_hand = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())
    plain = engine.average
    engine.average = None
    without = engine.evaluate([{"input_ids": ids, "labels": labels}])
    engine.average = plain
    assert without is not None
    return found.loss, by_hand.item(), without.loss


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluations_use_the_average(two_ranks: RankPool, pretrained: str, stage: int) -> None:
    for loss, by_hand, without in two_ranks(evaluated, config=tuned(pretrained, stage, optim={"ema": 0.9})):
        assert loss == pytest.approx(by_hand, rel=1e-5)
        assert abs(loss - without) > 1e-3


def flipped(rank: int, world_size: int, config: RunConfig) -> list[float]:
    """Checksums before and after one bit of a frozen weight flips on rank 1."""
    engine = open_engine(config, rank, world_size)
    before = engine.replica_checksum()
    frozen = next(each for each in engine.module.parameters() if not each.requires_grad)
    held = getattr(frozen, "ds_tensor", frozen).data.view(-1)
    if rank == 1:
        held.view(torch.int32)[3] ^= 1 << 7
    return [before, engine.replica_checksum()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_flipped_bit_of_a_frozen_weight_shows(two_ranks: RankPool, pretrained: str, stage: int) -> None:
    (one, still), (other, changed) = two_ranks(flipped, config=tuned(pretrained, stage, lora=LORA))
    assert one == other == still
    assert changed != still


def memory(rank: int, world_size: int, config: RunConfig) -> tuple[int, int, int]:
    """(parameters, trained ones, bytes of master weights and moments on this rank)."""
    engine = open_engine(config, rank, world_size)
    advance(engine, config, rank, world_size, 0, 1)
    tensors, _ = read_state(engine)
    total = sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters())
    trained = sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters() if each.requires_grad)
    return total, trained, sum(each.nbytes for name, each in tensors.items() if name.startswith("flat."))


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_cost_no_optimizer_state(two_ranks: RankPool, pretrained: str, stage: int) -> None:
    for total, trained, num_bytes in two_ranks(memory, config=tuned(pretrained, stage, lora=LORA)):
        assert trained < total / 4
        share = trained if stage == 0 else trained / 2
        assert num_bytes == pytest.approx(12 * share, rel=0.05)


def resharded(rank: int, world_size: int, config: RunConfig, others: list[RunConfig], folder: Path) -> Any:
    """Saved by one, resumed by others: how much of masters and averages differs."""
    from test_elastic import load, manifest_of, open_store

    engine = open_engine(config, rank, world_size)
    advance(engine, config, rank, world_size, 0, 2)
    store = open_store(engine, folder, rank, world_size)
    store.save(read_state(engine), manifest_of(engine, config, 2, world_size))
    store.close()
    expected = weights(engine), averaged(engine)
    same = []
    for other in others:
        resumed = open_engine(other, rank, world_size)
        write_state(resumed, *load(resumed, folder, rank, world_size)[2])
        found = weights(resumed), averaged(resumed)
        same.append([all(np.array_equal(a[name], b[name]) for name in a) for a, b in zip(expected, found, strict=True)])
    return same


@pytest.mark.parametrize(("stage", "others"), [(2, (0, 3)), (3, (1,))])
def test_goes_on_in_another_stage(
    two_ranks: RankPool, pretrained: str, tmp_path: Path, stage: int, others: tuple[int, ...]
) -> None:
    config = tuned(pretrained, stage, **EVERYTHING)
    resumed = [tuned(pretrained, other, **EVERYTHING) for other in others]
    for same in two_ranks(resharded, config=config, others=resumed, folder=tmp_path):
        assert same == [[True, True]] * len(others)


def refused(rank: int, world_size: int, config: RunConfig, other: RunConfig) -> list[str]:
    """What is said to the state of one run in an engine of another."""
    engine = open_engine(config, rank, world_size)
    tensors, numbers = read_state(engine)
    texts = []
    another = open_engine(other, rank, world_size)
    before = bits(another)
    for state in ((tensors, numbers), ({k: v for k, v in tensors.items() if not k.endswith("ema")}, numbers)):
        try:
            write_state(another if state[0] is tensors else engine, *state)
        except CheckpointError as error:
            texts.append(str(error))
    assert bits(another) == before
    return texts


BASES = {
    "lora": {"lora": LORA, "optim": {"ema": 0.9}},
    "l2-start": {"objective": {"l2_start": 0.1}, "optim": {"ema": 0.9}},
}


@pytest.mark.parametrize("way", BASES)
def test_another_base_is_refused(two_ranks: RankPool, pretrained: str, tmp_path: Path, way: str) -> None:
    other = tuned(publish(tmp_path, seed=4), 1, **BASES[way])
    for base, average in two_ranks(refused, config=tuned(pretrained, 1, **BASES[way]), other=other):
        assert "model.pretrained has changed" in base
        assert "lacks the tensor 'flat.0.ema'" in average
