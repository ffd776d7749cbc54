"""Distillation where the student's logits exist whole: few classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.config.distill import DistillLossConfig
from trainer.knowledge import LogitTargets, Targets
from trainer.objectives.fused import (
    Distilled,
    Totals,
    Work,
    computing_type,
    distilled,
    limit_of,
    positions_of,
    refuse,
    targets_of,
)
from trainer.objectives.positions import Rows, See
from trainer.objectives.teaching import teaching_of, within


def logit_distillation(
    logits: Tensor,
    labels: Tensor,
    targets: Targets | None,
    options: DistillLossConfig,
    *,
    see: See | None = None,
) -> Distilled:
    """What `fused_distillation` computes, from logits that are there.

    Args:
        logits: [B, C] (any leading shape), of the student.
        labels: [B] int64, the classes; −100: none, and nothing is learned there.
        targets: [B, C] of the teacher; None: cross-entropy only.
        see: shown the logits of the samples that have a label.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {list(logits.shape)} do not fit labels {list(labels.shape)}")
    if isinstance(targets, LogitTargets) and targets.logits.shape != logits.shape:
        raise ValueError(
            f"the student's logits {list(logits.shape)} and the teacher's {list(targets.logits.shape)} differ in shape"
        )
    refuse(targets, options, uld=False)
    work = Work(labels.flatten(), None, targets, options, 0.0, None, uld=False, see=see)
    if torch.is_grad_enabled() and logits.requires_grad:
        results = _OfLogits.apply(logits, work)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            results = _run(logits, work, wanted=False).results()
    return distilled(results, labels.shape, taught=targets is not None, uld=False)


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: Work) -> tuple[Tensor, ...]:
        totals = _run(logits, work, wanted=True)
        ctx.save_for_backward(*totals.gradients)
        ctx.dtype = logits.dtype
        results = totals.results()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept.mul_(gradients[0]).to(ctx.dtype), None


def _run(logits: Tensor, work: Work, *, wanted: bool) -> Totals:
    places, count = targets_of(work.labels)
    dtype = computing_type(logits.dtype)
    rows = Rows.empty(count, logits, dtype)
    flat = logits.reshape(-1, logits.shape[-1])
    gradient = flat.new_zeros(flat.shape, dtype=dtype) if wanted else None
    chunk = max(1, min(work.options.chunk, count))
    limit = limit_of(work, flat.shape[1])
    with teaching_of(work.targets, work.labels.numel(), limit, chunk, dtype) as teaching:
        positions = positions_of(work, flat.shape[1], limit, teaching, rows, chunk, gradient=wanted)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            of_chunk = within(places, part)
            # `learn_` overwrites what it is given
            x = flat[of_chunk].to(dtype, copy=True).contiguous()
            teaching.begin(of_chunk, x.shape[0])
            positions.learn_(x, work.labels[of_chunk], None, teaching.tile(slice(0, x.shape[0])), part)
            if gradient is not None:
                gradient[of_chunk] = x
    return Totals(rows, places, work, () if gradient is None else (gradient.view(logits.shape),))
