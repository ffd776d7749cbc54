"""Where parameters sit, over the names that transformers gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.telemetry.names import Place, group_by_layer, group_by_part, place

EXPECTED = {
    # Llama, Qwen3, Gemma 2, OLMo 2
    "model.embed_tokens.weight": Place(None, "embedding"),
    "model.layers.0.self_attn.q_proj.weight": Place(0, "attention"),
    "model.layers.31.self_attn.o_proj.bias": Place(31, "attention"),
    "model.layers.3.self_attn.q_norm.weight": Place(3, "norm"),
    "model.layers.3.mlp.gate_proj.weight": Place(3, "mlp"),
    "model.layers.3.input_layernorm.weight": Place(3, "norm"),
    "model.layers.3.post_attention_layernorm.weight": Place(3, "norm"),
    "model.layers.3.pre_feedforward_layernorm.weight": Place(3, "norm"),
    "model.norm.weight": Place(None, "norm"),
    "lm_head.weight": Place(None, "head"),
    # Mixtral
    "model.layers.7.mlp.gate.weight": Place(7, "mlp"),
    "model.layers.7.mlp.experts.gate_up_proj": Place(7, "mlp"),
    "model.layers.7.block_sparse_moe.experts.3.w2.weight": Place(7, "mlp"),
    # GPT-2
    "transformer.wte.weight": Place(None, "embedding"),
    "transformer.wpe.weight": Place(None, "embedding"),
    "transformer.h.11.ln_1.weight": Place(11, "norm"),
    "transformer.h.11.attn.c_attn.weight": Place(11, "attention"),
    "transformer.h.11.attn.c_proj.bias": Place(11, "attention"),
    "transformer.h.11.mlp.c_proj.weight": Place(11, "mlp"),
    "transformer.ln_f.weight": Place(None, "norm"),
    # GPT-NeoX
    "gpt_neox.embed_in.weight": Place(None, "embedding"),
    "gpt_neox.layers.5.attention.query_key_value.weight": Place(5, "attention"),
    "gpt_neox.layers.5.mlp.dense_h_to_4h.weight": Place(5, "mlp"),
    "embed_out.weight": Place(None, "head"),
    # OPT
    "model.decoder.embed_positions.weight": Place(None, "embedding"),
    "model.decoder.layers.2.self_attn_layer_norm.weight": Place(2, "norm"),
    "model.decoder.layers.2.fc1.weight": Place(2, "mlp"),
    # BERT
    "bert.embeddings.word_embeddings.weight": Place(None, "embedding"),
    "bert.embeddings.LayerNorm.weight": Place(None, "norm"),
    "bert.encoder.layer.4.attention.self.query.weight": Place(4, "attention"),
    "bert.encoder.layer.4.attention.output.dense.weight": Place(4, "attention"),
    "bert.encoder.layer.4.attention.output.LayerNorm.bias": Place(4, "norm"),
    "bert.encoder.layer.4.intermediate.dense.weight": Place(4, "mlp"),
    "bert.encoder.layer.4.output.dense.weight": Place(4, "mlp"),
    "bert.encoder.layer.4.output.LayerNorm.weight": Place(4, "norm"),
    "cls.predictions.transform.dense.weight": Place(None, "head"),
    "cls.predictions.bias": Place(None, "head"),
    # ModernBERT
    "model.embeddings.tok_embeddings.weight": Place(None, "embedding"),
    "model.embeddings.norm.weight": Place(None, "norm"),
    "model.layers.1.attn_norm.weight": Place(1, "norm"),
    "model.layers.1.attn.Wqkv.weight": Place(1, "attention"),
    "model.layers.1.mlp.Wi.weight": Place(1, "mlp"),
    "model.final_norm.weight": Place(None, "norm"),
    "head.dense.weight": Place(None, "head"),
    "decoder.bias": Place(None, "head"),
    # DistilBERT
    "distilbert.transformer.layer.0.attention.q_lin.weight": Place(0, "attention"),
    "distilbert.transformer.layer.0.ffn.lin1.weight": Place(0, "mlp"),
    "vocab_projector.bias": Place(None, "head"),
    # nothing known
    "model.layers.6.mixer.A_log": Place(6, "other"),
    "temperature": Place(None, "other"),
}


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items())
def test_a_name_is_placed(name: str, expected: Place) -> None:
    assert place(name) == expected


def test_groups_are_in_the_order_of_the_layers() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (10, 2, 100)] + ["lm_head.weight"]
    assert group_by_layer(names) == {"head": [3], "layer 002": [1], "layer 010": [0], "layer 100": [2]}
    assert group_by_part(names) == {"mlp": [0, 1, 2], "head": [3]}


@given(st.lists(st.sampled_from(sorted(EXPECTED)) | st.text(max_size=20)))
def test_every_parameter_is_in_exactly_one_group(names: list[str]) -> None:
    for groups in (group_by_layer(names), group_by_part(names)):
        assert sorted(index for members in groups.values() for index in members) == list(range(len(names)))
