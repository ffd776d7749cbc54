"""A student from layers under ZeRO-3: the bits of the whole one, and one rank reads the kept layers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pool import RankPool
from workload import VOCABULARY, make_config

from trainer.config.schema import RunConfig

SMALL = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("causal", SMALL),
    "llama-tied": ("causal", SMALL | {"tie_word_embeddings": True}),
    "bert": ("masked", SMALL),
    "qwen3_moe": ("causal", SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
}


def publish(name: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    kind, fields = MODELS[name]
    torch.manual_seed(1)
    config = AutoConfig.for_model(name.removesuffix("-tied"), vocab_size=VOCABULARY, **fields)
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    auto.from_config(config).save_pretrained(folder, max_shard_size="20KB")


def build_both(rank: int, world_size: int, config: RunConfig) -> tuple[list[str], set[str], float]:
    """(names whose bits differ, types of the devices that weights were read to, share of the weights held)."""
    import deepspeed
    import torch

    from trainer.config.resolve import deepspeed_config
    from trainer.model import build

    read: set[str] = set()
    read_tensors = build.read_tensors

    def watching(*arguments: Any, **options: Any) -> Any:
        tensors = read_tensors(*arguments, **options)
        read.update(tensor.device.type for tensor in tensors.values())
        return tensors

    build.read_tensors = watching  # type: ignore[assignment]
    try:
        zero3 = deepspeed_config(config, world_size, "cpu", "fp32")
        sharded = build.build_model(config, vocabulary=VOCABULARY, zero3=zero3, dtype=torch.float32)
    finally:
        build.read_tensors = read_tensors
    whole = build.build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)
    expected = dict(whole.named_parameters())
    assert expected.keys() == dict(sharded.named_parameters()).keys()
    different = []
    held = total = 0
    for name, parameter in sharded.named_parameters():
        held, total = held + parameter.ds_tensor.numel(), total + parameter.ds_numel
        assert parameter.numel() == 0
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter, expected[name]):
                different.append(name)
    return different, read, held / total


@pytest.mark.parametrize("name", MODELS)
def test_sharded_as_whole(two_ranks: RankPool, tmp_path: Path, name: str) -> None:
    publish(name, tmp_path)
    kind, _ = MODELS[name]
    model = {"pretrained": str(tmp_path), "layers": "every:2"}
    options = make_config(zero={"stage": 3}, objective={"kind": kind}).model_dump()
    results = two_ranks(build_both, config=RunConfig.model_validate(options | {"model": model}))
    for (different, read, held), device in zip(results, ("cpu", "meta"), strict=True):
        assert different == []
        assert read == {device}
        assert held < 0.52
