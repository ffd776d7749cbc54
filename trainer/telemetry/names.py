"""Where a parameter sits in its model, read from its name. Pure; for grouping norms in views, never for training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["embedding", "attention", "mlp", "norm", "head", "other"]

PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "norm", "head", "other")

# the first component that counts layers: model.layers.3, transformer.h.3, bert.encoder.layer.3, blocks.3
_LAYER = re.compile(r"(?:^|\.)(?:h|[a-z_]*(?:layer|block)s?)\.(\d+)\.", re.IGNORECASE)
# norms come first: attn_norm, self_attn_layer_norm and attention.output.LayerNorm belong to attention by name only
_NORM = re.compile(r"norm|(?:^|\.)ln(?:_|\d|\.)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|experts|moe|intermediate|(?:^|\.)(?:fc\d?|w\d|output)\.", re.IGNORECASE)
_HEAD = re.compile(
    r"lm_head|embed_out|vocab_|(?:^|\.)(?:cls|head|classifier|score|predictions)\.|^decoder\.bias$", re.IGNORECASE
)
_EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e\.", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's layer (from 0; None outside the stack of layers) and the part that it belongs to."""

    layer: int | None
    part: Part


def place(name: str) -> Place:
    """Where the parameter `name` (dotted, as in `named_parameters`) sits. What is not recognised is `other`."""
    found = _LAYER.search(name)
    part: Part = "other"
    if _NORM.search(name):
        part = "norm"
    elif found:
        inside = name[found.end() :]
        if _ATTENTION.search(inside):
            part = "attention"
        elif _MLP.search(inside):
            part = "mlp"
    elif _HEAD.search(name):
        part = "head"
    elif _EMBEDDING.search(name):
        part = "embedding"
    return Place(int(found[1]) if found else None, part)


def group_by_layer(names: list[str]) -> dict[str, list[int]]:
    """Indices into `names` by layer: "layer 00", "layer 01", …, and what is outside the layers by its part.

    Every index is in exactly one group; the labels sort in the order of the layers.
    """
    places = [place(name) for name in names]
    last = max((spot.layer for spot in places if spot.layer is not None), default=0)
    width = max(2, len(str(last)))
    groups: dict[str, list[int]] = {}
    for index, spot in enumerate(places):
        label = spot.part if spot.layer is None else f"layer {spot.layer:0{width}}"
        groups.setdefault(label, []).append(index)
    return dict(sorted(groups.items()))


def group_by_part(names: list[str]) -> dict[str, list[int]]:
    """Indices into `names` by part, over all layers. Every index is in exactly one group."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(place(name).part, []).append(index)
    return {part: groups[part] for part in PARTS if part in groups}
