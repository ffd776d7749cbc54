"""Targets of a few tokens: each kept token is a bucket, and all others together are one more.

Both distributions are gathered into the K + 1 buckets at temperature 1 and then put at the temperature of the loss. So
the divergence is 0 exactly where the student gives each kept token and the rest what the teacher gave them, whatever
the temperature; nothing is assumed about how the teacher's rest is spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.distill import DistillLossConfig
from trainer.objectives.divergence import NEGLIGIBLE, diverge_, row_dot

ROUNDING = 1e-6
"""What Σ p of all tokens may lack to 1 by rounding: a smaller rest is none."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Of some positions."""

    ids: Tensor
    """[r, K], of tokens that both vocabularies have; 0 where none is kept."""
    kept: Tensor
    """[r, K] bool"""
    log_probabilities: Tensor
    """[r, K + 1] of the teacher at temperature 1, normalised; the rest comes last."""
    covered: Tensor
    """[r], teacher's mass on the kept tokens."""
    known: Tensor
    """[r, 1]: 1 where at least one token is kept; elsewhere there is nothing to learn."""

    def entropy(self) -> Tensor:
        """Of the buckets, [r]: never more than that of the teacher."""
        p = self.log_probabilities.exp()
        return -row_dot(p, self.log_probabilities, p)

    def student(self, x: Tensor, rest: Tensor) -> Tensor:
        """Logits of the buckets, [r, K + 1], from those of the tokens [r, V] and log Σ exp over the rest [r]."""
        kept = x.gather(-1, self.ids).masked_fill_(~self.kept, NEGLIGIBLE)
        return torch.cat([kept, rest[:, None]], -1)

    def diverge(self, options: DistillLossConfig, u: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """D of each row [r] from the student's logits of the buckets, and its gradient by them divided by T."""
        log_q = torch.log_softmax(u / options.temperature, -1)
        log_p = self.log_probabilities
        log_p = torch.log_softmax(log_p / options.temperature, -1) if options.temperature != 1.0 else log_p.clone()
        log_q.clamp_min_(NEGLIGIBLE)
        log_p.clamp_min_(NEGLIGIBLE)
        value = diverge_(options, log_p.exp(), log_p, log_q.exp(), log_q, torch.empty_like(log_q), gradient=gradient)
        return value * self.known.squeeze(-1), log_q.mul_(self.known)


def bucket_targets(ids: Tensor, log_probabilities: Tensor, common: int, *, sampled: bool) -> Buckets:
    """Gather targets into buckets. Tokens outside the common vocabulary are left out, and what is left is normalised.

    Args:
        ids: [r, K] int64; −1: no token.
        log_probabilities: [r, K]; of shares of the draws when `sampled`, which leave no rest.
        common: tokens that both vocabularies have.
    """
    given = ids >= 0
    kept = given & (ids < common)
    log_p = log_probabilities.masked_fill(~given, NEGLIGIBLE).clamp_min_(NEGLIGIBLE)
    p = log_p.exp()
    rest = torch.zeros_like(p[:, 0]) if sampled else 1.0 - p.sum(-1)
    rest = torch.where((rest > ROUNDING) & (kept.sum(-1) < common), rest, 0.0)
    log_p.masked_fill_(~kept, NEGLIGIBLE)
    covered = (p * kept).sum(-1)
    total = covered + rest
    log_p = torch.cat([log_p, rest.log()[:, None]], -1)
    log_p.sub_(total.clamp_min(torch.finfo(p.dtype).tiny).log()[:, None]).clamp_min_(NEGLIGIBLE)
    return Buckets(ids.where(kept, 0), kept, log_p, covered, (covered > 0)[:, None].to(p.dtype))
