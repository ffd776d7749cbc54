"""Hidden states and attention against transformers' own outputs, with gradients, and under recomputation."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from trainer.errors import ConfigError
from trainer.model.capture import Capture, find_layers, num_layers

LLAMA = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
SMALL: dict[str, dict[str, object]] = {
    "llama": {**LLAMA, "num_key_value_heads": 2},
    "qwen3": {**LLAMA, "num_key_value_heads": 2, "head_dim": 6},
    "olmo2": LLAMA,
    "gemma3_text": {**LLAMA, "num_key_value_heads": 2, "head_dim": 4},
    "phi3": {**LLAMA, "num_key_value_heads": 2, "pad_token_id": 0},
    "mixtral": {**LLAMA, "head_dim": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4},
    "gpt_bigcode": {"n_embd": 16, "n_layer": 3, "n_head": 4, "multi_query": True, "attn_pdrop": 0.0},
    "gpt_bigcode-many": {"n_embd": 16, "n_layer": 3, "n_head": 4, "multi_query": False, "attn_pdrop": 0.0},
    "gpt_neox": LLAMA,
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 4},
    "bert": LLAMA,
    "roberta": LLAMA,
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24},
    "modernbert": {**LLAMA, "pad_token_id": 0},
}
MASKED = {"bert", "roberta", "distilbert", "modernbert"}


def small_model(name: str, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.removesuffix("-many"), vocab_size=50, **{**SMALL[name], **fields})
    config.bos_token_id = config.eos_token_id = 0
    config.use_cache = False
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tokens(length: int = 7) -> torch.Tensor:
    return torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SMALL)
def test_states_are_those_of_transformers(name):
    model = small_model(name)
    assert num_layers(model) == 3
    with Capture(model, range(4)) as seen:
        model(input_ids=tokens())
    expected = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(seen.states[layer], expected[layer])
    # theirs is after the last norm, where there is one
    last = seen.states[3]
    norms = [
        m
        for n, m in model.named_modules()
        if n.rpartition(".")[2] in {"norm", "ln_f", "final_layer_norm", "final_norm"}
    ]
    assert torch.equal(norms[-1](last) if norms else last, expected[3])


def probabilities(name: str, seen, model: nn.Module, size: int) -> torch.Tensor:
    """softmax(QKᵀ/√d) from the captured queries and keys, of models without a rotary embedding."""
    query, key = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (seen.attention.query, seen.attention.key))
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2) / size**0.5
    if name not in MASKED:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gpt_bigcode-many", "bert", "roberta", "distilbert"])
def test_queries_and_keys_make_the_attention(name):
    model = small_model(name)
    with Capture(model, [], attention=2) as seen:
        theirs = model(input_ids=tokens(), output_attentions=True).attentions[1]
    assert torch.allclose(probabilities(name, seen, model, 4), theirs, atol=1e-6)
    assert seen.attention.value.shape[:2] == (2, 7)


ROTARY = ["llama", "qwen3", "olmo2", "gemma3_text", "phi3", "gpt_neox", "modernbert", "mixtral"]


@pytest.mark.parametrize("name", [*ROTARY, "bloom"])
@pytest.mark.parametrize("length", [4, 7])  # 4: as many tokens as heads
def test_values_and_norms(name, length, monkeypatch):
    """What attention is called with, the rotary embedding aside, which leaves the first position as it is."""
    model = small_model(name)
    attention_calls = []
    if name == "bloom":
        module = find_layers(model)[1].self_attention
        reshape = module._reshape

        def spy(fused):
            attention_calls.append([part.clone() for part in reshape(fused)])
            return reshape(fused)

        monkeypatch.setattr(module, "_reshape", spy)
    else:
        source = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
        original = source.eager_attention_forward

        def spy(module, query, key, value, *args, **kwargs):
            attention_calls.append((query, key, value))
            return original(module, query, key, value, *args, **kwargs)

        monkeypatch.setattr(source, "eager_attention_forward", spy)
    with Capture(model, [], attention=2) as seen:
        model(input_ids=tokens(length))
    heads = attention_calls[0] if name == "bloom" else attention_calls[1]
    for ours, theirs in zip((seen.attention.query, seen.attention.key, seen.attention.value), heads, strict=True):
        size = theirs.shape[-1]
        theirs = theirs.transpose(1, 2).flatten(2)
        assert ours.shape == theirs.shape
        first = ours.unflatten(-1, (-1, size))[:, 0]
        assert torch.allclose(first, theirs.unflatten(-1, (-1, size))[:, 0], atol=1e-6)
    assert torch.allclose(seen.attention.value, heads[2].transpose(1, 2).flatten(2), atol=1e-6)


def test_hooks_are_gone_afterwards():
    model = small_model("llama")
    with Capture(model, [0, 2], attention=1) as seen:
        model(input_ids=tokens())
    kept = dict(seen.states)
    model(input_ids=tokens() * 0)
    assert seen.states[2] is kept[2]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="stop"), Capture(model, [0, 1, 2], attention=1):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_first_pass_counts(name):
    """Of those within, the recomputation of a checkpointed layer among them."""
    model = small_model(name)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with Capture(model, [0, 1, 3], attention=2) as seen:
        model(input_ids=tokens()).logits.sum().backward()
        first = {**seen.states, **seen._parts}
        model(input_ids=tokens() * 0).logits.sum().backward()
    for layer, state in seen.states.items():
        assert first[layer] is state
    for part, tensor in seen._parts.items():
        assert first[part] is tensor
    with Capture(model, [1, 3], attention=2) as alone:
        model(input_ids=tokens())
    assert torch.equal(alone.states[3], seen.states[3])
    assert torch.equal(alone.attention.query, seen.attention.query)


def gradients(model: nn.Module, *, backward_inside: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    model.zero_grad()
    seen = Capture(model, [0, 1, 3], attention=2)
    with seen:
        output = model(input_ids=tokens()).logits
        if backward_inside:
            assert seen.attention is not None
            kept = [*seen.states.values(), seen.attention.query, seen.attention.key, seen.attention.value]
            (output.square().mean() + sum(x.square().mean() for x in kept)).backward()
    if not backward_inside:
        kept = [*seen.states.values(), seen.attention.query, seen.attention.key, seen.attention.value]
        (output.square().mean() + sum(x.square().mean() for x in kept)).backward()
    after = [*seen.states.values(), seen.attention.query, seen.attention.key, seen.attention.value]
    assert len(after) == len(kept) == 6
    assert all(torch.equal(a, b) for a, b in zip(after, kept, strict=True))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "distilbert"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_recomputed_activations_change_nothing(name, backward_inside):
    model = small_model(name)
    plain, kept = gradients(model, backward_inside=backward_inside)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, recomputed = gradients(model, backward_inside=backward_inside)
    assert plain.keys() == again.keys()
    assert len(plain) > 10
    for parameter in plain:
        assert torch.equal(plain[parameter], again[parameter]), parameter
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_what_is_not_there_is_refused():
    model = small_model("llama")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM \(llama\) has layers 1 to 3, and no 4"):
        Capture(model, [4])
    with pytest.raises(ConfigError, match="and no 0"):
        Capture(model, [0], attention=0)
    config = AutoConfig.for_model(
        "albert", vocab_size=50, hidden_size=16, embedding_size=8, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ConfigError, match=r"layers of AlbertForMaskedLM \(albert\) are not recognised"):
        num_layers(AutoModelForMaskedLM.from_config(config))
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(ConfigError, match=r"layer 1 of MambaForCausalLM \(mamba\) are not found"):
        Capture(mamba, [1], attention=1)
