"""Hidden states of a student drawn to those of its teacher. Pure; sums, so that the caller divides once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Project = Callable[[int, Tensor], Tensor]
"""(place of the pair, student's state [B, T, H]) → [B, T, H of the teacher]."""


def token_weights(labels: Tensor, attention_mask: Tensor | None = None, *, length: int | None = None) -> Tensor:
    """How much each token counts in a mean over the batch, [B, T] fp32: a sample's targets, spread over its tokens.

    A sample weighs as many as it has targets, and all its tokens the same; so Σ weight · value / (number of targets) is
    a mean over tokens, and exact however a batch is cut into micro-batches and ranks, since no weight knows of another
    sample. Where every token is a target (packed text, causal), each counts 1. Where few are (masked tokens), the
    others count too, as in DistilBERT and TinyBERT. Of a classifier a sample counts 1 in all.

    Args:
        labels: [B, T], or [B] of a classifier; negative: no target.
        attention_mask: [B, T], 0 where there is padding, which never counts. None: no padding.
        length: T, where neither of the two says it.
    """
    targets = (labels >= 0).float().flatten(1).sum(1) if labels.dim() > 1 else (labels >= 0).float()
    if attention_mask is None:
        tokens = length if length is not None else labels.shape[1]
        return (targets / tokens)[:, None].expand(-1, tokens)
    is_token = (attention_mask != 0).float()
    return is_token * (targets / is_token.sum(1).clamp(min=1))[:, None]


def hidden_sum(
    student_states: Mapping[int, Tensor],
    teacher_states: Mapping[int, Tensor],
    pairs: Sequence[tuple[int, int]],
    kind: Literal["cosine", "mse"],
    weights: Tensor,
    project: Project | None = None,
) -> Tensor:
    """Σ over tokens of weight × distance of the states, averaged over the pairs.

    `cosine`: 1 − cos (DistilBERT, §3, https://arxiv.org/abs/1910.01108); a state of zeros has cos 0. `mse`: mean over
    the features of the squared difference (TinyBERT, eq. 8 and 9, https://arxiv.org/abs/1909.10351).

    Args:
        student_states: by layer, [B, T, H] of any floating type; computed in fp32.
        teacher_states: by layer, [B, T, H of the teacher], without gradient.
        pairs: (layer of the student, layer of the teacher).
        weights: [B, T] of the tokens, as from :func:`token_weights`. Where it is 0, states may be anything.
        project: makes the widths equal; None: they are.

    Returns:
        0-dim fp32.
    """
    counts = weights != 0
    total = weights.new_zeros(())
    for place, (student_layer, teacher_layer) in enumerate(pairs):
        student, teacher = student_states[student_layer], teacher_states[teacher_layer].detach()
        if project is not None:
            student = project(place, student)
        # where() before the distance: the gradient of what padding may hold is not a number times 0
        student = student.float().where(counts[..., None], 1.0)
        teacher = teacher.to(student.device).float().where(counts[..., None], 1.0)
        if kind == "cosine":
            distance = 1.0 - F.cosine_similarity(student, teacher, dim=-1)
        else:
            distance = (student - teacher).square().mean(-1)
        total = total + (weights * distance).sum()
    return total / len(pairs)


def spread_pairs(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """Each layer of the student with the one as deep in the teacher, the last with the last; embeddings aside.

    Args:
        student_layers: at least 1.
        teacher_layers: at least as many.
    """
    return tuple(
        (layer, (2 * layer * teacher_layers + student_layers) // (2 * student_layers))
        for layer in range(1, student_layers + 1)
    )
