"""Which divergences can be learned from a few tokens of a teacher's distribution."""

from __future__ import annotations

from typing import Literal

SparseForm = Literal["top", "sampled"]

_BUCKETED = frozenset({"forward_kl", "skew_forward_kl"})
"""Weighted by the teacher's probability, so what is said of its rarest tokens hardly counts."""

_WEIGHED_BY_STUDENT = (
    "is weighted by the student's probability, which may lie on tokens that were not kept; what the teacher thinks of "
    "those is unknown, and their penalty would be arbitrary"
)
_REASONS = {
    "reverse_kl": _WEIGHED_BY_STUDENT,
    "js": f"in its second half {_WEIGHED_BY_STUDENT}",
    "skew_reverse_kl": _WEIGHED_BY_STUDENT,
    "total_variation": "compares every token of the vocabulary, and most were not kept",
}


def sparse_problem(kind: str, form: SparseForm, temperature: float) -> str | None:
    """Why `kind` cannot be learned from targets that keep a few tokens; None: it can.

    Args:
        kind: of `distill.loss.kind`.
        form: `top`, the most probable tokens and the mass of the rest; `sampled`, tokens drawn from the teacher.
        temperature: of `distill.loss.temperature`.
    """
    kept = "the most probable tokens" if form == "top" else "sampled tokens"
    if kind not in _BUCKETED:
        return (
            f"{kind} cannot be learned from {kept}: it {_REASONS[kind]}. Use forward_kl, or a teacher that is present"
        )
    if form == "sampled" and kind != "forward_kl":
        return (
            f"{kind} cannot be learned from sampled tokens: it is not linear in the teacher's probabilities, so draws "
            "would bias it. Use forward_kl"
        )
    if form == "sampled" and temperature != 1.0:
        return (
            f"temperature {temperature:g} cannot be used with sampled tokens: they were drawn at temperature 1. "
            "Use temperature 1, or targets of the form top"
        )
    return None
