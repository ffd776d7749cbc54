"""A pretrained model, small enough for tests, and engines that train some of its weights in some way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from workload import DTYPES, VOCABULARY, cross_entropy, make_batch, make_config

from trainer.config.resolve import arithmetic, deepspeed_config
from trainer.config.schema import RunConfig
from trainer.engine.penalties import Penalty
from trainer.engine.ranks import Ranks
from trainer.engine.zero import Engine
from trainer.model.build import build_model
from trainer.model.groups import parameter_facts, parameter_groups
from trainer.objectives import LogitObjective
from trainer.objectives.penalty import penalty_gradient, penalty_value
from trainer.optim.build import build_optimizer

LR = 3e-3
LAYERS = 2


def publish(folder: Path, seed: int = 3, model_type: str = "gpt2") -> str:
    """A pretrained model in `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    if model_type == "llama":
        sizes |= {"intermediate_size": 48, "tie_word_embeddings": False}
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def tuned(pretrained: str, stage: int, **changes: Any) -> RunConfig:
    """A config that fine-tunes it; a tiny epsilon of Adam would turn the rounding of sums into whole updates."""
    lora = changes.pop("lora", None)
    changes["optim"] = {"eps": 1e-3, **changes.pop("optim", {})}
    options = make_config(zero={"stage": stage}, **changes).model_dump()
    return RunConfig.model_validate(options | {"model": {"pretrained": pretrained, "lora": lora}})


def open_engine(config: RunConfig, rank: int, world_size: int) -> Engine:
    """As `trainer.stages.build.build_engine`."""
    precision = config.precision
    assert precision != "auto"
    dtype = DTYPES[precision]
    zero3 = deepspeed_config(config, world_size, "cpu", precision) if config.zero.stage == 3 else None
    model = build_model(config, vocabulary=VOCABULARY, zero3=zero3, dtype=dtype)
    penalty = penalty_of(config)
    return Engine(
        model,
        build_optimizer(parameter_groups(model, config), config, "cpu"),
        LogitObjective(cross_entropy, ()),
        config=config,
        numbers=arithmetic(config, world_size),
        parameters=parameter_facts(model),
        ranks=Ranks(rank, world_size, rank),
        device="cpu",
        precision=precision,
        penalty=penalty,
        penalties=("penalty",) if penalty else (),
    )


def penalty_of(config: RunConfig) -> Penalty | None:
    weight = config.objective.l2_start
    if not weight:
        return None
    return lambda now, start: (
        penalty_gradient(now, 0.0, 0.0, weight, start),
        {"penalty": penalty_value(now, 0.0, 0.0, weight, start)},
    )


def advance(engine: Engine, config: RunConfig, rank: int, world_size: int, first: int, last: int) -> list[float]:
    losses = []
    for index in range(first, last):
        stats = engine.accumulate(make_batch(config, index, rank, world_size), attempt=index + 1, step=index + 1)
        engine.settle()
        engine.apply(config.optim.clip, LR)
        losses.append(stats.loss)
    return losses
