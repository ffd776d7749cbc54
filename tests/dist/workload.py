"""A small model and its batches, for tests of the engine: made from numbers alone, the same on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.resolve import arithmetic
from trainer.config.schema import RunConfig
from trainer.engine.ranks import Ranks
from trainer.engine.zero import Engine
from trainer.objectives import LogitObjective
from trainer.records import Batch, ParameterFacts

VOCABULARY = 97
LENGTH = 24


def make_config(**changes: Any) -> RunConfig:
    """A config of the small model; `changes` are sections or options of sections (`zero={"stage": 3}`)."""
    base: dict[str, Any] = {
        "name": "small",
        "seed": 5,
        "precision": "fp32",
        "data": {"sources": ({"stdlib": True},), "sequence_length": LENGTH},
        "model": {"config": {"model_type": "llama"}},
        "batch": {"samples": 8, "micro": 2},
        "optim": {"lr": 1e-2, "weight_decay": 0.1, "clip": 1.0},
        "schedule": {"duration": 8, "warmup": 2},
        "zero": {"stage": 2},
        "cluster": {"device": "cpu"},
    }
    for name, value in changes.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) and name in base else value
    return RunConfig.model_validate(base)


def make_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    # a parameter that ZeRO-3 has partitioned is empty; its own shape is kept beside it
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and "wte" not in name and "wpe" not in name


def make_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optim = config.optim
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in named if decays(name, p)], "weight_decay": optim.weight_decay},
            {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(config: RunConfig, rank: int, world_size: int, *, dropout: float = 0.0, **options: Any) -> Engine:
    precision = config.precision
    assert precision != "auto"
    model = make_model(dropout, DTYPES[precision])
    facts = [
        ParameterFacts(name, tuple(p.shape), decays(name, p)) for name, p in model.named_parameters() if p.requires_grad
    ]
    if config.zero.stage == 3:
        import deepspeed

        from trainer.config.resolve import deepspeed_config

        deepspeed.zero.Init(
            module=model,
            config_dict_or_path=deepspeed_config(config, world_size, "cpu", precision),
            dtype=DTYPES[precision],
        )
    return Engine(
        model,
        make_optimizer(model, config),
        LogitObjective(options.pop("objective", cross_entropy), options.pop("parts", ())),
        config=config,
        numbers=arithmetic(config, world_size),
        parameters=facts,
        ranks=Ranks(rank, world_size, rank),
        device="cpu",
        precision=precision,
        **options,
    )


def global_batch(config: RunConfig, batch_index: int, *, ragged: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `labels` [samples, length] of one global batch; `ragged`: unequal numbers of targets."""
    generator = np.random.default_rng((7, batch_index))
    # a few samples again and again, so that there is something to learn
    tokens = np.random.default_rng(11).integers(0, VOCABULARY, (16, LENGTH + 1))
    chosen = tokens[generator.integers(0, 16, config.batch.samples)]
    labels = chosen[:, 1:].copy()
    if ragged:
        for row, keep in enumerate(generator.integers(1, LENGTH, config.batch.samples)):
            labels[row, keep:] = -100
    return chosen[:, :-1].copy(), labels


def make_batch(config: RunConfig, batch_index: int, rank: int, world_size: int, *, ragged: bool = False) -> Batch:
    ids, labels = global_batch(config, batch_index, ragged=ragged)
    numbers = arithmetic(config, world_size)
    micro_batches = []
    for k in range(numbers.accumulation):
        first = (k * world_size + rank) * numbers.micro
        rows = slice(first, first + numbers.micro)
        micro_batches.append({"input_ids": ids[rows], "labels": labels[rows]})
    return Batch(
        batch_index=batch_index,
        epoch=0,
        samples=np.arange(config.batch.samples),
        num_targets=int((labels >= 0).sum()),
        micro_batches=tuple(micro_batches),
    )


def weights(engine: Engine) -> dict[str, np.ndarray]:
    """The whole model's weights by name, as the forward pass uses them."""
    import contextlib

    import deepspeed

    parameters = dict(engine.module.named_parameters())
    gathered = (
        deepspeed.zero.GatheredParameters(list(parameters.values())) if engine.stage == 3 else contextlib.nullcontext()
    )
    with gathered:
        return {name: p.detach().float().numpy().copy() for name, p in parameters.items()}


FP16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU cannot compute in fp16")

OTHER_SETTINGS = [
    pytest.param({"stage": stage, "offload": offload}, precision, marks=[FP16] if precision == "fp16" else [])
    for stage, offload, precision in (
        (1, "optimizer", "fp32"),
        (2, "optimizer", "bf16"),
        (3, "optimizer", "fp32"),
        (3, "all", "bf16"),
        (1, "none", "fp16"),
        (2, "none", "fp16"),
        (3, "none", "fp16"),
    )
]
"""Offload, and fp16 with its loss scale: what the tests of stage × precision leave out."""
