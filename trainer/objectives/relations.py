"""Relations between the tokens of a text, from queries, keys and values (MiniLMv2, https://arxiv.org/abs/2012.15828).

The vectors of a layer are cut into relation heads, any number that divides their width, so that student and teacher may
differ in width and in heads. A relation is softmax(A·Aᵀ/√d) of one kind of vector A with itself: query–query, key–key
and value–value. As in the paper every token is related to every other; in a causal model too, since each vector is
made without the tokens after it, and the relation of two tokens is one number whichever comes first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.knowledge import AttentionStates

MAX_ELEMENTS = 1 << 22
"""Relations in memory at once, of each model: 16 MiB of fp32."""

KINDS = ("query", "key", "value")


def relations_sum(
    student: AttentionStates,
    teacher: AttentionStates,
    heads: int,
    weights: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Σ over tokens of weight × KL(teacher ‖ student) of the token's relations: the mean over heads, summed over
    query–query, key–key and value–value (eq. 1 to 3).

    The gradient is computed with the value, a block of tokens at a time: relations of a whole text never exist.

    Args:
        student: each [B, T, width] of any floating type; computed in fp32 (fp64 where they are).
        teacher: the same B and T, without gradient.
        heads: of relations.
        weights: [B, T], of the tokens whose relations count, as from :func:`trainer.objectives.hidden.token_weights`;
            0 where there is padding.
        attention_mask: [B, T], 0 where there is padding, to which nothing is related. None: no padding.

    Returns:
        0-dim fp32 (fp64).

    Raises:
        ConfigError: a width does not divide by `heads`.
    """
    for who, states in (("student", student), ("teacher", teacher)):
        check_heads(heads, who, {kind: getattr(states, kind).shape[-1] for kind in KINDS})
    total = weights.new_zeros(())
    for kind in KINDS:
        ours, theirs = getattr(student, kind), getattr(teacher, kind).detach().to(weights.device)
        total = total + _Relations.apply(ours, theirs, heads, weights, attention_mask)  # type: ignore[no-untyped-call]
    return total


def check_heads(heads: int, who: str, widths: dict[str, int]) -> None:
    """Refuse relation heads that the widths do not divide into.

    Args:
        who: whose widths they are: student or teacher.
        widths: of its queries, keys and values, by kind.

    Raises:
        ConfigError: some do not; it names what would.
    """
    wrong = sorted({f"{width} ({kind})" for kind, width in widths.items() if width % heads})
    if wrong:
        common = math.gcd(*widths.values())
        fitting = [number for number in range(1, min(common, 128) + 1) if common % number == 0]
        raise ConfigError(
            [
                (
                    "distill.relations.heads",
                    f"{heads} heads do not divide the {who}'s width of {', '.join(wrong)}; "
                    f"its widths divide by {', '.join(map(str, fitting))}",
                )
            ]
        )


class _Relations(torch.autograd.Function):
    """With S = A·Aᵀ/√d, p the teacher's and q the student's relations: d KL_i/dS_ij = q_ij − p_ij, and
    dA = (G + Gᵀ)·A/√d of G = weight · (q − p). Rows of S are independent, so blocks of them are."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, heads: int, weights: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        if attention_mask is not None:  # padding may hold anything, and a product of 0 and NaN is NaN
            student, teacher = (
                states.masked_fill(attention_mask[..., None] == 0, 0.0) for states in (student, teacher)
            )
        ours, theirs = _by_head(student, heads, dtype), _by_head(teacher, heads, dtype)
        # [B · heads, 1, T] and [B · heads, T, 1]
        absent = None if attention_mask is None else (attention_mask == 0).repeat_interleave(heads, 0)[:, None, :]
        each = (weights.to(dtype) / heads).repeat_interleave(heads, 0)[:, :, None]
        gradient = torch.zeros_like(ours) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=dtype, device=student.device)
        groups, length = ours.shape[:2]
        at_once = max(1, MAX_ELEMENTS // length**2)
        rows = max(1, min(length, MAX_ELEMENTS // length))
        scale = 1.0 / math.sqrt(ours.shape[-1])
        for first in range(0, groups, at_once):
            group = slice(first, first + at_once)
            for row in range(0, length, rows):
                block = slice(row, row + rows)
                hidden = None if absent is None else absent[group]
                of_teacher = _log_relations(theirs[group], block, hidden)
                of_student = _log_relations(ours[group], block, hidden)
                weight = each[group, block]
                probability = of_teacher.exp()
                difference = of_teacher.sub_(of_student)
                if hidden is not None:  # −inf − −inf
                    difference.masked_fill_(hidden, 0.0)
                total += (probability * difference).sum(-1, keepdim=True).mul_(weight).sum()
                if gradient is not None:
                    slope = of_student.exp_().sub_(probability).mul_(weight)
                    gradient[group, block] += scale * (slope @ ours[group])
                    gradient[group] += scale * (slope.transpose(1, 2) @ ours[group, block])
        if gradient is not None:
            ctx.save_for_backward(
                gradient.view(-1, heads, *gradient.shape[1:]).transpose(1, 2).flatten(2).to(student.dtype)
            )
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None


def _by_head(states: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, heads · d] → [B · heads, T, d]."""
    batch, length, width = states.shape
    return states.detach().to(dtype).view(batch, length, heads, width // heads).transpose(1, 2).flatten(0, 1)


def _log_relations(states: Tensor, block: slice, absent: Tensor | None) -> Tensor:
    """log softmax(A·Aᵀ/√d) of the tokens in `block`, [groups, rows, T]; −inf towards absent tokens."""
    scores = (states[:, block] * (1.0 / math.sqrt(states.shape[-1]))) @ states.transpose(1, 2)
    if absent is not None:
        scores.masked_fill_(absent, -math.inf)
    return torch.log_softmax(scores, dim=-1)
