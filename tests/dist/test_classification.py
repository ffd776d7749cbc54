"""Classifiers on two ranks: a head that is drawn or loaded under ZeRO-3 is the one of the other stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from workload import make_config

from trainer.config.schema import RunConfig
from trainer.records import Batch, Classes

VOCABULARY, LENGTH = 61, 24
TWO, FOUR = Classes(("no", "yes"), 0), Classes(("a", "b", "c", "d"), 0)
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 24}


def config_of(stage: int, **model: Any) -> RunConfig:
    config = make_config(zero={"stage": stage}, objective={"kind": "classification"})
    return RunConfig.model_validate(config.model_dump() | {"model": model})


def write_pretrained(folder: Path, classes: Classes | None) -> None:
    """A masked language model, or a classifier of `classes`."""
    import torch

    from trainer.model.build import build_model

    config = config_of(0, config=BERT)
    if classes is None:
        config = RunConfig.model_validate(config.model_dump() | {"objective": {"kind": "masked"}})
    model = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32, classes=classes)
    model.save_pretrained(folder)


def batch_of(config: RunConfig, index: int, classes: Classes, rank: int, world_size: int) -> Batch:
    """Texts of 2 … 24 tokens, two classes apart in the tokens that they use."""
    generator = np.random.default_rng((5, index))
    micro = []
    for _ in range(config.batch.samples // config.batch.micro):
        lengths = generator.integers(2, LENGTH + 1, config.batch.micro)
        labels = generator.integers(0, len(classes.names), config.batch.micro)
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = 1 + generator.integers(0, 10, mask.shape) + 10 * labels[:, None]
        micro.append({"input_ids": ids * mask, "attention_mask": mask.astype(np.int64), "labels": labels})
    return Batch(index, 0, np.arange(config.batch.samples), config.batch.samples, tuple(micro[rank::world_size]))


def learn(rank: int, world_size: int, config: RunConfig, classes: Classes, steps: int = 4) -> dict[str, Any]:
    import torch

    from trainer.config.resolve import arithmetic, deepspeed_config
    from trainer.engine.ranks import Ranks
    from trainer.engine.zero import Engine
    from trainer.model.build import build_model
    from trainer.model.groups import parameter_facts, parameter_groups
    from trainer.objectives import make_objective
    from trainer.optim.build import build_optimizer

    zero3 = deepspeed_config(config, world_size, "cpu", "fp32") if config.zero.stage == 3 else None
    model = build_model(config, vocabulary=VOCABULARY, zero3=zero3, dtype=torch.float32, classes=classes)
    engine = Engine(
        model,
        build_optimizer(parameter_groups(model, config), config, "cpu"),
        make_objective(config.objective),
        config=config,
        numbers=arithmetic(config, world_size),
        parameters=parameter_facts(model),
        ranks=Ranks(rank, world_size, rank),
        device="cpu",
        precision="fp32",
    )
    losses = []
    for index in range(steps):
        stats = engine.accumulate(batch_of(config, index, classes, rank, world_size), attempt=index, step=index)
        losses.append((stats.loss, stats.grad_norm))
        engine.apply(1.0, 1e-2)
    batch = batch_of(config, steps, classes, rank, world_size)
    found = engine.evaluate(batch.micro_batches)
    assert found is not None
    return {
        "losses": losses,
        "evaluation": (found.loss, found.num_targets, found.scores["accuracy"]),
        "samples": engine.sample_losses(batch),
    }


CASES = {
    "llama, from scratch": ({"config": LLAMA}, TWO, None),
    "bert, a head drawn": ({}, FOUR, "masked"),
    "bert, its own head": ({}, TWO, "classifier"),
    "bert, a head for other classes": ({}, FOUR, "classifier"),
}


@pytest.mark.parametrize(("model", "classes", "pretrained"), CASES.values(), ids=CASES)
def test_stages_learn_alike(
    two_ranks: RankPool, tmp_path: Path, model: dict[str, Any], classes: Classes, pretrained: str | None
) -> None:
    if pretrained is not None:
        write_pretrained(tmp_path / "pretrained", TWO if pretrained == "classifier" else None)
        model = {"pretrained": str(tmp_path / "pretrained")}
    runs = {stage: two_ranks(learn, config=config_of(stage, **model), classes=classes) for stage in (0, 3)}
    expected = runs[0][0]
    assert expected["losses"][0][0] == pytest.approx(np.log(len(classes.names)), rel=0.2)
    for results in runs.values():
        for result in results:
            np.testing.assert_allclose(result["losses"], expected["losses"], rtol=2e-5)
            np.testing.assert_allclose(result["samples"], expected["samples"], rtol=2e-5)
            assert result["evaluation"] == pytest.approx(expected["evaluation"], rel=2e-5)
    loss, num_targets, accuracy = expected["evaluation"]
    assert num_targets == 8
    assert loss == pytest.approx(expected["samples"].mean(), rel=1e-5)
    assert accuracy in [n / 8 for n in range(9)]
