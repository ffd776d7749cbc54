"""Which parameters are decayed, in which order the optimizer gets them."""

import itertools

import pytest
from model_configs import TINY, VOCABULARY, run_config

from trainer.model.build import meta_model
from trainer.model.groups import parameter_facts, parameter_groups


def decayed(name: str, **options) -> set[str]:
    config = run_config(name, **options)
    facts = parameter_facts(meta_model(config, VOCABULARY), decay_embeddings=config.optim.decay_embeddings)
    return {fact.name for fact in facts if fact.decay}


def test_llama_decays_its_matrices_only():
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    matrices = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    assert decayed("llama") == matrices | {"lm_head.weight"}
    assert decayed("llama-tied") == matrices
    assert decayed("llama-tied", decay_embeddings=True) == matrices | {"model.embed_tokens.weight"}


def test_gpt2_and_bert_spare_biases_norms_and_all_embeddings():
    per_layer = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert decayed("gpt2") == {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in per_layer}
    names = decayed("bert")
    assert "cls.predictions.transform.dense.weight" in names
    assert len(names) == 2 * 6 + 1
    assert not any("embeddings" in name or "LayerNorm" in name or name.endswith("bias") for name in names)
    with_embeddings = decayed("bert", decay_embeddings=True) - names
    assert with_embeddings == {
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }


def test_norms_with_a_weight_for_each_head_are_spared():
    fields = {"model_type": "cohere", "use_qk_norm": True}
    names = decayed("olmo2", fields=fields)
    model = meta_model(run_config("olmo2", fields=fields), VOCABULARY)
    assert model.model.layers[0].self_attn.q_norm.weight.dim() == 2
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("q_norm" in name for name in names)


def test_mamba_exempts_its_state_matrix():
    names = decayed("mamba")
    assert "backbone.layers.0.mixer.in_proj.weight" in names
    assert not any("A_log" in name for name in names)


@pytest.mark.parametrize("name", sorted(TINY))
def test_groups_hold_every_parameter_once_in_the_order_of_the_model(name):
    config = run_config(name)
    model = meta_model(config, VOCABULARY)
    groups = parameter_groups(model, config)
    assert [group["name"] for group in groups] == ["decay", "spared"]
    assert [group["weight_decay"] for group in groups] == [config.optim.weight_decay, 0.0]
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    places = [[order[id(parameter)] for parameter in group["params"]] for group in groups]
    assert all(group == sorted(group) for group in places)
    assert sorted(itertools.chain.from_iterable(places)) == list(range(len(order)))
    facts = parameter_facts(model)
    assert [fact.name for fact in facts] == [key for key, _ in model.named_parameters()]
    assert [fact.shape for fact in facts] == [tuple(parameter.shape) for parameter in model.parameters()]


def test_a_frozen_parameter_is_left_out_and_no_group_is_empty():
    config = run_config("llama")
    model = meta_model(config, VOCABULARY)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in key)
    [group] = parameter_groups(model, config)
    assert group["name"] == "spared"
    assert all("norm" in fact.name for fact in parameter_facts(model))
