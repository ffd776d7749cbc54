"""Two real ranks: ZeRO-3 builds the same bits as the other stages, and no rank ever holds the whole model."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model_configs import VOCABULARY, run_config
from transformers import LlamaConfig, LlamaForCausalLM

WORLD_SIZE = 2
CASES = (("llama-tied", torch.float32), ("gpt2", torch.float32), ("bert", torch.bfloat16), ("gemma2", torch.bfloat16))
LAYERS, LAYER_BYTES = 20, 4 * (4 * 512 * 512 + 3 * 512 * 1024)


def rank_main(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    try:
        for name, dtype in CASES:
            same_bits_in_every_stage(name, dtype)
        pretrained_is_sharded(folder)
        no_rank_holds_the_whole(rank)
    finally:
        dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


def zero3(dtype: torch.dtype) -> dict:
    from trainer.config.resolve import deepspeed_config

    return deepspeed_config(run_config(stage=3), WORLD_SIZE, "cpu", "fp32" if dtype == torch.float32 else "bf16")


def gathered(model) -> dict[str, torch.Tensor]:
    import deepspeed

    result = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0, f"{name} is whole between uses"
        with deepspeed.zero.GatheredParameters([parameter]):
            result[name] = parameter.detach().clone()
    return result


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def same_bits_in_every_stage(name: str, dtype: torch.dtype) -> None:
    from trainer.model.build import build_model
    from trainer.model.groups import parameter_facts

    config = run_config(name, stage=3, seed=9, initialisation="residual-scaled", activation_checkpointing=True)
    whole = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=dtype)
    sharded = build_model(config, vocabulary=VOCABULARY, zero3=zero3(dtype), dtype=dtype)
    assert parameter_facts(sharded) == parameter_facts(whole)
    equal(gathered(sharded), dict(whole.named_parameters()) | dict(whole.named_buffers()))


def pretrained_is_sharded(folder: str) -> None:
    from trainer.model.build import build_model

    config = run_config(pretrained=f"{folder}/pretrained", stage=3)
    sharded = build_model(config, vocabulary=VOCABULARY, zero3=zero3(torch.float32), dtype=torch.float32)
    whole = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)
    equal(gathered(sharded), dict(whole.named_parameters()) | dict(whole.named_buffers()))


def no_rank_holds_the_whole(rank: int) -> None:
    from trainer.model.build import build_model

    fields = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
    fields |= {"intermediate_size": 1024, "num_hidden_layers": LAYERS}
    config = run_config("llama", fields=fields, stage=3)
    before = resident_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model = build_model(config, vocabulary=VOCABULARY, zero3=zero3(torch.float32), dtype=torch.float32)
    grown = resident_memory("VmHWM") - before
    whole = LAYERS * LAYER_BYTES
    held = sum(parameter.ds_tensor.numel() * 4 for parameter in model.parameters())
    assert held < 0.51 * whole + 2**20
    # a shard and a few copies of one layer, beside what the allocator keeps; a whole model and its shard would be 1.5
    assert grown < 0.9 * whole, f"rank {rank} grew by {grown / whole:.2f} of the model"


def resident_memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


@pytest.mark.slow
def test_two_ranks_build_the_same_bits_and_neither_holds_the_whole(tmp_path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "pretrained")
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=WORLD_SIZE)
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(WORLD_SIZE))
