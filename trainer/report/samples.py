"""The samples of an alarming batch: which they are, what they say, how badly they were predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trainer.records import Evidence

Describe = Callable[[int], Sequence[tuple[str, str, str]]]
"""Sample id → (source, document, text) of each document that the sample touches."""

MAX_DESCRIBED = 256
"""Samples of a batch whose text is read; of the others only id and loss are kept."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a batch."""

    batch: int
    id: int
    loss: float | None
    """In nats a target; None: not measured."""
    documents: tuple[tuple[str, str, str], ...]
    """(source, document, text)"""

    def to_json(self) -> dict[str, object]:
        documents = [
            {"source": source, "document": document, "text": text} for source, document, text in self.documents
        ]
        return {"batch": self.batch, "id": self.id, "loss": self.loss, "documents": documents}


def samples_of(evidence: Evidence, describe: Describe | None) -> list[Sample]:
    """The samples of a batch, the worst predicted first; what is not finite is the worst."""
    ids = [int(sample) for sample in evidence.sample_ids]
    losses: list[float | None] = [None] * len(ids)
    if evidence.sample_losses.size == len(ids):
        losses = [float(loss) for loss in evidence.sample_losses]
    order = sorted(range(len(ids)), key=lambda place: _badness(losses[place]), reverse=True)
    return [
        Sample(
            evidence.batch_index,
            ids[place],
            losses[place],
            _described(describe, ids[place]) if rank < MAX_DESCRIBED else (),
        )
        for rank, place in enumerate(order)
    ]


def offending(kept: Iterable[Evidence]) -> Evidence | None:
    """The evidence whose samples are told: the first for which their losses were measured, else the first."""
    kept = list(kept)
    return next((evidence for evidence in kept if evidence.sample_losses.size), kept[0] if kept else None)


def _badness(loss: float | None) -> float:
    if loss is None:
        return -math.inf
    return loss if math.isfinite(loss) else math.inf


def _described(describe: Describe | None, sample: int) -> tuple[tuple[str, str, str], ...]:
    if describe is None:
        return ()
    try:
        return tuple((source, document, text) for source, document, text in describe(sample))
    except Exception as error:  # noqa: BLE001 - what cannot be read must not cost the rest of the report
        return (("", "", f"(could not be read: {error!r})"),)
