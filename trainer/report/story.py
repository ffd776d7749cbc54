"""What the ledger tells of one incident. Pure but for reading the file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.records import IncidentEvent
from trainer.telemetry.ledger import Record, newest_first

_CONTEXT = 60
"""Steps before the incident that are told."""
_MEAN_OVER = 20
"""Steps of the loss before and after."""
_MAX_RECORDS = 50_000


@dataclass(slots=True)
class Story:
    """One incident as the ledger has it, everything in the order of the run."""

    incident: int
    events: list[Record]
    """Records of kind `incident`."""
    rewinds: list[Record] = field(default_factory=list)
    dropped: list[Record] = field(default_factory=list)
    """Its attempts that were not applied."""
    abandoned: list[Record] = field(default_factory=list)
    """Applied attempts that a rollback took back."""
    standing: list[Record] = field(default_factory=list)
    """Applied attempts that stand, from some steps before it on."""

    @property
    def opened(self) -> Record:
        return self.events[0]

    @property
    def outcome(self) -> str:
        """recovered · not verified · halted · open"""
        last = self.events[-1]
        if last["phase"] == "recovered":
            return "recovered" if last["numbers"].get("verified", 1.0) else "not verified"
        return "halted" if last["phase"] == "halted" else "open"

    @property
    def first_step(self) -> int:
        """The lowest step that it touched."""
        steps: list[int] = [self.opened["step"], *(rewind["to_step"] + 1 for rewind in self.rewinds)]
        return min(steps)

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """Ranges of batches, merged."""
        ranges: list[tuple[int, int]] = [tuple(rewind["quarantine"]) for rewind in self.rewinds if rewind["quarantine"]]
        ranges += [(record["batch"], record["batch"]) for record in self.dropped if record.get("quarantined")]
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(merged[-1][1], last)
            else:
                merged.append((first, last))
        return merged

    @property
    def loss_before(self) -> float:
        """Mean of the last steps before it; NaN: there were none."""
        return _mean([r["loss"] for r in self.standing if r["step"] < self.first_step][-_MEAN_OVER:])

    @property
    def loss_at(self) -> float:
        """Of the first attempt that was not applied, or as the first alarm said."""
        alarm = next(iter(self.dropped), None)
        return float(alarm["loss"] if alarm else self.opened["numbers"].get("loss", math.nan))

    @property
    def loss_after(self) -> float:
        """Mean of the steps by which recovery was judged, or of the newest steps."""
        told = self.events[-1]["numbers"].get("loss", math.nan) if self.events[-1]["phase"] == "recovered" else math.nan
        if math.isfinite(told):
            return float(told)
        return _mean([r["loss"] for r in self.standing if r["attempt"] > self.opened["attempt"]][-_MEAN_OVER:])

    @property
    def seconds_lost(self) -> float:
        """Of attempts that were not applied or were taken back, and of going back."""
        attempts = math.fsum(record["seconds"] for record in [*self.dropped, *self.abandoned])
        return attempts + math.fsum(rewind["seconds"] for rewind in self.rewinds)

    def usual_norms(self) -> list[float]:
        """Median gradient norm of each parameter in the steps before it; empty: not recorded."""
        before = [r for r in self.standing if r["step"] < self.first_step and "parameter_norms" in r][-_MEAN_OVER:]
        return [statistics.median(values) for values in zip(*(r["parameter_norms"] for r in before), strict=True)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def event_record(event: IncidentEvent) -> Record:
    """An event as the ledger has it, without the time."""
    return {
        "kind": "incident",
        "incident": event.incident,
        "phase": event.phase,
        "attempt": event.attempt,
        "step": event.step,
        "batch": event.batch_index,
        "text": event.text,
        "numbers": {name: float(value) for name, value in event.numbers.items()},
    }


def read_story(ledger: Path, incident: int, noted: Sequence[Record] = ()) -> Story | None:
    """The story of an incident from the newest part of a ledger; None: nothing is known of it.

    Args:
        noted: events that were heard of in this process, in the order of the run; the ledger may still lack them.
    """
    records = _newest_part(ledger, incident)
    events = [record for record in records if record["kind"] == "incident" and record["incident"] == incident]
    known = {_identity(record) for record in events}
    events += [record for record in noted if _identity(record) not in known]
    if not events:
        return None
    story = Story(incident, events)
    standing: dict[int, Record] = {}
    for record in records:
        if record["kind"] == "rewind":
            gone = [step for step in standing if step > record["to_step"]]
            if record["incident"] == incident:
                story.rewinds.append(record)
                story.abandoned += [standing[step] for step in sorted(gone)]
            for step in gone:
                del standing[step]
        elif record["kind"] == "attempt" and record["applied"]:
            standing[record["step"]] = record
        elif record["kind"] == "attempt" and record.get("incident") == incident:
            story.dropped.append(record)
    story.standing = [standing[step] for step in sorted(standing)]
    return story


def _identity(record: Record) -> tuple[Any, ...]:
    return record["phase"], record["attempt"], record["text"]


def _newest_part(ledger: Path, incident: int) -> list[Record]:
    """The records from some steps before the incident on, without those that a resume took back, oldest first."""
    found: list[Record] = []
    floor = math.inf
    opened = False
    for record in _in_history(ledger):
        found.append(record)
        if record.get("incident") == incident:
            opened = opened or (record["kind"] == "incident" and record["phase"] == "opened")
            floor = min(floor, record["to_step"] if record["kind"] == "rewind" else record["step"])
        enough = record["kind"] == "attempt" and record["applied"] and record["step"] <= floor - _CONTEXT
        if (opened and enough) or len(found) >= _MAX_RECORDS:
            break
    return found[::-1]


def _in_history(ledger: Path) -> Iterator[Record]:
    """The records from the newest on, without what a resume took back."""
    last_attempt = last_step = math.inf
    for record in newest_first(ledger):
        if record["kind"] == "start":
            last_attempt = min(last_attempt, record.get("resumed_attempt", math.inf))
            last_step = min(last_step, record["resumed_step"])
        elif record.get("attempt", 0) <= last_attempt and (
            record["kind"] not in ("weights", "evaluation") or record["step"] <= last_step
        ):
            yield record


def caught_up(ledger: Path, attempt: int) -> bool:
    """Whether the ledger has come to an attempt."""
    return any(record["attempt"] >= attempt for record in _first_attempt(ledger))


def _first_attempt(ledger: Path) -> Iterator[Record]:
    for record in newest_first(ledger):
        if record["kind"] == "attempt":
            yield record
            return
