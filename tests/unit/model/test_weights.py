"""Weights of a pretrained model, one at a time, are those that transformers loads."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_configs import TINY, VOCABULARY, run_config
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, core_model_loading, modeling_utils

from trainer.errors import ConfigError
from trainer.model.build import build_model
from trainer.model.configuration import model_configuration
from trainer.model.weights import read_weights


def save(name: str, folder: Path, **options: Any) -> Path:
    model = build_model(run_config(name), vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)
    model.save_pretrained(folder, **options)
    return folder


def read(folder: Path, **model: Any) -> dict[str, Tensor]:
    config = run_config(pretrained=str(folder), **model)
    found: dict[str, Tensor] = {}

    def take(name: str, value: Tensor) -> None:
        assert name not in found
        found[name] = value.clone()

    before = core_model_loading.set_param_for_module, modeling_utils.safe_open, dict(os.environ)
    try:
        read_weights(config, model_configuration(config, None), torch.float32, take)
    finally:
        assert before == (core_model_loading.set_param_for_module, modeling_utils.safe_open, dict(os.environ))
    return found


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("shards", ["5GB", "4KB"])
def test_they_are_what_transformers_loads(name: str, shards: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model", max_shard_size=shards)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(expected.named_parameters())
    found = read(folder)
    assert parameters.keys() <= found.keys()
    for name, value in found.items():
        assert torch.equal(value, expected.get_parameter(name)), name


def test_from_pickled_files_too(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = read(folder)
    assert all(torch.equal(found[name], value) for name, value in model.named_parameters())


def test_no_more_than_one_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("llama", tmp_path / "model")
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    to = Tensor.to

    def noted(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        result = to(tensor, *args, **options)
        if result.device.type == "cpu":
            made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Tensor, "to", noted)
    config = run_config(pretrained=str(folder))

    def take(_name: str, _value: Tensor) -> None:
        alive.append(sum(tensor() is not None for tensor in made))

    read_weights(config, model_configuration(config, None), torch.float32, take)
    assert alive == [1] * 21
    assert len(made) >= 21


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"model.layers.0.mlp.down_proj.weight is \[16, 24\] in .* and \[16, 32\] in the model"
    ):
        read(folder, overrides={"intermediate_size": 32})


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        read(folder)


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """A Llama as llama.cpp writes it: with the rows of queries and keys in another order."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
                array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
        stem, _, end = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{end}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_from_a_gguf_file_each_is_dequantised_when_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(2)
    fields = {key: value for key, value in TINY["llama"].items() if key not in ("model_type", "head_dim")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **fields))
    write_gguf(tmp_path / "tiny.gguf", model)
    dequantised = 0
    taken: list[int] = []
    dequantize = gguf.dequantize

    def counted(*args: Any) -> Any:
        nonlocal dequantised
        dequantised += 1
        return dequantize(*args)

    monkeypatch.setattr(gguf, "dequantize", counted)
    config = run_config(pretrained=str(tmp_path / "tiny.gguf"))
    found: dict[str, Tensor] = {}

    def take(name: str, value: Tensor) -> None:
        found[name] = value.clone()
        taken.append(dequantised)

    read_weights(config, model_configuration(config, None), torch.float32, take)
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert taken == list(range(1, len(expected) + 1))
