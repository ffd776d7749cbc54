"""A page about texts that a model was looked into: tokens by how much they add, attention by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.records import FloatArray
from trainer.report.web import inline, page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = """
<p class="note">Integrated gradients on word embeddings: <span style="background: rgba(31, 119, 180, .45)">blue</span>
tokens speak for what is predicted, <span style="background: rgba(214, 39, 40, .45)">red</span> ones against it.
What all tokens add together is the output less that of a text without content.</p>
{% for text in texts %}
<h2>{{ text.heading }}</h2>
{% if text.tokens %}
<p class="tokens">{% for token in text.tokens %}<span style="background: {{ token.colour }}"
 title="{{ token.title }}">{{ token.text }}</span> {% endfor %}</p>
<p class="note">{{ text.note }}</p>
{% endif %}
{% if text.picture %}<img alt="attention by layer and head" src="{{ text.picture }}">{% endif %}
{% endfor %}
"""
_MOST_SHOWN = 48
"""Tokens of a text whose attention is drawn."""
DPI = 80


@dataclass(frozen=True, slots=True)
class Inside:
    """One text."""

    heading: str
    tokens: tuple[str, ...]
    saliency: FloatArray | None
    """[tokens]; None: not known."""
    note: str
    attention: FloatArray | None
    """[layers, heads, tokens, tokens]; None: not known."""


def write_page(path: Path, title: str, texts: Sequence[Inside]) -> None:
    """One file with everything in it."""
    path.write_text(page(title, _TEMPLATE, texts=[_shown(text) for text in texts]), encoding="utf-8")


def _shown(text: Inside) -> dict[str, object]:
    tokens: list[dict[str, str]] = []
    if text.saliency is not None:
        largest = max(float(np.abs(text.saliency).max()), 1e-12)
        for token, value in zip(text.tokens, text.saliency.tolist(), strict=True):
            hue = "31, 119, 180" if value > 0 else "214, 39, 40"
            colour = f"rgba({hue}, {abs(value) / largest * 0.7:.3f})"
            tokens.append({"text": token, "colour": colour, "title": f"{value:+.4f}"})
    picture = None if text.attention is None else inline(attention_figure(text.attention))
    return {"heading": text.heading, "tokens": tokens, "note": text.note, "picture": picture}


def attention_figure(attention: FloatArray) -> Figure:
    """[layers, heads, tokens, tokens] as a picture each, of the first tokens."""
    from matplotlib.figure import Figure

    layers, heads, length, _ = attention.shape
    shown = min(length, _MOST_SHOWN)
    figure = Figure(figsize=(1.4 * heads + 0.6, 1.4 * layers + 0.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer, head]
            axes.imshow(attention[layer, head, :shown, :shown], cmap="viridis", vmin=0.0, vmax=1.0)
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=7)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=7)
    if shown < length:
        figure.suptitle(f"the first {shown} of {length} tokens", fontsize=8)
    return figure
