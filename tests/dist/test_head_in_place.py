"""A loss that is computed inside the student's head trains as the same loss on the model's logits does."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import RankPool
from torch import Tensor
from workload import LENGTH, VOCABULARY, global_batch, make_config, make_model

from trainer.config.resolve import deepspeed_config
from trainer.knowledge import Head
from trainer.model.head import InterceptedHead, find_head, logits_of

STEPS = 3


def make_llama() -> torch.nn.Module:
    """With weights of its own in the head, and larger than what ZeRO-3 keeps whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


MODELS = {"gpt2": make_model, "llama": make_llama}


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def step(head: InterceptedHead | None, model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    if head is None:
        return mean_loss(model(input_ids=ids).logits, labels)
    return head.run(model, {"input_ids": ids}, lambda hidden, weights: mean_loss(logits_of(hidden, weights), labels))


def train(rank: int, world_size: int, name: str, stage: int, inside: bool) -> dict[str, Any]:
    """Losses of this rank, and the weights after some steps."""
    import deepspeed

    config = make_config(zero={"stage": stage}, batch={"samples": 8, "micro": 2})
    options = deepspeed_config(config, world_size, "cpu", "fp32")
    if stage == 3:
        # nothing of these small models stays whole on every rank
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = MODELS[name]()
    if stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
    prologues = Mock(wraps=engine._backward_prologue)
    engine._backward_prologue = prologues
    head = find_head(model.eval(), engine) if inside else None
    engine.train()
    losses = []
    for index in range(STEPS * config.batch.samples // (2 * world_size)):
        # two micro-batches a step
        ids, labels = (torch.from_numpy(a[rank * 2 : rank * 2 + 2]) for a in global_batch(config, index))
        if head is not None:
            with torch.no_grad():
                # an evaluation between two steps leaves no trace
                assert not step(head, engine, ids, labels).requires_grad
        loss = step(head, engine, ids, labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        found = {key: value.detach().numpy().copy() for key, value in parameters.items()}
    engine.destroy()
    return {"losses": losses, "weights": found, "steps": engine.global_steps, "prologues": prologues.call_count}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_loss_inside_the_head_trains_as_one_outside(two_ranks: RankPool, name: str, stage: int) -> None:
    inside = two_ranks(train, name=name, stage=stage, inside=True)
    outside = two_ranks(train, name=name, stage=stage, inside=False)
    for ours, plain in zip(inside, outside, strict=True):
        assert ours["steps"] == STEPS
        assert ours["losses"] == plain["losses"]
        # what DeepSpeed does before a backward pass
        assert ours["prologues"] == plain["prologues"] == len(plain["losses"])
        for key, before in MODELS[name]().named_parameters():
            assert np.array_equal(ours["weights"][key], plain["weights"][key]), key
            assert not np.array_equal(before.detach().numpy(), plain["weights"][key]), key


def hidden_inside(rank: int, world_size: int) -> tuple[list[float], list[tuple[int, ...]]]:
    """Largest difference of hidden · weightᵀ inside a sharded head to the model's logits; shapes seen there."""
    import deepspeed

    config = make_config(zero={"stage": 3})
    options = deepspeed_config(config, world_size, "cpu", "fp32")
    options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = make_llama()
    deepspeed.zero.Init(module=model, config_dict_or_path=options)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters()), config=options, dist_init_required=False
    )
    head = find_head(model.eval(), engine)
    ids = torch.arange(8).view(1, 8)
    shapes = []

    def compute(hidden: Tensor, weights: Head) -> Tensor:
        shapes.append(tuple(weights.weight.shape))
        return logits_of(hidden, weights)

    with torch.no_grad():
        found = head.run(engine, {"input_ids": ids}, compute)
        difference = (found - engine(input_ids=ids).logits).abs().max().item()
    shapes.append(tuple(head.weights().weight.shape))
    engine.destroy()
    return [difference], shapes


def test_inside_a_sharded_head_its_weights_are_whole(two_ranks: RankPool) -> None:
    for differences, shapes in two_ranks(hidden_inside):
        assert differences == [0.0]
        assert shapes == [(VOCABULARY, 32), (0,)]
