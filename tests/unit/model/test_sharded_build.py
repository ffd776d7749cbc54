"""Two real ranks: ZeRO-3 builds the same bits as the other stages, a layer at a time."""

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
LAYERS = 12


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
        no_rank_holds_the_whole()
    finally:
        dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()
    os._exit(0)  # threads of the process groups can abort an interpreter that goes on to shut down


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


def no_rank_holds_the_whole() -> None:
    """Of the memory that a rank holds at once only this is in our hands: what is gathered together."""
    import deepspeed

    from trainer.model.build import build_model

    together: list[int] = []
    enter = deepspeed.zero.GatheredParameters.__enter__

    def counting(context):
        together.append(sum(parameter.ds_numel for parameter in context.params))
        return enter(context)

    config = run_config("llama", fields={"num_hidden_layers": LAYERS}, stage=3)
    deepspeed.zero.GatheredParameters.__enter__ = counting
    try:
        model = build_model(config, vocabulary=VOCABULARY, zero3=zero3(torch.float32), dtype=torch.float32)
    finally:
        deepspeed.zero.GatheredParameters.__enter__ = enter
    largest_layer = max(sum(p.ds_numel for p in layer.parameters()) for layer in model.model.layers)
    embedding = model.get_input_embeddings().weight.ds_numel
    assert len(together) > LAYERS
    assert max(together) <= max(largest_layer, embedding + 16)  # 16: the norm beside the embedding
    whole = sum(parameter.ds_numel for parameter in model.parameters())
    assert sum(parameter.ds_tensor.numel() for parameter in model.parameters()) < 0.51 * whole


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_build_the_same_bits_and_neither_holds_the_whole(tmp_path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "pretrained")
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=WORLD_SIZE)
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(WORLD_SIZE))
