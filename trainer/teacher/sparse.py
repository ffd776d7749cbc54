"""From a teacher's predictions to what is kept of them, a chunk of positions at a time: the logits of all positions
never exist together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.errors import DataError
from trainer.knowledge import DenseTargets, Head, LogitTargets, SparseTargets, Targets
from trainer.records import IntArray
from trainer.teacher.forms import Form, log_shares

_CDF_ELEMENTS = 1 << 24
"""Elements of the distribution functions that are in memory at once, in fp64."""


@dataclass(frozen=True, slots=True)
class Entries:
    """What is kept of positions, in their order, on the CPU."""

    ids: Tensor | None
    """[N, width] int64; −1: no token, and none after it. None: all tokens in the order of their ids."""
    values: Tensor
    """[N, width] fp32, log-probabilities or logits (:class:`Form`); of drawn tokens int64, how often each came."""
    entropy: Tensor
    """[N] fp64, of the teacher, in nats; NaN: not known."""
    mass: Tensor
    """[N] fp64: probability of the entries."""


def vocabulary_of(targets: Targets) -> int | None:
    """Tokens, or classes, that the teacher has; None where it does not show. A collective where it is sharded."""
    if isinstance(targets, SparseTargets):
        return None
    if isinstance(targets, LogitTargets):
        return targets.logits.shape[-1]
    with targets.whole():
        return targets.head.weight.shape[0]


def entries_of(targets: Targets, form: Form, samples: IntArray, seed: int, chunk: int) -> Entries:
    """What `form` keeps of the predictions of samples, whose ids are `samples` [B].

    Logits are computed in the type of the teacher's head, everything from them on in fp32; `sampled` in fp64. The
    result for a sample depends on its logits alone, and for `sampled` on (`seed`, id of the sample).

    Args:
        chunk: positions whose logits are in memory at once.

    Raises:
        DataError: predictions that are not finite.
    """
    if isinstance(targets, SparseTargets):
        return _from_sparse(targets, form)
    parts = []
    for first, logits in _logits(targets, form.vocabulary, chunk):
        positions = np.arange(first, first + len(logits))
        where = samples[positions // form.positions], positions % form.positions
        parts.append(_entries(logits, form, where, seed))
    ids = [part.ids for part in parts if part.ids is not None]
    return Entries(
        torch.cat(ids) if ids else None,
        torch.cat([part.values for part in parts]),
        torch.cat([part.entropy for part in parts]),
        torch.cat([part.mass for part in parts]),
    )


def sparse_targets(targets: Targets, form: Form, samples: IntArray, seed: int, chunk: int) -> SparseTargets:
    """The same as a record for the losses: what a cache in fp32 gives back, to the bit. For `top` and `sampled`."""
    assert form.kind in ("top", "sampled")
    entries = entries_of(targets, form, samples, seed, chunk)
    assert entries.ids is not None
    values = entries.values
    if form.kind == "sampled":
        values = torch.from_numpy(log_shares(form.width))[values]
    shape = (len(samples), form.positions, form.width)
    return SparseTargets(entries.ids.view(shape), values.view(shape), form.kind)


def _logits(targets: DenseTargets | LogitTargets, vocabulary: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(first position, logits [n, vocabulary] fp32) of all positions."""
    if isinstance(targets, LogitTargets):
        rows = targets.logits.detach().flatten(0, -2)
        for first in range(0, len(rows), chunk):
            yield first, rows[first : first + chunk, :vocabulary].float()
        return
    rows = targets.hidden.detach().flatten(0, -2)
    with targets.whole(), torch.no_grad():
        for first in range(0, len(rows), chunk):
            yield first, _through(targets.head, rows[first : first + chunk], vocabulary)


def _through(head: Head, hidden: Tensor, vocabulary: int) -> Tensor:
    logits = hidden.to(head.weight.dtype) @ head.weight[:vocabulary].T
    if head.bias is not None:
        logits = logits + head.bias[:vocabulary]
    logits = logits.float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def _entries(logits: Tensor, form: Form, where: tuple[IntArray, IntArray], seed: int) -> Entries:
    """Of the logits [n, V] fp32 of positions, `where` they are: sample and place in it, each [n]."""
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(dim=-1, dtype=torch.float64)
    if not bool(torch.isfinite(entropy).all()):
        row = int(torch.isfinite(entropy).logical_not().nonzero()[0])
        raise DataError(
            f"the teacher's predictions of sample {where[0][row]} are not finite: its weights are damaged, or its "
            "precision is too low for it (distill.teacher.precision)"
        )
    if form.kind in ("complete", "logits"):
        values = log_p if form.kind == "complete" else logits
        return Entries(None, values.cpu(), entropy.cpu(), torch.ones_like(entropy).cpu())
    if form.kind == "top":
        ids, counts = _top(logits, form.width), None
    else:
        ids, counts = _drawn(logits, form.width, where, seed)
    known = log_p.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    mass = known.double().exp().sum(dim=-1)
    ids = ids.masked_fill(known.isneginf(), -1)
    return Entries(ids.cpu(), (known if counts is None else counts).cpu(), entropy.cpu(), mass.cpu())


def _top(logits: Tensor, width: int) -> Tensor:
    """Ids of the largest logits, [n, width]: in falling order, and where they are equal in the order of the ids.

    Which of several equal ones `topk` takes is not defined, and low precision makes many equal.
    """
    values, ids = logits.topk(width, dim=-1)
    least = values[:, -1:]
    torn = (logits >= least).sum(dim=-1) > width
    if bool(torn.any()):
        rows, least = logits[torn], least[torn]
        above, equal = rows > least, rows == least
        room = width - above.sum(dim=-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
        ids[torn] = chosen.nonzero()[:, 1].view(-1, width)
    ids = ids.sort(dim=-1).values
    return ids.gather(1, logits.gather(1, ids).argsort(dim=-1, descending=True, stable=True))


def _drawn(logits: Tensor, draws: int, where: tuple[IntArray, IntArray], seed: int) -> tuple[Tensor, Tensor]:
    """Ids and numbers, [n, draws], of tokens drawn with replacement, in the order of the ids; −1 and 0 behind them."""
    uniform = torch.from_numpy(_uniform(draws, where, seed)).to(logits.device)
    step = max(1, _CDF_ELEMENTS // logits.shape[1])
    parts = []
    for first in range(0, len(logits), step):
        reached = torch.softmax(logits[first : first + step].double(), dim=-1).cumsum(dim=-1)
        # the sum of all is 1 but for rounding
        at = uniform[first : first + step] * reached[:, -1:]
        parts.append(torch.searchsorted(reached, at, right=True))
    drawn = torch.cat(parts).clamp(max=logits.shape[1] - 1).sort(dim=-1).values
    # number of the token among the different ones of its position
    number = torch.zeros_like(drawn)
    number[:, 1:] = (drawn[:, 1:] != drawn[:, :-1]).cumsum(dim=-1)
    ids = torch.full_like(drawn, -1).scatter_(1, number, drawn)
    counts = torch.zeros_like(drawn).scatter_add_(1, number, torch.ones_like(drawn))
    return ids, counts


def _uniform(
    draws: int, where: tuple[IntArray, IntArray], seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Numbers in [0, 1), [n, draws]: a function of (seed, sample, place) alone."""
    samples, places = where
    result = np.empty((len(samples), draws))
    for sample in np.unique(samples):
        rows = np.flatnonzero(samples == sample)
        generator = np.random.Generator(np.random.Philox(key=[seed, int(sample)]))
        result[rows] = generator.random((int(places[rows[-1]]) + 1, draws))[places[rows]]
    return result


def _from_sparse(targets: SparseTargets, form: Form) -> Entries:
    """Of a teacher that tells no more than this; its entropy is not known."""
    ids = targets.ids.detach().flatten(0, -2).cpu()
    values = targets.log_probabilities.detach().flatten(0, -2).float().cpu()
    ids, values = ids[:, : form.width], values[:, : form.width]
    missing = form.width - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    known = (ids >= 0) & (ids < form.vocabulary)
    ids = ids.masked_fill(~known, -1)
    values = values.masked_fill(~known, -torch.inf)
    # most probable first, then by id, and what is not known last
    order = ids.masked_fill(~known, form.vocabulary).argsort(dim=-1, stable=True)
    ids, values = ids.gather(1, order), values.gather(1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    mass = values.double().exp().sum(dim=-1)
    return Entries(ids, values, torch.full_like(mass, torch.nan), mass)
