"""What the engine tells besides the gradient: losses without one, each rank's own share, checksums, logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import RankPool
from torch import Tensor
from workload import cross_entropy, global_batch, make_batch, make_config, make_engine, make_model, weights

from trainer.config.schema import RunConfig
from trainer.engine.injection import Injector
from trainer.engine.state import read_state
from trainer.engine.zero import Engine

STAGES = [0, 1, 2, 3]
LR = 3e-3


def probed(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size, dropout=0.2)
    batch = make_batch(config, 1, rank, world_size, ragged=True)
    before = weights(engine)
    probe, samples = engine.probe(batch), engine.sample_losses(batch)
    stats = engine.accumulate(batch, attempt=1, step=1)
    after = weights(engine)
    same = all(np.array_equal(before[name], after[name]) for name in before)
    engine.apply(config.optim.clip, LR)
    return probe, samples, stats, same, engine.probe(batch)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_probe_is_the_loss_to_the_bit(two_ranks: RankPool, stage: int, precision: str) -> None:
    config = make_config(zero={"stage": stage}, precision=precision)
    _, labels = global_batch(config, 1, ragged=True)
    num_targets = (labels >= 0).sum(axis=1)
    first, second = two_ranks(probed, config=config)
    for probe, samples, stats, same, later in (first, second):
        assert probe == stats.loss == sum(stats.ranks.losses)
        assert same
        assert later < probe
        assert (samples * num_targets).sum() / num_targets.sum() == pytest.approx(stats.loss, rel=1e-6)
    assert np.array_equal(first[1], second[1])


def test_a_probe_is_the_loss_to_the_bit_on_four_ranks(four_ranks: RankPool) -> None:
    for probe, _, stats, _, _ in four_ranks(probed, config=make_config()):
        assert probe == stats.loss


def with_z_loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    partition = torch.logsumexp(logits.float(), -1).square()[labels >= 0].sum()
    return cross_entropy(logits, labels) | {"z_loss": 0.1 * partition}


def sample_losses(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size, objective=with_z_loss, parts=("z_loss",))
    batch = make_batch(config, 0, rank, world_size, ragged=True)
    for arrays in batch.micro_batches:
        if rank == 1:
            arrays["labels"][-1] = -100
    return engine.sample_losses(batch)


@pytest.mark.parametrize("stage", STAGES)
def test_sample_losses_equal_a_dense_reference(two_ranks: RankPool, stage: int) -> None:
    config = make_config(zero={"stage": stage})
    ids, labels = global_batch(config, 0, ragged=True)
    logits = make_model()(input_ids=torch.from_numpy(ids)).logits
    targets = torch.from_numpy(labels)
    expected = [F.cross_entropy(row, target).item() for row, target in zip(logits, targets, strict=True)]
    # the last sample of rank 1's micro-batches of 2: places 3 and 7
    expected[3] = expected[7] = 0.0
    for found in two_ranks(sample_losses, config=config):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class TimesThousand(Injector):
    """Multiplies one parameter's own gradient on one rank, and counts what it sees."""

    active = True

    def __init__(self, factor: float):
        self.factor, self.seen = factor, [0] * 200

    def local_gradient(self, parameter: int, gradient: Tensor) -> Tensor:
        self.seen[parameter] += 1
        return gradient * self.factor if parameter == 2 else gradient


def local_norms(rank: int, world_size: int, config: RunConfig, factor: float, checkpointing: bool) -> Any:
    injector = TimesThousand(factor if rank == 1 else 1.0)
    engine = make_engine(config, rank, world_size, injector=injector)
    if checkpointing:
        engine.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        assert engine.module.is_gradient_checkpointing
    batch = make_batch(config, 0, rank, world_size, ragged=True)
    stats = engine.accumulate(batch, attempt=1, step=1)
    return stats, injector.seen[: len(engine.names)]


def dense_local_norms(config: RunConfig, world_size: int, factor: float) -> list[float]:
    """√Σ over micro-batches of ‖∇(the micro-batch's summed loss)/(targets of the global batch)‖² of each rank."""
    result = []
    for rank in range(world_size):
        batch, total = make_batch(config, 0, rank, world_size, ragged=True), 0.0
        for arrays in batch.micro_batches:
            model = make_model()
            logits = model(input_ids=torch.from_numpy(arrays["input_ids"])).logits
            (cross_entropy(logits, torch.from_numpy(arrays["labels"]))["loss"] / batch.num_targets).backward()
            for index, parameter in enumerate(model.parameters()):
                assert parameter.grad is not None
                scale = factor if index == 2 and rank == 1 else 1.0
                total += float((scale * parameter.grad.double()).square().sum())
        result.append(math.sqrt(total))
    return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_own_gradient_norms_equal_a_dense_reference(two_ranks: RankPool, stage: int, checkpointing: bool) -> None:
    config = make_config(zero={"stage": stage})
    expected = dense_local_norms(config, 2, factor=1000.0)
    for stats, seen in two_ranks(local_norms, config=config, factor=1000.0, checkpointing=checkpointing):
        # two micro-batches a rank; the output head is tied to the embedding
        assert set(seen) == {2}
        np.testing.assert_allclose(stats.ranks.grad_norms, expected, rtol=1e-5)
        # the fault went into the sum of the ranks
        assert stats.parameter_norms[2] > 1


def not_a_number_on_one_rank(rank: int, world_size: int, config: RunConfig) -> Any:
    injector = TimesThousand(math.nan if rank == 1 else 1.0)
    engine = make_engine(config, rank, world_size, injector=injector)
    return engine.accumulate(make_batch(config, 0, rank, world_size), attempt=1, step=1)


def test_a_rank_that_computed_not_a_number_is_told_from_the_others(two_ranks: RankPool) -> None:
    for stats in two_ranks(not_a_number_on_one_rank, config=make_config()):
        assert np.isnan(stats.ranks.grad_norms).tolist() == [False, True]
        assert math.isnan(stats.grad_norm)
        assert stats.num_nonfinite == 32


def replicated(engine: Engine) -> list[Tensor]:
    """What all ranks hold alike, said once more without the engine's own list."""
    parameters: list[Any] = list(engine.module.parameters())
    if engine.stage == 3:
        return [parameter.data for parameter in parameters if parameter.ds_persist]
    state = list(read_state(engine)[0].values()) if engine.stage == 0 else []
    return [parameter.data for parameter in parameters] + state


def checksums(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    batch = make_batch(config, 0, rank, world_size)
    clean = []
    for _ in range(3):
        clean.append(engine.accumulate(batch, attempt=1, step=1, checksum=True, impossible=10 * rank).ranks)
        engine.apply(config.optim.clip, LR)
    without = engine.accumulate(batch, attempt=1, step=1).ranks.checksums.tolist()
    engine.discard()
    whole = engine.replica_checksum()
    flipped = []
    for tensor in replicated(engine):
        data = tensor.detach().view(-1).view(torch.uint8)
        data[-1] ^= 1
        flipped.append(engine.replica_checksum() != whole)
        data[-1] ^= 1
    if rank == 1:
        replicated(engine)[0].view(-1).view(torch.uint8)[0] ^= 1
    harmed = engine.accumulate(batch, attempt=1, step=1, checksum=True).ranks.checksums
    return clean, without, flipped, harmed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_flipped_bit_of_a_replica_shows_in_the_checksums(two_ranks: RankPool, stage: int, precision: str) -> None:
    config = make_config(zero={"stage": stage}, precision=precision)
    for clean, without, flipped, harmed in two_ranks(checksums, config=config):
        values = [ranks.checksums[0] for ranks in clean]
        assert all(ranks.checksums[0] == ranks.checksums[1] for ranks in clean)
        assert len(set(values)) == 3
        assert all(0 < value < 2**52 and value == int(value) for value in values)
        assert clean[0].impossible.tolist() == [0, 10]
        assert without == [0, 0]
        assert len(flipped) >= 10
        assert all(flipped)
        assert harmed[0] != harmed[1]


def observed(rank: int, world_size: int, config: RunConfig, observe: bool) -> Any:
    engine = make_engine(config, rank, world_size)
    structure = None
    for index in range(3):
        if observe:
            engine.observe_next()
        engine.accumulate(make_batch(config, index, rank, world_size), attempt=1, step=1)
        if observe:
            _, measured = engine.apply_measured(config.optim.clip, LR)
            structure = structure or engine.structure(measured)
        else:
            engine.apply(config.optim.clip, LR)
    return structure, weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_logits_are_observed_without_changing_a_bit(two_ranks: RankPool, stage: int) -> None:
    config = make_config(zero={"stage": stage})
    ids, _ = global_batch(config, 0)
    model: Any = make_model()
    queries: list[Tensor] = []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda _module, _inputs, output: queries.append(output.detach()))
    logits = model(input_ids=torch.from_numpy(ids)).logits
    expected = []
    for fused in queries:
        query, key, _ = (part.unflatten(-1, (2, 16)).norm(dim=-1).max().item() for part in fused.chunk(3, dim=-1))
        expected.append(query * key / 4)
    bare = two_ranks(observed, config=config, observe=False)[0][1]
    for structure, found in two_ranks(observed, config=config, observe=True):
        np.testing.assert_allclose(structure.attention_logits, expected, rtol=1e-5)
        assert structure.output_logits == pytest.approx(logits.abs().max().item(), rel=1e-5)
        assert structure.parameter_norms.shape == structure.update_ratios.shape == (len(bare),)
        assert all(np.array_equal(found[name], bare[name]) for name in bare)
