"""Clipping by tensor (AdaGC): factors on each parameter's gradient, then the global norm, on every ZeRO stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import RankPool
from workload import global_batch, make_batch, make_config, make_engine, make_model, make_optimizer, weights

from trainer.config.schema import RunConfig

LR = 3e-3
CLIP = 0.05


def factors(num: int) -> tuple[float, ...]:
    return tuple(1.0 if index % 3 == 0 else 1.0 / (1 + index) for index in range(num))


def scaled(rank: int, world_size: int, config: RunConfig, measured: bool = False) -> Any:
    engine = make_engine(config, rank, world_size)
    for index in range(4):
        engine.accumulate(make_batch(config, index, rank, world_size), attempt=1, step=1)
        apply = engine.apply_measured if measured else engine.apply
        apply(config.optim.clip, LR, factors(len(engine.names)))
    return weights(engine), engine.updates.largest_gradient


def dense(config: RunConfig) -> tuple[dict[str, np.ndarray], float]:
    model = make_model()
    optimizer = make_optimizer(model, config)
    largest = 0.0
    for group in optimizer.param_groups:
        group["lr"] = LR
    for index in range(4):
        ids, labels = global_batch(config, index)
        logits = model(input_ids=torch.from_numpy(ids)).logits
        F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten()).backward()
        parameters = list(model.parameters())
        for parameter, factor in zip(parameters, factors(len(parameters)), strict=True):
            assert parameter.grad is not None
            parameter.grad *= factor
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip or float("inf")))
        largest = max(largest, min(norm, config.optim.clip or norm))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}, largest


@pytest.mark.parametrize("clip", [CLIP, 0.0])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer")],
)
def test_scales_and_clip_equal_a_dense_reference(two_ranks: RankPool, stage: int, offload: str, clip: float) -> None:
    # with a large epsilon Adam's update follows the size of the gradient: a wrong clipping shows
    config = make_config(zero={"stage": stage, "offload": offload}, optim={"eps": 1e-2, "clip": clip})
    expected, largest = dense(config)
    for found, found_largest in two_ranks(scaled, config=config):
        assert found_largest == pytest.approx(largest, rel=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-6)


def test_measuring_does_not_change_it(two_ranks: RankPool) -> None:
    config = make_config(zero={"stage": 3}, optim={"clip": CLIP})
    plain = two_ranks(scaled, config=config)[0][0]
    measured = two_ranks(scaled, config=config, measured=True)[0][0]
    assert all(np.array_equal(plain[name], measured[name]) for name in plain)
