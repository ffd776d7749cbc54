"""Which tokens a prediction comes from: integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.records import FloatArray

STEPS = 48


@dataclass(frozen=True, slots=True)
class Saliency:
    """How much each token of one text adds to an output."""

    tokens: FloatArray
    """[L], in the units of the output; their sum is `value` − `baseline`, up to `gap`."""
    value: float
    """The output for the text."""
    baseline: float
    """The output for the text without any content: all its ordinary tokens are the baseline token."""
    gap: float
    """|Σ tokens − (value − baseline)|: what the sum over steps has missed of the integral."""


def integrated_gradients(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    output: Callable[[Any], Tensor],
    *,
    baseline_id: int,
    ordinary: Tensor,
    steps: int = STEPS,
) -> Saliency:
    """(x − x′) · ∫ ∂F(x′ + α(x − x′))/∂x dα over the word embeddings of a text, by the midpoint rule.

    Sundararajan et al. 2017, equation 1 (https://arxiv.org/abs/1703.01365).

    Args:
        model: in evaluation mode, with `get_input_embeddings`.
        inputs: of one text, `input_ids` [1, L] among them.
        output: from what the model returns to a number, [1].
        baseline_id: token that stands for nothing (mask, padding or unknown).
        ordinary: [L] bool; the other tokens (the tokenizer's own) are the same in the baseline.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    ids = inputs["input_ids"]
    without = torch.where(ordinary.to(ids.device), torch.full_like(ids, baseline_id), ids)
    with torch.no_grad():
        value = float(output(model(**inputs)))
        baseline = float(output(model(**{**inputs, "input_ids": without})))
        # some embeddings scale what they look up: both ends are taken as the model itself sees them
        start, end = embedding(without), embedding(ids)
    total = torch.zeros_like(end, dtype=torch.float64)
    for step in range(steps):
        point = (start + (step + 0.5) / steps * (end - start)).requires_grad_()
        with _looked_up(embedding, point):
            (slope,) = torch.autograd.grad(output(model(**inputs)).sum(), point)
        total += slope.double()
    tokens = ((end - start).double() * total / steps).sum(dim=-1)[0]
    gap = abs(float(tokens.sum()) - (value - baseline))
    return Saliency(tokens.cpu().numpy(), value, baseline, gap)


@contextmanager
def _looked_up(embedding: nn.Module, states: Tensor) -> Iterator[None]:
    """Within it, looking up gives these states."""
    handle = embedding.register_forward_hook(lambda _module, _inputs, _output: states)
    try:
        yield
    finally:
        handle.remove()
