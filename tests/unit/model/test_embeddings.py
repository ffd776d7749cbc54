"""Embeddings moved and mixed on their way into a model, and models that have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from trainer.errors import ConfigError
from trainer.model.embeddings import find_embeddings

IDS = torch.arange(2, 8).view(2, 3)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config).eval()


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=20, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, use_cache=False, **layers)
    return BartForConditionalGeneration(config).eval()


def test_nothing_moved_nothing_changed() -> None:
    model = gpt2()
    expected = model(input_ids=IDS).logits
    embeddings = find_embeddings(model)
    with embeddings.moved(None) as seen:
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert [each.shape for each in seen] == [(2, 3, 8)] * 2
    with embeddings.moved(torch.ones(2, 3, 8)):
        assert not torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert len(seen) == 2
    assert not embeddings.sharded


def test_an_error_in_the_model_leaves_no_hook() -> None:
    for model in (gpt2(), bart()):
        embeddings = find_embeddings(model)
        hooks = len(embeddings.module._forward_hooks)
        with pytest.raises(ValueError, match="cannot be moved"), embeddings.moved(torch.zeros(2, 4, 8)):
            model(input_ids=IDS)
        with pytest.raises(ValueError, match="cannot be mixed"), embeddings.mixed(IDS[:1], IDS[:1], torch.ones(1)):
            model(input_ids=IDS)
        assert len(embeddings.module._forward_hooks) == hooks
        assert "forward" not in embeddings.module.__dict__


def test_samples_twice_are_moved_alike() -> None:
    model, delta = gpt2(), torch.randn(2, 3, 8)
    with find_embeddings(model).moved(delta):
        first, second = model(input_ids=torch.cat([IDS, IDS])).logits.chunk(2)
    torch.testing.assert_close(first, second)


def test_only_the_encoder_is_moved_where_both_share_the_lookup() -> None:
    model = bart()
    # one module in both places, as older models have it
    model.model.decoder.embed_tokens = model.model.encoder.embed_tokens
    embeddings = find_embeddings(model)
    assert embeddings.encoder is model.get_encoder()
    delta = torch.randn(2, 3, 8)
    with embeddings.moved(delta) as seen, torch.no_grad():
        found = model(input_ids=IDS, decoder_input_ids=IDS[:, :2]).logits
        expected = model.model.encoder.embed_tokens(IDS)
    assert len(seen) == 1
    plain = model(inputs_embeds=expected + delta, decoder_input_ids=IDS[:, :2]).logits
    torch.testing.assert_close(found, plain)


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no input embeddings"):
        find_embeddings(nn.Linear(2, 2))


def test_reentrant_recomputation_is_refused() -> None:
    model = gpt2()
    model.activation_checkpointing_enable({"use_reentrant": False})
    find_embeddings(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        find_embeddings(model)
