"""The engine against a dense single-process reference and against a bare DeepSpeed loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import RankPool
from workload import (
    OTHER_SETTINGS,
    cross_entropy,
    global_batch,
    make_batch,
    make_config,
    make_engine,
    make_model,
    make_optimizer,
    weights,
)

from trainer.config.schema import RunConfig
from trainer.objectives import LogitObjective

STAGES = [0, 1, 2, 3]
LR = 3e-3


def train(
    rank: int,
    world_size: int,
    config: RunConfig,
    steps: int,
    dropout: float = 0.0,
    ragged: bool = False,
    **options: Any,
) -> dict[str, Any]:
    engine = make_engine(config, rank, world_size, **options)
    stats = []
    for index in range(steps):
        stats.append(
            engine.accumulate(
                make_batch(config, index, rank, world_size, ragged=ragged), attempt=index + 1, step=index + 1
            )
        )
        engine.apply(config.optim.clip, LR)
    return {"stats": stats, "weights": weights(engine), "names": engine.names}


def dense(config: RunConfig, steps: int, ragged: bool = False) -> dict[str, Any]:
    """The same training in one process without DeepSpeed: the whole batch in one pass."""
    model = make_model()
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = LR
    losses, norms = [], []
    for index in range(steps):
        ids, labels = global_batch(config, index, ragged=ragged)
        logits = model(input_ids=torch.from_numpy(ids)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())
        loss.backward()
        losses.append(loss.item())
        norms.append([p.grad.norm().item() for p in model.parameters()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: p.detach().numpy().copy() for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ragged", [False, True])
def test_equals_a_dense_reference(two_ranks: RankPool, stage: int, ragged: bool) -> None:
    # Adam with a tiny epsilon turns rounding noise of near-zero gradients into whole updates
    config = make_config(zero={"stage": stage}, optim={"eps": 1e-3})
    expected = dense(config, 4, ragged)
    for result in two_ranks(train, config=config, steps=4, ragged=ragged):
        for stats, loss, norms in zip(result["stats"], expected["losses"], expected["norms"], strict=True):
            assert stats.loss == pytest.approx(loss, rel=1e-5)
            np.testing.assert_allclose(stats.parameter_norms, norms, rtol=1e-5, atol=1e-8)
            assert stats.grad_norm == pytest.approx(float(np.linalg.norm(norms)), rel=1e-5)
            assert stats.num_nonfinite == 0
            assert stats.agree
        for name, value in expected["weights"].items():
            np.testing.assert_allclose(result["weights"][name], value, atol=2e-5)


def bare_loop(rank: int, world_size: int, config: RunConfig, steps: int) -> dict[str, np.ndarray]:
    """What a user of DeepSpeed writes: forward, `backward`, `step`; nothing of ours but the config."""
    import deepspeed

    from trainer.config.resolve import deepspeed_config

    precision = config.precision
    assert precision != "auto"
    from workload import DTYPES

    model = make_model(dtype=DTYPES[precision])
    ds_config = deepspeed_config(config, world_size, "cpu", precision)
    if config.zero.stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=ds_config, dtype=DTYPES[precision])
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, config), config=ds_config)
    for index in range(steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = LR
        for micro in make_batch(config, index, rank, world_size).micro_batches:
            logits = engine(input_ids=torch.from_numpy(micro["input_ids"])).logits
            labels = torch.from_numpy(micro["labels"])
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            engine.backward(loss)
            engine.step()

    class View:
        module = engine.module
        stage = config.zero.stage

    return weights(View)  # type: ignore[arg-type]


EVERY_SETTING = [
    *(pytest.param({"stage": stage}, precision) for stage in STAGES for precision in ("fp32", "bf16")),
    *OTHER_SETTINGS,
]


@pytest.mark.parametrize(("zero", "precision"), EVERY_SETTING)
def test_the_same_bits_as_a_bare_deepspeed_loop(two_ranks: RankPool, zero: dict[str, Any], precision: str) -> None:
    config = make_config(zero=zero, precision=precision)
    ours = two_ranks(train, config=config, steps=6)[0]["weights"]
    theirs = two_ranks(bare_loop, config=config, steps=6)[0]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]), name


def train_with_discards(
    rank: int, world_size: int, config: RunConfig, steps: int, discarded: tuple[int, ...]
) -> dict[str, np.ndarray]:
    engine = make_engine(config, rank, world_size, dropout=0.1)
    for index in range(steps):
        engine.accumulate(make_batch(config, index, rank, world_size), attempt=index, step=index)
        if index in discarded:
            engine.discard()
        else:
            engine.apply(config.optim.clip, LR)
    return weights(engine)


def train_without(
    rank: int, world_size: int, config: RunConfig, steps: int, discarded: tuple[int, ...]
) -> dict[str, np.ndarray]:
    engine = make_engine(config, rank, world_size, dropout=0.1)
    for index in range(steps):
        if index not in discarded:
            engine.accumulate(make_batch(config, index, rank, world_size), attempt=index, step=index)
            engine.apply(config.optim.clip, LR)
    return weights(engine)


@pytest.mark.parametrize(("zero", "precision"), EVERY_SETTING)
def test_a_discarded_batch_was_never_seen(two_ranks: RankPool, zero: dict[str, Any], precision: str) -> None:
    config = make_config(zero=zero, precision=precision)
    arguments = {"config": config, "steps": 6, "discarded": (0, 3)}
    with_veto = two_ranks(train_with_discards, **arguments)[0]
    without = two_ranks(train_without, **arguments)[0]
    for name in without:
        assert np.array_equal(with_veto[name], without[name]), name


def nonfinite(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    before = weights(engine)
    batch = make_batch(config, 0, rank, world_size)
    original = engine._objective
    engine._objective = LogitObjective(
        lambda logits, labels: {"loss": cross_entropy(logits, labels)["loss"] * float("nan")}
    )
    bad = engine.accumulate(batch, attempt=1, step=1)
    engine.discard()
    after = weights(engine)
    engine._objective = original
    good = engine.accumulate(batch, attempt=2, step=1)
    same = all(np.array_equal(before[name], after[name]) for name in before)
    num_elements = sum(value.size for value in before.values())
    return bad, good, same, num_elements


@pytest.mark.parametrize("stage", STAGES)
def test_nonfinite_gradients_are_counted_and_leave_no_trace(two_ranks: RankPool, stage: int) -> None:
    config = make_config(zero={"stage": stage})
    for bad, good, same, num_elements in two_ranks(nonfinite, config=config):
        assert math.isnan(bad.loss)
        assert math.isnan(bad.grad_norm)
        assert bad.num_nonfinite == num_elements
        assert same
        assert math.isfinite(good.loss)
        assert good.num_nonfinite == 0


def huge(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    engine._objective = LogitObjective(lambda logits, labels: {"loss": cross_entropy(logits, labels)["loss"] * 1e25})
    return engine.accumulate(make_batch(config, 0, rank, world_size), attempt=1, step=1)


def test_a_norm_beyond_single_precision_is_still_a_number(two_ranks: RankPool) -> None:
    """Squares of elements around 1e24 overflow fp32; the elements are finite, and so is their norm."""
    config = make_config(zero={"stage": 2})
    for stats in two_ranks(huge, config=config):
        assert stats.num_nonfinite == 0
        assert 1e24 < stats.grad_norm < 1e27


def votes(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    batch = make_batch(config, 0, rank, world_size)
    same = engine.accumulate(batch, attempt=1, step=1, stop=rank == 1, decision=40000)
    engine.discard()
    differ = engine.accumulate(batch, attempt=2, step=1, decision=40000 + rank)
    return same, differ


def test_votes_and_disagreement_ride_in_the_same_message(two_ranks: RankPool) -> None:
    for same, differ in two_ranks(votes, config=make_config(zero={"stage": 1})):
        assert (same.stop_votes, same.agree) == (1, True)
        assert (differ.stop_votes, differ.agree) == (0, False)
        assert (differ.ranks.seconds > 0).all()


def penalised(rank: int, world_size: int, config: RunConfig) -> Any:
    def penalty(weight: torch.Tensor, _: torch.Tensor | None) -> Any:
        return 0.01 * weight.sign() + 0.1 * weight, {
            "l1": 0.01 * weight.abs().sum(),
            "l2": 0.05 * weight.square().sum(),
        }

    engine = make_engine(config, rank, world_size, penalty=penalty, penalties=("l1", "l2"))
    stats = engine.accumulate(make_batch(config, 0, rank, world_size), attempt=1, step=1)
    engine.apply(config.optim.clip, LR)
    return stats, weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_penalties_equal_a_dense_reference(two_ranks: RankPool, stage: int) -> None:
    from workload import decays

    config = make_config(zero={"stage": stage})
    model = make_model()
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = LR
    ids, labels = global_batch(config, 0)
    loss = F.cross_entropy(
        model(input_ids=torch.from_numpy(ids)).logits.flatten(0, 1), torch.from_numpy(labels).flatten()
    )
    decayed = [p for name, p in model.named_parameters() if decays(name, p)]
    l1 = 0.01 * sum(p.abs().sum() for p in decayed)
    l2 = 0.05 * sum(p.square().sum() for p in decayed)
    (loss + l1 + l2).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    optimizer.step()
    expected = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for stats, found in two_ranks(penalised, config=config):
        assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
        assert stats.parts == pytest.approx({"l1": l1.item(), "l2": l2.item()}, rel=1e-5)
        assert stats.grad_norm == pytest.approx(float(norm), rel=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-5)


def losses(rank: int, world_size: int, config: RunConfig) -> list[float]:
    return [stats.loss for stats in train(rank, world_size, config, 5)["stats"]]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_other_numbers_of_ranks_and_micro_batches_agree(two_ranks: RankPool, four_ranks: RankPool, stage: int) -> None:
    """Same samples, same mean over the global batch: only the order of sums differs."""
    options = {"zero": {"stage": stage}, "optim": {"eps": 1e-3}}
    expected = two_ranks(losses, config=make_config(**options))[0]
    other_micro = two_ranks(losses, config=make_config(**options, batch={"samples": 8, "micro": 1}))[0]
    more_ranks = four_ranks(losses, config=make_config(**options))
    assert other_micro == pytest.approx(expected, rel=1e-5)
    for found in more_ranks:
        assert found == pytest.approx(expected, rel=1e-5)


def weights_measured(rank: int, world_size: int, config: RunConfig) -> Any:
    engine = make_engine(config, rank, world_size)
    before = weights(engine)
    engine.accumulate(make_batch(config, 0, rank, world_size), attempt=1, step=1)
    applied, measured = engine.apply_measured(config.optim.clip, LR)
    return applied, measured, before, weights(engine), engine.names


@pytest.mark.parametrize("stage", STAGES)
def test_weight_norms_and_update_ratios(two_ranks: RankPool, stage: int) -> None:
    for applied, measured, before, after, names in two_ranks(
        weights_measured, config=make_config(zero={"stage": stage})
    ):
        assert applied
        for index, name in enumerate(names):
            norm, update = np.linalg.norm(after[name]), np.linalg.norm(after[name] - before[name])
            assert measured.parameter_norms[index] == pytest.approx(norm, rel=1e-5)
            assert measured.update_ratios[index] == pytest.approx(update / norm, rel=1e-3)


def held_out(rank: int, world_size: int, config: RunConfig, num_samples: int) -> Any:
    """Evaluates samples that do not divide: places left empty have no labels, as the stream gives them."""
    engine = make_engine(config, rank, world_size)
    ids, labels = global_batch(config, 0, ragged=True)
    micro = 2
    batches = []
    for first in range(0, num_samples, micro * world_size):
        places = first + rank * micro + np.arange(micro)
        rows = np.minimum(places, num_samples - 1)
        here = labels[rows].copy()
        here[places >= num_samples] = -100
        batches.append({"input_ids": ids[rows], "labels": here})
    before = engine.accumulate(make_batch(config, 1, rank, world_size), attempt=1, step=1)
    found = engine.evaluate(batches)
    engine.discard()
    return found, before


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("num_samples", [5, 8])
def test_held_out_loss_is_exact_whatever_the_remainder(
    two_ranks: RankPool, four_ranks: RankPool, stage: int, num_samples: int
) -> None:
    config = make_config(zero={"stage": stage})
    ids, labels = global_batch(config, 0, ragged=True)
    model = make_model()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids[:num_samples])).logits
        targets = torch.from_numpy(labels[:num_samples])
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    for pool in (two_ranks, four_ranks):
        right = (logits.argmax(-1) == targets).sum() / (targets >= 0).sum()
        for found, _ in pool(held_out, config=config, num_samples=num_samples):
            assert found.num_targets == int((labels[:num_samples] >= 0).sum())
            assert found.loss == pytest.approx(expected, rel=1e-6)
            assert found.scores == {"accuracy": pytest.approx(right.item())}
