"""Frozen parameters, rates by depth, one dropout rate."""

import pytest
import torch
from model_configs import VOCABULARY, run_config
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from trainer.errors import ConfigError
from trainer.model.build import meta_model
from trainer.model.depth import distances
from trainer.model.dropout import set_dropout
from trainer.model.freezing import is_partly_frozen
from trainer.model.groups import parameter_facts, parameter_groups


def with_optim(name: str, **options):
    config = run_config(name)
    return config.model_copy(update={"optim": config.optim.model_copy(update=options)})


def trained(name: str, *freeze: str) -> list[str]:
    model = meta_model(with_optim(name, freeze=freeze), VOCABULARY)
    return [fact.name for fact in parameter_facts(model)]


def test_patterns_and_first_layers():
    everything = trained("bert")
    assert trained("bert", "bert.embeddings.*") == [each for each in everything if "embeddings" not in each]
    first = trained("llama", "layers:1")
    assert "model.layers.1.mlp.up_proj.weight" in first
    assert not any(each.startswith(("model.layers.0.", "model.embed_tokens.")) for each in first)
    assert {"model.norm.weight", "lm_head.weight"} <= set(first)
    assert trained("llama", "layers:0") == [each for each in trained("llama") if "embed_tokens" not in each]
    assert not any(".layers." in each for each in trained("llama", "layers:2"))


def test_an_alias_freezes_what_it_is_tied_to():
    assert "model.embed_tokens.weight" not in trained("llama-tied", "lm_head.*")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("model.embedtokens.*", "the nearest is model.embed_tokens.weight"),
        ("layers:3", "N from 0 to 2"),
        ("layers:two", "N from 0 to 2"),
        ("*", "leaves nothing to train"),
    ],
)
def test_refusals(pattern, said):
    with pytest.raises(ConfigError, match=said):
        trained("llama", pattern)


def test_what_is_partly_frozen():
    assert not is_partly_frozen(run_config("llama"))
    assert is_partly_frozen(with_optim("llama", freeze=("layers:1",)))


def test_distances_of_decoders_and_encoders():
    below = distances(meta_model(run_config("llama"), VOCABULARY))
    assert below["model.embed_tokens.weight"] == 3
    assert below["model.layers.0.mlp.up_proj.weight"] == 2
    assert below["model.layers.1.mlp.up_proj.weight"] == 1
    assert below["model.norm.weight"] == below["lm_head.weight"] == 0
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.device("meta"):
        bert = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **sizes))
    below = distances(bert)
    assert {each for name, each in below.items() if name.startswith("bert.embeddings.")} == {3}
    assert below["bert.pooler.dense.weight"] == below["classifier.weight"] == 0
    assert below["bert.encoder.layer.1.output.dense.bias"] == 1


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_each_stack_of_an_encoder_decoder_counts_its_own_layers(name):
    sizes = {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2},
        "bart": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    }
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, vocab_size=VOCABULARY, **sizes[name]))
    below = distances(model)
    prefix, layers = ("", "block") if name == "t5" else ("model.", "layers")
    for stack, count in (("encoder", 2), ("decoder", 3)):
        for number in range(count):
            inside = f"{prefix}{stack}.{layers}.{number}."
            assert {each for key, each in below.items() if key.startswith(inside)} == {count - number}
    assert below[f"{prefix}shared.weight"] == 4
    assert all(each == 4 for key, each in below.items() if "embedding" in key)


def test_rates_fall_from_the_head_to_the_embeddings():
    config = with_optim("llama", layer_decay=0.5)
    model = meta_model(config, VOCABULARY)
    groups = parameter_groups(model, config)
    rates = {name: group["lr_scale"] for group in groups for name, each in model.named_parameters() if _in(each, group)}
    assert rates == {name: 0.5**distance for name, distance in distances(model).items()}
    assert [group["name"] for group in groups] == [
        *("decay-0", "decay-1", "decay-2"),
        *("spared-0", "spared-1", "spared-2", "spared-3"),
    ]
    assert all("lr_scale" not in group for group in parameter_groups(model, run_config("llama")))


def _in(parameter, group) -> bool:
    return any(each is parameter for each in group["params"])


def test_one_dropout_rate():
    bert = AutoConfig.for_model("bert")
    assert set_dropout(bert, 0.25, but={"attention_probs_dropout_prob"}) == ("hidden_dropout_prob",)
    assert (bert.hidden_dropout_prob, bert.attention_probs_dropout_prob) == (0.25, 0.1)
    assert bert.classifier_dropout is None
    gpt2 = AutoConfig.for_model("gpt2")
    set_dropout(gpt2, 0.0)
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="has no dropout rate"):
        set_dropout(AutoConfig.for_model("mamba"), 0.1)
