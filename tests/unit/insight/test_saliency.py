"""Integrated gradients and attention against definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from trainer.insight.attention import attention_maps
from trainer.insight.saliency import integrated_gradients

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ORDINARY = torch.tensor([False, True, True, True, True, False])


def model(kind: str = "bert") -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=40, initializer_range=0.5, num_labels=3, **SIZES)
        return transformers.BertForSequenceClassification(config).eval()
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, pad_token_id=0, num_labels=3, **SIZES)
    return transformers.LlamaForSequenceClassification(config).eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 11, 12, 13, 14, 3]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_tokens_add_is_the_whole_difference(kind: str) -> None:
    found = integrated_gradients(
        model(kind), inputs(), lambda out: out.logits[:, 1], baseline_id=4, ordinary=ORDINARY, steps=200
    )
    assert found.tokens.sum() == pytest.approx(found.value - found.baseline, abs=4e-3)
    assert found.gap < 4e-3
    assert abs(found.value - found.baseline) > 0.01
    assert found.tokens[[0, 5]].tolist() == [0.0, 0.0]
    assert all(found.tokens[1:5] != 0)


def test_a_linear_model_is_explained_exactly() -> None:
    """Its integral is weight · (x − x′), whatever the number of steps."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 1)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.words

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(input_ids)).sum((1, 2))

    linear, ids = Linear(), torch.tensor([[1, 5, 6]])
    ordinary = torch.tensor([False, True, True])
    found = integrated_gradients(linear, {"input_ids": ids}, lambda out: out, baseline_id=9, ordinary=ordinary, steps=1)
    moved = linear.words.weight[[1, 5, 6]] - linear.words.weight[[1, 9, 9]]
    expected = (moved @ linear.head.weight[0]).detach().numpy()
    np.testing.assert_allclose(found.tokens, expected, rtol=1e-5, atol=1e-7)


def test_no_hook_and_no_gradient_stays() -> None:
    one = model()
    before = one(**inputs()).logits
    integrated_gradients(one, inputs(), lambda out: out.logits[:, 0], baseline_id=4, ordinary=ORDINARY, steps=2)
    assert torch.equal(one(**inputs()).logits, before)
    assert all(parameter.grad is None for parameter in one.parameters())


def test_attention_is_that_of_each_head() -> None:
    one = model()
    maps = attention_maps(one, inputs())
    assert maps.shape == (2, 2, 6, 6)
    np.testing.assert_allclose(maps.sum(-1), 1.0, rtol=1e-5)
    states = one.bert.embeddings(inputs()["input_ids"])
    layer = one.bert.encoder.layer[0].attention.self
    query, key = (part(states)[0].view(6, 2, 8).transpose(0, 1) for part in (layer.query, layer.key))
    expected = (query @ key.transpose(1, 2) / 8**0.5).softmax(-1).detach().numpy()
    np.testing.assert_allclose(maps[0], expected, rtol=1e-4, atol=1e-6)
    assert one.config._attn_implementation == "sdpa"
