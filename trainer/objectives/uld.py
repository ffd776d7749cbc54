"""Universal logit distance: two distributions over different vocabularies, compared by rank."""

from __future__ import annotations

from torch import Tensor


def uld_(p: Tensor, q: Tensor, out: Tensor, *, gradient: bool) -> Tensor:
    """Σ |q₍ᵢ₎ − p₍ᵢ₎| of the probabilities in falling order, the shorter filled up with zeros (Boizard et al., 2024,
    https://arxiv.org/abs/2402.12030).

    Args:
        p: [n, V'], of the teacher.
        q: [n, V], of the student.
        out: [n, V]; holds the gradient with respect to the student's logits afterwards when `gradient`.

    Returns:
        [n]
    """
    ranked_p = p.sort(-1, descending=True).values
    ranked_q, order = q.sort(-1, descending=True)
    both = min(p.shape[1], q.shape[1])
    ranked_q[:, :both].sub_(ranked_p[:, :both])
    value = ranked_p[:, both:].sum(-1).add_(ranked_q.abs().sum(-1))
    if gradient:
        out.scatter_(-1, order, ranked_q.sign_())
        # the sign of NaN is 0: the value carries it on
        out.sub_((q * out).sum(-1).add_(value, alpha=0.0)[:, None]).mul_(q)
    return value
