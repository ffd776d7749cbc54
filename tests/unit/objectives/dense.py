"""Distillation as its definition says it: whole logits, autograd, no trick."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.distill import DistillLossConfig
from trainer.knowledge import Head

KINDS = ("forward_kl", "reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation")


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)


def divergence(options: DistillLossConfig, p: Tensor, q: Tensor) -> Tensor:
    """D of the distributions [..., V], as the options' docstring writes it."""
    alpha, beta = options.alpha, options.beta
    match options.kind:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "js":
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case "skew_forward_kl":
            return kl(p, alpha * p + (1 - alpha) * q)
        case "skew_reverse_kl":
            return kl(q, (1 - alpha) * p + alpha * q)
    return (p - q).abs().sum(-1) / 2


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@dataclass
class Reference:
    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def dense(
    x: Tensor, y: Tensor, labels: Tensor, options: DistillLossConfig, z_loss: float = 0.0, common: int | None = None
) -> Reference:
    """From whole logits [..., V] and [..., V'] in fp64."""
    common = min(x.shape[-1], y.shape[-1], common or x.shape[-1])
    temperature = options.temperature
    p = torch.softmax(y[..., :common] / temperature, -1)
    q = torch.softmax(x[..., :common] / temperature, -1)
    partition = x.logsumexp(-1)
    cross_entropy = partition - x.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    value = temperature**2 * divergence(options, p, q)
    each = options.cross_entropy * cross_entropy + options.weight * value + z_loss * partition**2
    is_target = labels >= 0
    return Reference(each[is_target].sum(), cross_entropy.where(is_target, 0.0), value.where(is_target, 0.0))
