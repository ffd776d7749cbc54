"""A model from some layers of a pretrained one, against the whole one cut by hand."""

import json
from pathlib import Path

import pytest
import torch
from model_configs import VOCABULARY, run_config
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from trainer.errors import ConfigError
from trainer.model.build import build_model, meta_model
from trainer.model.capture import find_layers
from trainer.model.describe import describe
from trainer.model.save import save_model
from trainer.model.tensors import read_tensors

LAYERS = 4
LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
BERT = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
MIXED = ["sliding_attention", "full_attention"] * 2
SMALL = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "gemma2": {**LLAMA, "head_dim": 4, "layer_types": MIXED, "sliding_window": 3},
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3_moe": {
        **LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "mlp_only_layers": [1],
    },
    "glm4_moe": {
        **LLAMA,
        "head_dim": 4,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "bert": BERT,
    "distilbert": {"dim": 16, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 64},
}
MASKED = {"bert", "distilbert"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder of a small pretrained model, by name."""

    def make(name: str) -> str:
        folder = tmp_path_factory.getbasetemp() / f"published-{name}"
        if not folder.exists():
            torch.manual_seed(5)
            fields = {"bos_token_id": 0, "eos_token_id": 0, **SMALL[name]}
            config = AutoConfig.for_model(name.removesuffix("-tied"), vocab_size=VOCABULARY, **fields)
            auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
            model = auto.from_config(config)
            for parameter in model.parameters():  # biases and norms that say where they come from
                nn.init.normal_(parameter, 0.0, 0.3)
            model.save_pretrained(folder)
        return str(folder)

    return make


def cut_config(folder: str, layers: str, name: str = "llama", **options):
    return run_config(pretrained=folder, layers=layers, kind="masked" if name in MASKED else "causal", **options)


def build(config):
    return build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)


def cut_by_hand(folder: str, kept: tuple[int, ...], name: str) -> nn.Module:
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    model = auto.from_pretrained(folder, config=AutoConfig.from_pretrained(folder, use_cache=False))
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    for module in model.modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == LAYERS and "expert" not in child_name:
                setattr(module, child_name, nn.ModuleList(child[layer] for layer in kept))
                break
    return model.eval()


def ids() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "layers", "kept"),
    [
        ("llama", "every:2", (0, 2)),
        ("llama-tied", "last:3", (1, 2, 3)),
        ("gpt2", "0, 3", (0, 3)),
        ("gemma2", "1, 2", (1, 2)),
        ("qwen2", "1, 3", (1, 3)),
        ("qwen3_moe", "1, 2", (1, 2)),
        ("glm4_moe", "1, 2, 3", (1, 2, 3)),
        ("bert", "spread:3", (0, 2, 3)),
        ("distilbert", "first:1", (0,)),
    ],
)
def test_equal_to_the_whole_cut_by_hand(published, name, layers, kept):
    config = cut_config(published(name), layers, name)
    model = build(config)
    assert len(find_layers(model)) == model.config.num_hidden_layers == len(kept)
    by_hand = cut_by_hand(published(name), kept, name)
    assert torch.equal(model.eval()(input_ids=ids()).logits, by_hand(input_ids=ids()).logits)
    ours, theirs = model.state_dict(), by_hand.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for place, layer in enumerate(find_layers(model)):
        assert {m.layer_idx for m in layer.modules() if getattr(m, "layer_idx", None) is not None} <= {place}
    facts = describe(config)
    assert facts.num_layers == len(kept)
    assert {f.name: f.shape for f in facts.parameters} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert meta_model(config, None).state_dict().keys() == ours.keys()


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3_moe"])
def test_an_export_is_a_model_of_its_own(published, name, tmp_path):
    config = cut_config(published(name), "1, 2", name)
    model = build(config).eval()
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(
        tmp_path / "tokenizer"
    )
    save_model(
        config,
        model.state_dict().items(),
        tmp_path / "export",
        tokenizer_path=tmp_path / "tokenizer",
        vocabulary=VOCABULARY,
        dtype=torch.float32,
    )
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    loaded, report = auto.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert loaded.config.num_hidden_layers == 2
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_a_checkpoint_of_the_base_model_and_of_bin_files(published, tmp_path):
    whole = AutoModelForMaskedLM.from_pretrained(published("bert"))
    base, binary = tmp_path / "base", tmp_path / "bin"
    whole.bert.save_pretrained(base)
    binary.mkdir()
    whole.config.save_pretrained(binary)
    torch.save(whole.state_dict(), binary / "pytorch_model.bin")
    expected = cut_by_hand(published("bert"), (1, 3), "bert").state_dict()
    for folder in (base, binary):
        ours = build(cut_config(str(folder), "1, 3", "bert")).state_dict()
        same = {key for key in expected if torch.equal(ours[key], expected[key])}
        assert same == {key for key in expected if folder == binary or key.startswith("bert.")} | (
            {"cls.predictions.decoder.weight"}  # tied
        )


def test_only_the_shards_of_kept_layers_are_opened(published, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(published("llama"))
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    places = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in places.items() if "layers.0." not in name and "layers.1." not in name}
    assert len(set(places.values())) > len(needed) > 2
    for file in set(places.values()) - needed:
        (tmp_path / "sharded" / file).write_bytes(b"not to be opened")
    ours = build(cut_config(str(tmp_path / "sharded"), "last:2")).state_dict()
    expected = cut_by_hand(published("llama"), (2, 3), "llama").state_dict()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_values_stay_in_the_file_until_they_are_used(tmp_path):
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

    save_file(
        {f"layers.{n}.weight": torch.full((2_000_000,), float(n)) for n in range(8)}, tmp_path / "model.safetensors"
    )
    before = anonymous()
    tensors = read_tensors(str(tmp_path), lambda name: name if "3" in name else None)
    assert list(tensors) == ["layers.3.weight"]
    assert tensors["layers.3.weight"].mean().item() == 3
    assert anonymous() - before < 8_000_000
    on_meta = read_tensors(str(tmp_path), lambda name: f"x{name}", with_values=False)
    assert sorted(on_meta) == [f"xlayers.{n}.weight" for n in range(8)]
    assert {(t.device.type, t.shape, t.dtype) for t in on_meta.values()} == {("meta", (2_000_000,), torch.float32)}


def test_of_a_gguf_file(published, tmp_path):
    """Written by hand: weights as in safetensors but for their names and the order of the rotary halves."""
    import gguf

    whole = AutoModelForCausalLM.from_pretrained(published("llama"))
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_vocab_size(VOCABULARY)
    writer.add_layer_norm_rms_eps(whole.config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in whole.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.reshape(heads, 2, -1, 16).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = build(cut_config(str(tmp_path / "small.gguf"), "0, 3")).state_dict()
    expected = cut_by_hand(published("llama"), (0, 3), "llama").state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "layers", "options", "path", "sentence"),
    [
        ("llama", "first:5", {}, "model.layers", "asks for 5 layers of a model that has 4"),
        ("llama", "0, 4", {}, "model.layers", "names layer 4, but the model has layers 0 to 3"),
        ("llama", "odd", {}, "model.layers", "is 'odd'; give numbers from 0"),
        ("llama", "0", {"overrides": {"num_hidden_layers": 2}}, "model.overrides.num_hidden_layers", "model.layers"),
        ("gpt2", "0", {"overrides": {"n_layer": 2}}, "model.overrides.num_hidden_layers", "leave one of them out"),
    ],
)
def test_what_cannot_be_kept_is_refused(published, name, layers, options, path, sentence):
    for make in (build, describe):
        with pytest.raises(ConfigError) as raised:
            make(cut_config(published(name), layers, name, **options))
        (problem,) = raised.value.problems
        assert problem[0] == path
        assert sentence in problem[1]


def test_a_layer_that_its_number_makes_another_is_refused(tmp_path):
    """Every second layer of this one has experts, by a rule on its number."""
    fields = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 2}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **fields)
    ).save_pretrained(tmp_path)
    assert len(find_layers(build(cut_config(str(tmp_path), "2, 3")))) == 2
    with pytest.raises(ConfigError, match="layer 1 of Qwen3MoeForCausalLM would be another one in place 0"):
        build(cut_config(str(tmp_path), "1, 2"))


def test_a_layer_that_computes_otherwise_by_its_number_is_refused(published):
    overrides = {"scale_attn_by_inverse_layer_idx": True}
    assert len(find_layers(build(cut_config(published("gpt2"), "first:2", overrides=overrides)))) == 2
    with pytest.raises(ConfigError, match=r"layer 2 of GPT2LMHeadModel .* in place 1 \(attn\.scaling differs there\)"):
        describe(cut_config(published("gpt2"), "0, 2", overrides=overrides))


def test_weights_that_are_named_otherwise_are_not_drawn_in_silence(published, tmp_path):
    whole = AutoModel.from_pretrained(published("llama"))
    whole.config.save_pretrained(tmp_path)
    save_file(
        {f"stack.{key}".replace("layers", "blocks"): v for key, v in whole.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ConfigError, match=r"model\.layers: .* does not name the weights of its layers"):
        build(cut_config(str(tmp_path), "0, 2"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no weights in safetensors"):
        build(cut_config(str(tmp_path), "0, 2"))
