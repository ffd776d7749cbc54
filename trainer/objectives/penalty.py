"""L1 and L2 penalties on weights. Elementwise, so they act on each rank's shard of the gradient without a message."""

from __future__ import annotations

import torch
from torch import Tensor


def penalty_value(weight: Tensor, l1: float, l2: float) -> Tensor:
    """l1 · Σ|w| + l2/2 · Σw² over the elements of `weight` (any shape), 0-dim fp32. Shards add up to the whole."""
    flat = weight.detach().float().flatten()
    value = torch.zeros((), dtype=torch.float32, device=weight.device)
    if l1:
        value += l1 * flat.abs().sum()
    if l2:
        value += 0.5 * l2 * torch.dot(flat, flat)
    return value


def penalty_gradient(weight: Tensor, l1: float, l2: float) -> Tensor:
    """Gradient of :func:`penalty_value`: l1 · sign(w) + l2 · w, in the shape and type of `weight`; sign(0) is 0."""
    weight = weight.detach()
    gradient = weight * l2
    if l1:
        gradient.add_(weight.sign(), alpha=l1)
    return gradient
