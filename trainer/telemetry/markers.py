"""Incidents in TensorBoard: cards and pictures in a run of their own, that no rollback takes back."""

from __future__ import annotations

from pathlib import Path

from trainer.telemetry.events import EventFile
from trainer.telemetry.heatmap import Picture
from trainer.telemetry.ledger import Record, batches


class Markers:
    """Writes `folder`: a card for each event of an incident, and for each rollback.

    Every card has a tag of its own, numbered within the incident: TensorBoard drops the later steps of a tag when a
    point of an earlier step arrives, and an incident goes back in steps.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: EventFile | None = None
        self._num_cards: dict[int, int] = {}

    def event(self, record: Record) -> None:
        """A line of an incident's timeline."""
        numbers = "".join(f"| {name.replace('|', '/')} | {value:.6g} |\n" for name, value in record["numbers"].items())
        table = f"\n\n| | |\n| --- | --- |\n{numbers}" if numbers else ""
        place = f"attempt {record['attempt']}, step {record['step']}, batch {record['batch']}"
        self._card(record, record["phase"], f"{record['text']}\n\n{place}{table}")

    def rewind(self, record: Record) -> None:
        """A rollback that was carried out."""
        ends = record["quarantine"]
        left_out = "the same data again" if ends is None else f"{batches(*ends)} left out from now on"
        text = (
            f"from step {record['from_step']} back to step **{record['to_step']}** ({record['source']}, "
            f"{record['seconds']:.3g} s); {left_out}\n\n{record['reason']}"
        )
        self._card(record, "rolled back", text)

    def picture(self, incident: int, picture: Picture, step: int, time: float) -> None:
        """What the gradients looked like."""
        self._opened().image(f"{_name(incident)}/{self._next(incident):02} gradient norms", picture, step, time)

    def flush(self) -> None:
        if self._file:
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _card(self, record: Record, title: str, markdown: str) -> None:
        step = record["step"] if record["kind"] == "incident" else record["from_step"]
        tag = f"{_name(record['incident'])}/{self._next(record['incident']):02} {title}"
        self._opened().text(tag, markdown, step, record["time"])

    def _next(self, incident: int) -> int:
        self._num_cards[incident] = self._num_cards.get(incident, 0) + 1
        return self._num_cards[incident]

    def _opened(self) -> EventFile:
        self._file = self._file or EventFile(self._folder)
        return self._file


def _name(incident: int) -> str:
    return f"incident {incident:04}" if incident else "guard"
