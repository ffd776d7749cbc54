"""L1 and L2 penalties on weights. Elementwise, so they act on each rank's shard of the gradient without a message."""

from __future__ import annotations

import torch
from torch import Tensor


def penalty_value(weight: Tensor, l1: float, l2: float, l2_start: float = 0.0, start: Tensor | None = None) -> Tensor:
    """l1 · Σ|w| + l2/2 · Σw² + l2_start/2 · Σ(w − w₀)² over the elements of `weight` (any shape), 0-dim fp32. Shards
    add up to the whole. The last is L2-SP (https://arxiv.org/abs/1802.01483, eq. 2); a head that is drawn anew is drawn
    to where it began too, where the paper draws it to 0.

    Args:
        start: w₀, where `l2_start` is not 0.
    """
    flat = weight.detach().float().flatten()
    value = torch.zeros((), dtype=torch.float32, device=weight.device)
    if l1:
        value += l1 * flat.abs().sum()
    if l2:
        value += 0.5 * l2 * torch.dot(flat, flat)
    if l2_start and start is not None:
        away = flat - start.flatten()
        value += 0.5 * l2_start * torch.dot(away, away)
    return value


def penalty_gradient(
    weight: Tensor, l1: float, l2: float, l2_start: float = 0.0, start: Tensor | None = None
) -> Tensor:
    """Gradient of :func:`penalty_value`: l1 · sign(w) + l2 · w + l2_start · (w − w₀), in the shape and type of
    `weight`; sign(0) is 0."""
    weight = weight.detach()
    gradient = weight * l2
    if l1:
        gradient.add_(weight.sign(), alpha=l1)
    if l2_start and start is not None:
        gradient.add_(weight - start, alpha=l2_start)
    return gradient
