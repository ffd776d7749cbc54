"""Distillation of a language model from its last hidden states: logits exist for a chunk of positions at a time only.

The gradient is computed in the forward pass, in closed form, and scaled in the backward pass (as Liger kernels do,
https://arxiv.org/abs/2410.10989). docs/distill-losses.md has the formulas and the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.config.distill import DistillLossConfig
from trainer.config.sparse import sparse_problem
from trainer.knowledge import Head, SparseTargets, Targets
from trainer.objectives.losses import IGNORED
from trainer.objectives.positions import Positions, Rows, Scratch, See
from trainer.objectives.teaching import Places, Teaching, cap_, into_logits, teaching_of, within

TILE_ELEMENTS = 1 << 19
"""Logits of one tile and thread of a CPU: a few buffers of them stay in its cache. Measured: 2¹⁷ … 2²⁰ do equally
well."""
TILE_ELEMENTS_OF_DEVICE = 1 << 23
"""Logits of one tile on any other device."""

HALF_SCALE = 1024.0
"""fp16 gradients of logits are this much greater while they exist: softmax of a large vocabulary underflows in fp16,
and the loss scale comes only with the backward pass. A power of two, so that it leaves no trace."""


@dataclass(frozen=True, slots=True)
class Distilled:
    """Of all positions together."""

    total: Tensor
    """0-dim, with gradient: Σ over targets of cross_entropy · CE + weight · T² · D + z_loss · log²Z."""
    cross_entropy: Tensor
    """Shape of the labels, without gradient, in nats; 0 where there is no target."""
    divergence: Tensor
    """T² · D, likewise."""
    z_loss: Tensor
    """0-dim: its weight times Σ log²Z, as it enters the total."""
    right: Tensor
    """0-dim: targets that are the student's most probable token."""
    measures: dict[str, Tensor]
    """Sums over the targets, 0-dim, by the names of :func:`measures_of`."""


def measures_of(*, taught: bool = True, uld: bool = False) -> tuple[str, ...]:
    """Names of `Distilled.measures`.

    `teacher_entropy` in nats at temperature 1 (of sparse targets: that of their buckets). `agreement`: 1 where the
    teacher's most probable token is the student's. `covered`: teacher's mass that the targets tell of; 1 for whole
    predictions and for samples. `student_mass`: probability that the student gives to the teacher's most probable
    token, or to all tokens of sparse targets. Between different tokenizers (`uld`) the last three mean nothing and are
    left out; without a teacher (`taught` off) there are none.
    """
    if not taught:
        return ()
    return ("teacher_entropy",) if uld else ("teacher_entropy", "agreement", "covered", "student_mass")


@dataclass(frozen=True, slots=True)
class Work:
    """What a distillation is made of besides the tensors with a gradient."""

    labels: Tensor
    """[N]"""
    written: Tensor | None
    """[N] bool"""
    targets: Targets | None
    options: DistillLossConfig
    z_loss: float
    vocabulary: int | None
    uld: bool
    see: See | None


def fused_distillation(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    targets: Targets | None,
    options: DistillLossConfig,
    *,
    z_loss: float = 0.0,
    vocabulary: int | None = None,
    uld: bool = False,
    written: Tensor | None = None,
    see: See | None = None,
) -> Distilled:
    """Cross-entropy with the labels and divergence from the teacher, with the gradient of hidden states and head.

    Nothing is computed at positions without a target. Without gradient mode, and where nothing requires a gradient,
    none is computed. Entering `targets.whole` is a collective and happens on every call.

    Args:
        hidden: [..., H], of the student.
        head: the student's. Its weight [V, H] must hold its values now; it is not looked at again afterwards, so it may
            be partitioned between forward and backward pass.
        labels: [...] int64: the token that the logits at the same place predict (the shift is done); −100: none.
        targets: of the teacher, at the same places; None: cross-entropy only.
        z_loss: weight of log²Z, of the student at temperature 1.
        vocabulary: tokens that count in the divergence; both distributions are normalised over them. Never more than
            either model has. None: what both have. The cross-entropy uses the student's whole vocabulary.
        uld: compare probabilities by rank in place of `options.kind`: for different tokenizers.
        written: [...] bool: labels that the student wrote itself. Their cross-entropy is measured, and left out of the
            total.
        see: shown the student's logits [n, V] of the positions with a target, in their order and a few at a time. They
            are overwritten afterwards.

    Raises:
        ValueError: shapes that do not fit each other, or a divergence that sparse targets cannot give.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden states {list(hidden.shape)} do not fit labels {list(labels.shape)}")
    refuse(targets, options, uld=uld)
    if written is not None and written.shape != labels.shape:
        raise ValueError(f"written {list(written.shape)} does not fit labels {list(labels.shape)}")
    flat_written = None if written is None else written.flatten()
    work = Work(labels.flatten(), flat_written, targets, options, z_loss, vocabulary, uld, see)
    weight, bias = head.weight, head.bias
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if wanted:
        results = _Fused.apply(hidden, weight, bias, head, work)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            results = _run(hidden, weight, bias, head, work, (False, False, False)).results()
    return distilled(results, labels.shape, taught=targets is not None, uld=uld)


def refuse(targets: Targets | None, options: DistillLossConfig, *, uld: bool) -> None:
    """Raises ValueError where `targets` cannot give what is asked."""
    if not isinstance(targets, SparseTargets):
        return
    if uld:
        raise ValueError("the universal logit distance compares all probabilities of the teacher, and these are a few")
    if problem := sparse_problem(options.kind, targets.kind, options.temperature):
        raise ValueError(problem)


def distilled(results: tuple[Tensor, ...], shape: torch.Size, *, taught: bool, uld: bool) -> Distilled:
    """The record of :meth:`Totals.results`."""
    total, cross_entropy, divergence, z_loss, right, *sums = results
    measures = dict(zip(measures_of(), sums, strict=True))
    return Distilled(
        total,
        cross_entropy.view(shape),
        divergence.view(shape),
        z_loss,
        right,
        {name: measures[name] for name in measures_of(taught=taught, uld=uld)},
    )


@dataclass(frozen=True, slots=True)
class Totals:
    """Results by position and the gradients of the total."""

    rows: Rows
    places: Places
    work: Work
    gradients: tuple[Tensor | None, ...] = ()

    def results(self) -> tuple[Tensor, ...]:
        """total, cross-entropy [N], divergence [N], z-loss, right, and the measures."""
        rows, options = self.rows, self.work.options
        z_loss = self.work.z_loss * rows.log_partition.square().sum()
        counted = rows.cross_entropy
        if self.work.written is not None:
            counted = counted.masked_fill(self.work.written[self.places], 0.0)
        total = options.cross_entropy * counted.sum() + options.weight * rows.divergence.sum() + z_loss
        sums = (rows.right, rows.teacher_entropy, rows.agreement, rows.covered, rows.student_mass)
        return (
            total,
            self._spread(rows.cross_entropy),
            self._spread(rows.divergence),
            z_loss,
            *(values.sum() for values in sums),
        )

    def _spread(self, values: Tensor) -> Tensor:
        if isinstance(self.places, slice):
            return values
        return values.new_zeros(self.work.labels.numel()).index_copy_(0, self.places, values)


def computing_type(dtype: torch.dtype) -> torch.dtype:
    """fp32; fp64 for models that are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def targets_of(labels: Tensor) -> tuple[Places, int]:
    """Positions with a target, and how many."""
    is_target = labels != IGNORED
    places = is_target.nonzero().squeeze(-1)
    if places.numel() == labels.numel():
        return slice(0, labels.numel()), labels.numel()
    return places, places.numel()


def tile_rows(width: int, device: torch.device) -> int:
    """Positions that are looked at together: at least one for each thread."""
    if device.type != "cpu":
        return max(1, TILE_ELEMENTS_OF_DEVICE // width)
    threads = torch.get_num_threads()
    return max(threads, TILE_ELEMENTS * threads // width)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, work: Work
    ) -> tuple[Tensor, ...]:
        wanted = tuple(ctx.needs_input_grad[:3])
        totals = _run(hidden, weight, bias, head, work, wanted)
        # the weight itself is not kept: under ZeRO-3 it is partitioned again as soon as the head's forward returns
        ctx.save_for_backward(*totals.gradients)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        results = totals.results()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_total = gradients[0]
        scaled = (
            # in place, so that the weight's gradient exists once; a second backward pass is refused by autograd
            None if kept is None else kept.mul_(of_total).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return (*scaled, None, None)


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, work: Work, wanted: tuple[bool, ...]
) -> Totals:
    places, count = targets_of(work.labels)
    dtype = computing_type(weight.dtype)
    chunk = max(1, min(work.options.chunk, count))
    rows = Rows.empty(count, hidden, dtype)
    states = hidden.reshape(-1, hidden.shape[-1])
    student = _Student(states, weight, bias, head, chunk, wanted)
    limit = limit_of(work, weight.shape[0])
    step = min(chunk, tile_rows(weight.shape[0], hidden.device))
    with teaching_of(work.targets, work.labels.numel(), limit, chunk, dtype) as teaching:
        positions = positions_of(work, weight.shape[0], limit, teaching, rows, step, gradient=any(wanted))
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            of_chunk = within(places, part)
            student.begin(of_chunk, part.stop - start)
            teaching.begin(of_chunk, part.stop - start)
            labels = work.labels[of_chunk]
            written = None if work.written is None else work.written[of_chunk]
            for first in range(0, part.stop - start, step):
                tile = slice(first, min(first + step, part.stop - start))
                x = student.logits(tile)
                place = slice(start + tile.start, start + tile.stop)
                of_tile = None if written is None else written[tile]
                positions.learn_(x, labels[tile], of_tile, teaching.tile(tile), place)
                if any(wanted):
                    student.learned(x, tile)
            if any(wanted):
                student.end()
    return Totals(rows, places, work, student.gradients(hidden.shape))


def limit_of(work: Work, vocabulary: int) -> int | None:
    """Tokens that the divergence is about at most, before the teacher is asked how many it has; None: all of its."""
    if work.uld:
        return None
    return vocabulary if work.vocabulary is None else min(vocabulary, work.vocabulary)


def positions_of(
    work: Work, width: int, limit: int | None, teaching: Teaching, rows: Rows, most: int, *, gradient: bool
) -> Positions:
    """What is computed at each position.

    Args:
        most: positions given to it at once, at most.
        width: tokens of the student's vocabulary.
        limit: :func:`limit_of`.
    """
    common = min(width if limit is None else limit, width if teaching.vocabulary is None else teaching.vocabulary)
    like = rows.divergence
    scratch = Scratch(most * width, like, like.dtype)
    return Positions(work.options, work.z_loss, common, gradient, work.uld, work.see, rows, scratch)


class _Student:
    """Logits of the student by chunk, and what their gradient gives."""

    def __init__(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, head: Head, chunk: int, wanted: tuple[bool, ...]
    ) -> None:
        self._states = states
        self._weight = weight
        self._bias = bias
        self._head = head
        self._dtype = computing_type(weight.dtype)
        self._scale = HALF_SCALE if weight.dtype == torch.float16 else 1.0
        self._buffer = states.new_empty(chunk, weight.shape[0], dtype=weight.dtype)
        self._scratch = Scratch(0, states, self._dtype)
        self._slope: Tensor | None = None
        self._places: Places = slice(0)
        self._hidden = states.new_empty(0)
        self._logits = self._buffer
        of_hidden, of_weight, of_bias = wanted
        # positions without a target have none; fp16 waits for the loss scale in fp32
        kept = self._dtype if weight.dtype == torch.float16 else states.dtype
        self._of_hidden = torch.zeros_like(states, dtype=kept) if of_hidden else None
        self._of_weight = torch.zeros_like(weight, dtype=self._dtype) if of_weight else None
        self._of_bias = torch.zeros_like(bias, dtype=self._dtype) if of_bias and bias is not None else None
        self._product: Tensor | None = None

    def begin(self, places: Places, count: int) -> None:
        self._places = places
        self._hidden = self._states[places]
        self._logits = self._buffer[:count]
        into_logits(self._logits, self._hidden, self._weight, self._bias)

    def logits(self, tile: slice) -> Tensor:
        """[r, V] of the type to compute in, of the present chunk."""
        x = self._logits[tile]
        if x.dtype != self._dtype:
            x = self._scratch.take(0, *x.shape).copy_(x)
        if self._head.softcap is not None:
            self._slope = self._scratch.take(1, *x.shape)
        cap_(x, self._head, self._slope)
        return x

    def learned(self, gradient: Tensor, tile: slice) -> None:
        """Take the gradient of the logits of the tile."""
        if self._slope is not None:
            gradient.mul_(self._slope)
        if self._head.scale != 1.0:
            gradient.mul_(self._head.scale)
        if self._of_bias is not None:
            self._of_bias.add_(gradient.sum(0))
        if self._scale != 1.0:
            gradient.mul_(self._scale)
        if gradient.dtype != self._logits.dtype:
            self._logits[tile].copy_(gradient)

    def end(self) -> None:
        """The products of a chunk."""
        gradient = self._logits
        if self._of_hidden is not None:
            of_hidden = torch.mm(gradient, self._weight)
            if self._scale != 1.0:
                of_hidden = of_hidden.to(self._dtype).div_(self._scale)
            self._of_hidden[self._places] = of_hidden
        if self._of_weight is None:
            return
        if gradient.dtype == self._dtype:
            self._of_weight.addmm_(gradient.t(), self._hidden)
            return
        if self._product is None:
            self._product = torch.empty_like(self._weight)
        # of one chunk in half precision (summed in fp32 within the product), of all chunks in fp32
        torch.addmm(self._product, gradient.t(), self._hidden, beta=0.0, alpha=1.0 / self._scale, out=self._product)
        self._of_weight.add_(self._product)

    def gradients(self, shape: torch.Size) -> tuple[Tensor | None, ...]:
        """Of the hidden states [shape], the weight and the bias."""
        of_hidden = None if self._of_hidden is None else self._of_hidden.view(shape)
        return of_hidden, self._of_weight, self._of_bias
