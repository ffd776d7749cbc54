"""Where the attention of a transformers model makes its queries, keys and values, told by the names of its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

_APART = (
    ("q_norm", "k_norm", "v_proj"),  # Qwen3, OLMo2, Gemma3
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen2, OPT, Phi
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
)
_SIDE_BY_SIDE = ("c_attn", "Wqkv", "qkv_proj")  # GPT-2; ModernBERT, MPT; Phi-3
_BY_HEAD = ("query_key_value",)  # GPT-NeoX, BLOOM, Persimmon

Packing = Literal["apart", "side by side", "by head"]


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention: the modules whose outputs hold queries, keys and values, before any rotary embedding."""

    query: nn.Module
    key: nn.Module
    value: nn.Module | None
    """None: it has none of its own."""
    head_size: int
    num_heads: int
    packing: Packing = "apart"
    """`side by side`: one module gives [queries | keys | values]; `by head`: one gives them head after head."""

    def split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [..., heads · size], from the output of one module that gives all three."""
        queries = self.num_heads * self.head_size
        if self.packing == "by head":
            by_head = output.view(*output.shape[:-1], self.num_heads, 3, self.head_size)
            query, key, value = (part.flatten(-2) for part in by_head.unbind(-2))
        else:
            keys = (output.shape[-1] - queries) // 2
            query, key, value = torch.split(output, [queries, keys, keys], dim=-1)
        return query, key, value


def find_attention(model: nn.Module, config: Any = None) -> list[Attention]:
    """The self-attention within a transformers model or a part of one, in order; empty where none is recognised.

    Args:
        config: of the model; None: `model.config`.
    """
    config = getattr(model, "config", None) if config is None else config
    return [found for module in model.modules() if (found := _recognise(module, config)) is not None]


def _recognise(module: nn.Module, config: Any) -> Attention | None:
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    size = size or getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None)
    if not isinstance(size, int) or not isinstance(heads, int):
        return None
    children = dict(module.named_children())
    for query, key, value in _APART:
        if query in children and key in children:
            return Attention(children[query], children[key], children.get(value), size, heads)
    if getattr(module, "is_cross_attention", False) or "q_attn" in children:
        return None
    for names, packing in ((_SIDE_BY_SIDE, "side by side"), (_BY_HEAD, "by head")):
        for name in names:
            if name in children and (how := _packing(module, children[name], packing, size, heads)) is not None:
                return Attention(children[name], children[name], children[name], size, heads, how)
    return None


def _packing(module: nn.Module, fused: nn.Module, usual: str, size: int, heads: int) -> Packing | None:
    """How the output of `fused` is laid out; None where its width says that it is neither way."""
    if "CodeGen" in type(module).__name__:  # laid out for the devices that it was trained on
        return None
    width = getattr(fused, "out_features", None) or getattr(fused, "nf", None)
    if not isinstance(width, int):
        return None
    if usual == "by head" or getattr(module, "multi_query", None) is False:  # GPT-BigCode has both
        return "by head" if width == 3 * heads * size else None
    keys = width - heads * size
    return "side by side" if keys > 0 and keys % (2 * size) == 0 else None
