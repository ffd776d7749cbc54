"""Divergences of a teacher's distribution p and a student's q, with their gradients in closed form.

docs/distill-losses.md derives them. With f = ∂D/∂q, the gradient with respect to the student's logits is
q · (f − Σ q·f); the constant part of f falls out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.distill import DistillLossConfig

NEGLIGIBLE = -1e30
"""Stands for the logarithm of zero: 0 · NEGLIGIBLE is 0, where 0 · −inf would be NaN."""

NORMALISED = 1e-5
"""A row whose log Σ exp is nearer to 0 than this holds log-probabilities already: rounding leaves about 1e-6."""


def teacher_log_probabilities(logits: Tensor, top: Tensor, out: Tensor, *, may_be_normalised: bool) -> Tensor:
    """log softmax(logits), at temperature 1: what caches hold.

    Args:
        logits: [n, V].
        top: [n, 1] int64, place of the greatest of each row.
        out: [n, V] contiguous, of the type to compute in; overwritten and returned.
        may_be_normalised: rows that are log-probabilities already keep their bits, so that a cache of all tokens gives
            those of the teacher that wrote it.
    """
    torch.log_softmax(logits, -1, out=out)
    if may_be_normalised:
        shift = logits.gather(-1, top) - out.gather(-1, top)
        torch.where(shift.abs() <= NORMALISED, logits, out, out=out)
    return out.clamp_min_(NEGLIGIBLE)


def tempered(log_probabilities: Tensor, temperature: float, out: Tensor) -> Tensor:
    """The log-probabilities [n, V] at another temperature, in `out` [n, V]; the first are overwritten."""
    torch.log_softmax(log_probabilities.div_(temperature), -1, out=out)
    return out.clamp_min_(NEGLIGIBLE)


def row_dot(a: Tensor, b: Tensor, spare: Tensor) -> Tensor:
    """Σ over the last dimension of a · b, [n]; `spare` is overwritten."""
    return torch.mul(a, b, out=spare).sum(-1)


def diverge_(
    options: DistillLossConfig, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, spare: Tensor, *, gradient: bool
) -> Tensor:
    """D(p, q) of each row, and its gradient.

    Args:
        options: `kind`, `beta`, `alpha`; the temperature is already in the distributions.
        p, log_p: [n, V], of the teacher, normalised; `log_p` is overwritten.
        q, log_q: [n, V], of the student, normalised; `log_q` holds ∂D/∂(student's logits) afterwards when `gradient`,
            otherwise nothing of use.
        spare: [n, V], overwritten.

    Returns:
        [n] in nats (total variation: a number between 0 and 1).
    """
    match options.kind:
        case "forward_kl":
            value = row_dot(p, log_p.sub_(log_q), spare)
            if gradient:
                torch.sub(q, p, out=log_q)
        case "reverse_kl":
            value = row_dot(q, log_q.sub_(log_p), spare)
            if gradient:
                log_q.sub_(value[:, None]).mul_(q)
        case "js":
            return _js(options.beta, p, log_p, q, log_q, spare, gradient)
        case "skew_forward_kl":
            return _skew_forward(options.alpha, p, log_p, q, log_q, spare, gradient)
        case "skew_reverse_kl":
            return _skew_reverse(options.alpha, p, log_p, q, log_q, spare, gradient)
        case "total_variation":
            torch.sub(q, p, out=log_q)
            value = torch.abs(log_q, out=spare).sum(-1).mul_(0.5)
            if gradient:
                log_q.sign_()
                # the sign of NaN is 0: the value carries it on
                log_q.sub_(row_dot(q, log_q, spare).add_(value, alpha=0.0)[:, None]).mul_(q).mul_(0.5)
    return value


def _log_(mixture: Tensor) -> Tensor:
    return mixture.clamp_min_(torch.finfo(mixture.dtype).tiny).log_()


def _js(beta: float, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, spare: Tensor, gradient: bool) -> Tensor:
    negative_entropy = row_dot(p, log_p, spare)
    log_m = _log_(torch.lerp(q, p, beta, out=log_p))
    of_teacher = negative_entropy - row_dot(p, log_m, spare)
    of_student = row_dot(q, log_q.sub_(log_m), spare)
    if gradient:
        log_q.sub_(of_student[:, None]).mul_(q).mul_(1.0 - beta)
    return beta * of_teacher + (1.0 - beta) * of_student


def _skew_forward(
    alpha: float, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, spare: Tensor, gradient: bool
) -> Tensor:
    negative_entropy = row_dot(p, log_p, spare)
    mixture = torch.lerp(q, p, alpha, out=log_p).clamp_min_(torch.finfo(p.dtype).tiny)
    if gradient:
        ratio = torch.div(p, mixture, out=log_q)
        ratio.sub_(row_dot(q, ratio, spare)[:, None]).mul_(q).mul_(alpha - 1.0)
    return negative_entropy - row_dot(p, mixture.log_(), spare)


def _skew_reverse(
    alpha: float, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, spare: Tensor, gradient: bool
) -> Tensor:
    log_m = _log_(torch.lerp(p, q, alpha, out=log_p))
    value = row_dot(q, log_q.sub_(log_m), spare)
    if gradient:
        log_q.sub_(torch.exp(log_q, out=log_m), alpha=alpha)  # q/m is the exponential of what log_q holds now
        log_q.sub_(row_dot(q, log_q, spare)[:, None]).mul_(q)
    return value
