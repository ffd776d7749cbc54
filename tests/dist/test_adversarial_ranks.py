"""Adversarial training and mixup under ZeRO: gradients against one process in double precision, a sample at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from moved import SAMPLES, adversarial_loss, alone, batch_of, config_of, gradient, make, whole
from pool import RankPool
from workload import FP16

from trainer.config.schema import RunConfig

METHODS: dict[str, dict[str, Any]] = {
    "fgm": {"adversarial": {"kind": "fgm", "epsilon": 0.5, "weight": 0.7}},
    "pgd": {"adversarial": {"kind": "pgd", "epsilon": 0.5, "steps": 3}},
    "freelb": {"adversarial": {"kind": "freelb", "epsilon": 0.5, "steps": 3, "step": 0.4}},
    "mixup": {"mixup": 0.4},
    "mixup and pgd": {"mixup": 0.4, "adversarial": {"kind": "pgd", "epsilon": 0.5, "steps": 2}},
}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(results: list[dict[str, Any]], config: RunConfig, batch_index: int) -> None:
    model, loss = alone(results[0]["weights"], config, batch_index)
    free = config.objective.adversarial is not None and config.objective.adversarial.kind == "freelb"
    losses = [adversarial_loss(loss, config, batch_index, place) for place in range(SAMPLES)]
    clean, part = (sum(each) / SAMPLES for each in zip(*losses, strict=True))
    (part if free else clean + part).backward()
    found = whole(results)
    expected = {name: p.grad.flatten().numpy() for name, p in model.named_parameters()}
    largest = max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-6 * largest, err_msg=name)
    for result in results:
        assert result["kept"] == 0
        assert result["gathered"] == 0
        assert result["loss"] == pytest.approx(clean.item(), rel=1e-5)
        assert result["parts"].get("adversarial", 0.0) == pytest.approx(part.item(), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["fgm", "pgd", "freelb", "mixup and pgd"])
def test_two_ranks_equal_a_dense_reference(two_ranks: RankPool, method: str, stage: int) -> None:
    # two micro-batches a rank and step; the second batch meets what the first left behind
    config = config_of(stage, **METHODS[method])
    check(two_ranks(gradient, config=config, batches=2), config, 1)


@pytest.mark.parametrize(("stage", "method"), [(0, "freelb"), (1, "mixup"), (2, "mixup and pgd"), (3, "freelb")])
def test_other_layouts_equal_it_too(one_rank: RankPool, two_ranks: RankPool, stage: int, method: str) -> None:
    # other paddings beside the same texts: a perturbation is its sample's own
    at_once = config_of(stage, micro=SAMPLES if stage % 2 else SAMPLES // 2, **METHODS[method])
    check(one_rank(gradient, config=at_once), at_once, 0)
    unaccumulated = config_of(stage, micro=SAMPLES // 2, **METHODS["mixup" if stage == 3 else "freelb"])
    check(two_ranks(gradient, config=unaccumulated), unaccumulated, 0)


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputed_activations_change_nothing(two_ranks: RankPool, stage: int) -> None:
    config = config_of(stage, recompute=True, **METHODS["freelb" if stage == 2 else "pgd"])
    check(two_ranks(gradient, config=config, batches=2), config, 1)


@pytest.mark.parametrize(
    ("precision", "stage", "method"),
    [("bf16", 3, "freelb"), pytest.param("fp16", 2, "pgd", marks=FP16)],
)
def test_half_precision_moves_to_the_same_places(two_ranks: RankPool, precision: str, stage: int, method: str) -> None:
    config = config_of(stage, precision=precision, **METHODS[method])
    results = two_ranks(gradient, config=config)
    _, loss = alone(results[0]["weights"], config, 0)
    part = sum(adversarial_loss(loss, config, 0, place)[1].item() for place in range(SAMPLES)) / SAMPLES
    assert results[0]["parts"]["adversarial"] == pytest.approx(part, rel=0.01)
    assert results[0]["scale"] == (1.0 if precision == "bf16" else 65536.0)


def replayed(rank: int, world_size: int, config: RunConfig) -> list[list[bytes]]:
    """The gradient of one batch: at once, after another batch that was discarded, and by another engine."""
    results = []
    engine = make(rank, world_size, config)
    for index in (1, 0, 1):
        stats = engine.accumulate(batch_of(config, index, rank, world_size), attempt=index, step=0)
        if index:
            found = [part.numpy().tobytes() for part in engine.shards.gradients()]
            results.append([np.float64([stats.loss, stats.parts.get("adversarial", 0.0)]).tobytes(), *found])
            # what is known without a gradient is the same clean loss
            results[-1].append(
                np.float64(stats.loss == engine.probe(batch_of(config, index, rank, world_size))).tobytes()
            )
        engine.discard()
    engine = make(rank, world_size, config)
    torch.manual_seed(99)
    engine.accumulate(batch_of(config, 1, rank, world_size), attempt=0, step=0)
    gradient = [part.numpy().tobytes() for part in engine.shards.gradients()]
    results.append([results[0][0], *gradient, np.float64(True).tobytes()])
    return results


@pytest.mark.parametrize(("stage", "method"), [(2, "mixup and pgd"), (3, "freelb")])
def test_a_replay_has_the_same_bits_dropout_included(two_ranks: RankPool, method: str, stage: int) -> None:
    config = config_of(stage, dropout=0.3, **METHODS[method])
    for first, again, other in two_ranks(replayed, config=config):
        assert first == again == other


def part_norms(rank: int, world_size: int, config: RunConfig) -> dict[str, float]:
    engine = make(rank, world_size, config)
    batch = batch_of(config, 0, rank, world_size)
    found = engine.part_norms(batch)
    held_out = engine.evaluate(batch.micro_batches)
    assert held_out is not None
    return {**found, "held out": held_out.loss, "samples": float(engine.sample_losses(batch).mean())}


@pytest.mark.parametrize("stage", [2, 3])
def test_parts_alone_and_scores_without_moving(two_ranks: RankPool, stage: int) -> None:
    config = config_of(stage, **METHODS["fgm"])
    (found, same) = two_ranks(part_norms, config=config)
    assert found == same
    state = two_ranks(gradient, config=config)[0]["weights"]
    model, loss = alone(state, config, 0)
    expected = {}
    for index, name in enumerate(("loss", "adversarial")):
        model.zero_grad()
        sum(adversarial_loss(loss, config, 0, place)[index] / SAMPLES for place in range(SAMPLES)).backward()
        expected[name] = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    clean = sum(loss(torch.zeros(()), place).item() / SAMPLES for place in range(SAMPLES))
    assert found == pytest.approx({**expected, "held out": clean, "samples": clean}, rel=1e-5)
