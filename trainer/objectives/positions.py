"""What a few positions contribute: their losses, their measures, and the gradient of their logits, in closed form.

The rows that pass through here at once are few enough that the buffers of one pass are still in the processor's cache
at the next; only the products with the heads' weights see a whole chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.distill import DistillLossConfig
from trainer.objectives.buckets import Buckets, bucket_targets
from trainer.objectives.divergence import diverge_, row_dot, teacher_log_probabilities, tempered
from trainer.objectives.uld import uld_

See = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Whole:
    """A teacher's logits of some positions."""

    logits: Tensor
    """[r, V'] of the type to compute in."""
    may_be_normalised: bool
    known: Tensor | None = None
    """[r] bool: where it says something; None: everywhere."""


@dataclass(frozen=True, slots=True)
class Few:
    """A teacher's tokens of some positions; see `SparseTargets`."""

    ids: Tensor
    """[r, K] int64; −1: no token."""
    log_probabilities: Tensor
    """[r, K]"""
    sampled: bool


Tile = Whole | Few | None


class Scratch:
    """Buffers of [rows, width], used again for every tile."""

    def __init__(self, elements: int, like: Tensor, dtype: torch.dtype) -> None:
        self._elements = elements
        self._like = like
        self._dtype = dtype
        self._buffers: list[Tensor] = []

    def take(self, number: int, rows: int, width: int) -> Tensor:
        """Buffer `number`, contiguous [rows, width], with whatever stands in it."""
        while len(self._buffers) <= number:
            self._buffers.append(self._like.new_empty(0, dtype=self._dtype))
        if self._buffers[number].numel() < rows * width:
            self._buffers[number] = self._like.new_empty(max(self._elements, rows * width), dtype=self._dtype)
        return self._buffers[number][: rows * width].view(rows, width)


@dataclass(frozen=True, slots=True)
class Rows:
    """By position, [M] each, in the type that is computed in."""

    cross_entropy: Tensor
    log_partition: Tensor
    """log Z of the student at temperature 1."""
    divergence: Tensor
    """T² · D"""
    teacher_entropy: Tensor
    agreement: Tensor
    covered: Tensor
    student_mass: Tensor
    right: Tensor

    @staticmethod
    def empty(count: int, like: Tensor, dtype: torch.dtype) -> Rows:
        return Rows(*(like.new_zeros(count, dtype=dtype) for _ in range(8)))


@dataclass(frozen=True, slots=True)
class Positions:
    """What is computed of each position, and where the results go."""

    options: DistillLossConfig
    z_loss: float
    common: int
    """Tokens that both vocabularies have."""
    gradient: bool
    uld: bool
    see: See | None
    rows: Rows
    scratch: Scratch

    def learn_(self, x: Tensor, labels: Tensor, written: Tensor | None, tile: Tile, place: slice) -> None:
        """Fill in the results of some positions.

        Args:
            x: [r, V] contiguous, logits of the student; overwritten, with the gradient of the total when `gradient`.
            labels: [r] int64, all of them tokens.
            written: [r] bool, labels that the cross-entropy in the total leaves out.
            tile: of the teacher, at the same positions.
            place: theirs in `rows`.
        """
        if self.see is not None:
            self.see(x)
        at_label = x.gather(-1, labels[:, None]).squeeze(-1)
        top = x.amax(-1)
        q = torch.softmax(x, -1, out=self.scratch.take(0, *x.shape))
        log_z = top - q.amax(-1).log()
        self.rows.cross_entropy[place] = log_z - at_label
        self.rows.log_partition[place] = log_z
        self.rows.right[place] = (at_label >= top).to(x.dtype)
        # the cross-entropy's gradient is of_label · (q − onehot), that of the z-loss a multiple of q
        of_label = torch.full_like(log_z, self.options.cross_entropy)
        if written is not None:
            of_label.masked_fill_(written, 0.0)
        of_q = (of_label + 2.0 * self.z_loss * log_z)[:, None]
        match tile:
            case None:
                if self.gradient:
                    torch.mul(q, of_q, out=x)
            case Few():
                self._few(x, q, log_z, top, of_q, tile, place)
            case Whole():
                self._whole(x, q, log_z, top, of_q, tile, place)
        if self.gradient and self.options.cross_entropy:
            x.scatter_add_(-1, labels[:, None], of_label.neg_()[:, None])

    def _whole(self, x: Tensor, q: Tensor, log_z: Tensor, top: Tensor, of_q: Tensor, tile: Whole, place: slice) -> None:
        options, scratch = self.options, self.scratch
        y = tile.logits if self.uld else tile.logits[:, : self.common]
        shape = (x.shape[0], y.shape[1])
        best = y.max(-1, keepdim=True).indices
        log_p = teacher_log_probabilities(y, best, scratch.take(1, *shape), may_be_normalised=tile.may_be_normalised)
        p = torch.exp(log_p, out=scratch.take(2, *shape))
        spare = scratch.take(3, *shape)
        self.rows.teacher_entropy[place] = -row_dot(p, log_p, spare)
        self.rows.covered[place] = 1.0
        if not self.uld:
            self.rows.agreement[place] = (x.gather(-1, best).squeeze(-1) >= top).to(x.dtype)
            self.rows.student_mass[place] = q.gather(-1, best).squeeze(-1)
        if options.temperature != 1.0:
            log_p, spare = tempered(log_p, options.temperature, spare), log_p
            torch.exp(log_p, out=p)

        # with equal vocabularies at temperature 1 the divergence and the cross-entropy share q, and x becomes log q
        width = x.shape[1] if self.uld else self.common
        shared = options.temperature == 1.0 and width == x.shape[1]
        u = x if shared else torch.div(x[:, :width], options.temperature, out=scratch.take(4, x.shape[0], width))
        q_u, log_z_u = q, log_z
        if not shared:
            q_u = torch.softmax(u, -1, out=scratch.take(5, *u.shape))
            log_z_u = u.amax(-1) - q_u.amax(-1).log()
        learned = self.gradient and options.weight > 0.0
        if self.uld:
            value = uld_(p, q_u, u, gradient=learned)
        else:
            u.sub_(log_z_u[:, None])
            value = diverge_(options, p, log_p, q_u, u, spare, gradient=learned)
        if tile.known is not None:
            value = value.where(tile.known, 0.0)
            self.rows.teacher_entropy[place].mul_(tile.known)
            if learned:
                u.masked_fill_(~tile.known[:, None], 0.0)
        self.rows.divergence[place] = value * options.temperature**2
        if not self.gradient:
            return
        if not learned:
            torch.mul(q, of_q, out=x)
        elif shared:
            if options.weight != 1.0:
                x.mul_(options.weight)
            if options.cross_entropy or self.z_loss:
                x.addcmul_(q, of_q)
        else:
            torch.mul(q, of_q, out=x)
            x[:, :width].add_(u, alpha=options.weight * options.temperature)

    def _few(self, x: Tensor, q: Tensor, log_z: Tensor, top: Tensor, of_q: Tensor, tile: Few, place: slice) -> None:
        options = self.options
        targets: Buckets = bucket_targets(tile.ids, tile.log_probabilities, self.common, sampled=tile.sampled)
        self.rows.teacher_entropy[place] = targets.entropy()
        self.rows.covered[place] = targets.covered
        best = targets.ids.gather(-1, targets.log_probabilities[:, :-1].argmax(-1, keepdim=True))
        known = targets.kept.any(-1)
        self.rows.agreement[place] = ((x.gather(-1, best).squeeze(-1) >= top) & known).to(x.dtype)

        at_kept = q.gather(-1, targets.ids).mul_(targets.kept)
        self.rows.student_mass[place] = at_kept.sum(-1)
        # exact: each kept token stands once, and what is no token takes nothing away
        q.scatter_add_(-1, targets.ids, -at_kept)
        of_rest = q[:, : self.common].sum(-1).clamp_min_(torch.finfo(x.dtype).tiny)
        u = targets.student(x, log_z + of_rest.log())
        learned = self.gradient and options.weight > 0.0
        value, of_buckets = targets.diverge(options, u, gradient=learned)
        self.rows.divergence[place] = value * options.temperature**2
        if not self.gradient:
            return
        at_tokens = at_kept * of_q
        factor = of_q.expand(-1, 1)
        if learned:
            of_buckets.mul_(options.weight * options.temperature)
            at_tokens.add_(of_buckets[:, :-1])
            factor = of_q + of_buckets[:, -1:] / of_rest[:, None]
        torch.mul(q[:, : self.common], factor, out=x[:, : self.common])
        if self.common < x.shape[1]:
            torch.mul(q[:, self.common :], of_q, out=x[:, self.common :])
        x.scatter_add_(-1, targets.ids, at_tokens.mul_(targets.kept))
