"""Losses of language models over logits. Pure; sums, so that the caller divides once by the global target count."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position at which nothing is predicted."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all targets, in nats.

    Args:
        logits: [..., V] of any floating type; computed in fp32.
        labels: [...] int64, the target of the logits at the same place; −100 where there is none.

    Returns:
        0-dim fp32; 0 with zero gradient when no label is a target.
    """
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def cross_entropy_and_squared_partition(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over all targets of the cross-entropy and of the squared log-partition log²Z, in one pass over the logits.

    The second is what the z-loss weighs (PaLM, §5, https://arxiv.org/abs/2204.02311). No fp32 copy of the logits is
    kept for the backward pass.

    Args:
        logits: [..., V] of any floating type; computed in fp32.
        labels: [...] int64; −100 where there is no target.

    Returns:
        Two 0-dim fp32 tensors; both 0 with zero gradient when no label is a target.
    """
    sums: tuple[Tensor, Tensor] = _CrossEntropyAndSquaredPartition.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, -2), labels.flatten()
    )
    return sums


class _CrossEntropyAndSquaredPartition(torch.autograd.Function):
    """With p = softmax(x): d CE/dx = p − onehot, d log²Z/dx = 2·logZ·p, so both share p and one buffer."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        partition = torch.logsumexp(logits.float(), dim=-1)
        is_target = labels != IGNORED
        targets = labels.where(is_target, 0)
        at_target = logits.gather(-1, targets[:, None]).squeeze(-1).float()
        ctx.save_for_backward(logits, targets, is_target, partition)
        # where(), not a product: 0 × inf at an ignored position would be NaN
        cross_entropy = (partition - at_target).where(is_target, 0.0).sum()
        return cross_entropy, partition.square().where(is_target, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_cross_entropy, of_squared_partition = gradients
        logits, targets, is_target, partition = ctx.saved_tensors
        of_probability = (of_cross_entropy + 2.0 * partition * of_squared_partition).where(is_target, 0.0)
        # bf16 − fp32 promotes: one fp32 buffer, no copy before it
        buffer = torch.sub(logits, partition[:, None]).exp_().mul_(of_probability[:, None])
        at_target = of_cross_entropy.expand_as(partition).where(is_target, 0.0)
        buffer.scatter_add_(-1, targets[:, None], -at_target[:, None])
        return buffer.to(logits.dtype), None
