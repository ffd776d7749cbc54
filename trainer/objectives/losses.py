"""Losses over the outputs of models. Pure; sums, so that the caller divides once by the global target count."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a place at which nothing is predicted."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all targets, in nats.

    Args:
        logits: [..., V] of any floating type; computed in fp32.
        labels: [...] int64, the target of the logits at the same place; −100 where there is none.

    Returns:
        0-dim fp32; 0 with zero gradient when no label is a target.
    """
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def cross_entropy_and_squared_partition(
    logits: Tensor, labels: Tensor, *, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over all targets of the cross-entropy and of the squared log-partition log²Z, in one pass over the logits.

    The second is what the z-loss weighs (PaLM, §5, https://arxiv.org/abs/2204.02311). No fp32 copy of the logits is
    kept for the backward pass.

    Args:
        logits: [..., V] of any floating type; computed in fp32.
        labels: [...] int64; −100 where there is no target.
        smoothing: fraction ε of the target's probability that is spread over all V classes, the target among them:
            the target distribution is (1 − ε)·onehot + ε/V (Szegedy et al. 2016, §7; that of
            `torch.nn.CrossEntropyLoss(label_smoothing=ε)`).
        class_weights: [V] fp32, factor on the whole smoothed cross-entropy of a target of this class. None: all 1.
            Where both are given, torch's loss weighs the spread part of a target by the weights of all classes instead.

    Returns:
        Two 0-dim fp32 tensors; both 0 with zero gradient when no label is a target.
    """
    sums: tuple[Tensor, Tensor] = _CrossEntropyAndSquaredPartition.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, -2), labels.flatten(), smoothing, class_weights
    )
    return sums


class _CrossEntropyAndSquaredPartition(torch.autograd.Function):
    """With p = softmax(x): d CE/dx = p − (1 − ε)·onehot − ε/V, d log²Z/dx = 2·logZ·p, so both share p and one
    buffer."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, class_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        partition = torch.logsumexp(logits.float(), dim=-1)
        is_target = labels != IGNORED
        targets = labels.where(is_target, 0)
        expected = logits.gather(-1, targets[:, None]).squeeze(-1).float()
        if smoothing:
            expected = expected.lerp(logits.mean(-1, dtype=torch.float32), smoothing)
        weights = None if class_weights is None else class_weights[targets]
        ctx.save_for_backward(logits, targets, is_target, partition, weights)
        ctx.smoothing = smoothing
        cross_entropy = partition - expected
        if weights is not None:
            cross_entropy = cross_entropy * weights
        # where(), not a product: 0 × inf at an ignored position would be NaN
        return cross_entropy.where(is_target, 0.0).sum(), partition.square().where(is_target, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        of_cross_entropy, of_squared_partition = gradients
        logits, targets, is_target, partition, weights = ctx.saved_tensors
        if weights is not None:
            of_cross_entropy = of_cross_entropy * weights
        of_probability = (of_cross_entropy + 2.0 * partition * of_squared_partition).where(is_target, 0.0)
        # bf16 − fp32 promotes: one fp32 buffer, no copy before it
        buffer = torch.sub(logits, partition[:, None]).exp_().mul_(of_probability[:, None])
        at_target = of_cross_entropy.expand_as(partition).where(is_target, 0.0)
        if ctx.smoothing:
            buffer.sub_(at_target[:, None], alpha=ctx.smoothing / logits.shape[-1])
            at_target = at_target * (1.0 - ctx.smoothing)
        buffer.scatter_add_(-1, targets[:, None], -at_target[:, None])
        return buffer.to(logits.dtype), None, None, None


def binary_cross_entropy_sum(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Sum over the texts of the mean over the classes of the binary cross-entropy, in nats.

    Args:
        logits: [B, C] of any floating type; computed in fp32.
        labels: [B, C] float, 0 or 1; all −100: not a text.
        smoothing: ε: the targets are y·(1 − ε) + ε/2.

    Returns:
        0-dim fp32; 0 with zero gradient when there is no text.
    """
    is_text = labels[:, :1] >= 0
    targets = labels.float().where(is_text, 0.0)
    if smoothing:
        targets = targets * (1.0 - smoothing) + smoothing / 2.0
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return losses.where(is_text, 0.0).sum() / max(labels.shape[1], 1)


def squared_error_sum(values: Tensor, labels: Tensor) -> Tensor:
    """Sum of the squared errors.

    Args:
        values: [B] of any floating type; computed in fp32.
        labels: [B] float; NaN: not a text.

    Returns:
        0-dim fp32; 0 with zero gradient when there is no text.
    """
    is_text = ~labels.isnan()
    return (values.float() - labels.float().where(is_text, 0.0)).square().where(is_text, 0.0).sum()


def symmetric_kl_sum(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """Sum over all targets of (KL(p‖q) + KL(q‖p)) / 2 of two predictions, in nats (R-Drop, Liang et al. 2021, eq. 2,
    https://arxiv.org/abs/2106.14448).

    No fp32 copy of the logits is kept for the backward pass.

    Args:
        first, second: logits [..., V] of p and q, of any floating type; computed in fp32.
        labels: [...] int64; −100 where there is no target.

    Returns:
        0-dim fp32; 0 with zero gradient when no label is a target.
    """
    flat = (first.flatten(0, -2), second.flatten(0, -2))
    value: Tensor = _SymmetricKL.apply(*flat, labels.flatten() != IGNORED)  # type: ignore[no-untyped-call]
    return value


class _SymmetricKL(torch.autograd.Function):
    """With d = x − y of the logits: KL(p‖q) + KL(q‖p) = Σ (p − q)·d, and its derivative by x is p − q + p·(d − Σ p·d):
    the partitions fall out of both. By y it is the same with p and q, x and y exchanged."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, is_target: Tensor) -> Tensor:
        ctx.save_for_backward(first, second, is_target)
        p, q = (logits.softmax(-1, dtype=torch.float32) for logits in (first, second))
        rows = p.sub_(q).mul_(torch.sub(first.float(), second)).sum(-1)
        return rows.where(is_target, 0.0).sum() / 2.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        first, second, is_target = ctx.saved_tensors
        factor = (gradients[0] / 2.0).expand(is_target.shape).where(is_target, 0.0)[:, None]
        p, q = (logits.softmax(-1, dtype=torch.float32) for logits in (first, second))
        d = torch.sub(first.float(), second)
        spare = torch.mul(p, d)
        by_first = spare.sub_(p * spare.sum(-1, keepdim=True)).add_(p).sub_(q).mul_(factor)
        of_second = torch.mul(q, d)
        by_second = q * of_second.sum(-1, keepdim=True)
        by_second.sub_(of_second).add_(q).sub_(p).mul_(factor)
        return by_first.to(first.dtype), by_second.to(second.dtype), None


def symmetric_binary_kl_sum(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """As :func:`symmetric_kl_sum` of yes-or-no predictions: the mean over the classes, summed over the texts.

    Args:
        first, second: logits [B, C].
        labels: [B, C] float; all −100: not a text.
    """
    x, y = first.float(), second.float()
    rows = ((x.sigmoid() - y.sigmoid()) * (x - y)).mean(-1)
    return rows.where(labels[:, 0] >= 0, 0.0).sum() / 2.0
