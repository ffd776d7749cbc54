"""What a run leaves out of its data, and why: from its ledger, its config and the folders of its incidents."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.errors import RunDirectoryError
from trainer.report.incident import SAMPLES, read_samples
from trainer.telemetry.ledger import Record, batches, lived

_NUM_TEXTS = 3
_NUM_CHARACTERS = 240


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A range of batches that the run does not train on."""

    first: int
    last: int
    incident: int | None
    """None: the config excludes it."""
    reason: str
    time: float | None
    """Unix seconds; None: from the start."""
    step: int | None
    """At which it was put there."""
    rolled_back: bool
    """By a rollback, not by leaving out a single batch."""
    sources: tuple[str, ...] = ()
    """Of its samples, as far as they were kept."""
    texts: tuple[tuple[str, str, str], ...] = ()
    """(loss, document, beginning of the text) of its worst samples."""


def quarantined(root: Path) -> list[LeftOut]:
    """The ranges in the order in which they were left out, those of the config first.

    Raises:
        RunDirectoryError: `root` is no run.
    """
    files = RunFiles(root)
    if not files.config.is_file():
        raise RunDirectoryError(f"{root} is not a run directory: it holds no config.yaml")
    excluded = [
        LeftOut(first, last, None, "data.exclude_batches of the config", None, None, rolled_back=False)
        for first, last in read_run_config(root).data.exclude_batches
    ]
    entries = _entries(lived(files.ledger)) if files.ledger.exists() else []
    return excluded + [_with_samples(entry, files) for entry in _joined(entries)]


def _entries(records: Iterable[Record]) -> list[LeftOut]:
    entries = []
    for record in records:
        if record["kind"] == "attempt" and record.get("quarantined"):
            first = last = record["batch"]
            step, rolled_back = record["step"], False
        elif record["kind"] == "rewind" and record["quarantine"]:
            first, last = record["quarantine"]
            step, rolled_back = record["from_step"] + 1, True
        else:
            continue
        entries.append(
            LeftOut(first, last, record["incident"], record["reason"] or "", record["time"], step, rolled_back)
        )
    return entries


def _joined(entries: Sequence[LeftOut]) -> list[LeftOut]:
    """Batches that were left out one after the other in one incident are one range."""
    joined: list[LeftOut] = []
    for entry in entries:
        before = joined[-1] if joined else None
        if (
            before
            and not (before.rolled_back or entry.rolled_back)
            and (before.incident, before.last + 1) == (entry.incident, entry.first)
        ):
            joined[-1] = replace(before, last=entry.last)
        else:
            joined.append(entry)
    return joined


def _with_samples(entry: LeftOut, files: RunFiles) -> LeftOut:
    samples = [
        sample
        for sample in read_samples(files.incidents / f"{entry.incident:04}" / SAMPLES)
        if entry.first <= sample["batch"] <= entry.last
    ]
    documents = [document for sample in samples for document in sample["documents"]]
    texts = [
        (
            "" if sample["loss"] is None else f"loss {sample['loss']:.4g}",
            document["document"],
            " ".join(document["text"].split())[:_NUM_CHARACTERS],
        )
        for sample in samples
        for document in sample["documents"][:1]
    ]
    sources = tuple(dict.fromkeys(document["source"] for document in documents if document["source"]))
    return replace(entry, sources=sources, texts=tuple(texts[:_NUM_TEXTS]))


def shown(entries: Sequence[LeftOut], text: bool) -> RenderableType:
    """The ranges as a table; with `text` the beginning of their worst samples below it."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("batches", "incident", "at step", "when", "sources", "reason"):
        table.add_column(title, overflow="fold", no_wrap=title in ("batches", "incident", "at step", "when"))
    for entry in entries:
        table.add_row(
            Text(_range(entry)),
            Text("–" if entry.incident is None else str(entry.incident)),
            Text("start" if entry.step is None else str(entry.step)),
            Text("–" if entry.time is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.time))),
            Text(", ".join(entry.sources) or "–"),
            Text(entry.reason),
        )
    parts: list[RenderableType] = [table]
    for entry in entries if text else ():
        if entry.texts:
            parts.append(Text(f"\n{batches(entry.first, entry.last)}, the worst samples that were kept:", style="bold"))
        for loss, document, beginning in entry.texts:
            parts.append(Text.assemble("  ", (f"{loss}  {document}".strip(), "dim"), f"\n    {beginning}"))
    return Group(*parts)


def _range(entry: LeftOut) -> str:
    return str(entry.first) if entry.first == entry.last else f"{entry.first}–{entry.last}"


def summary(entries: Sequence[LeftOut]) -> str:
    """One sentence: how many batches are left out."""
    left_out = {batch for entry in entries for batch in range(entry.first, entry.last + 1)}
    if not left_out:
        return "nothing is left out: no batch is in quarantine, and the config excludes none"
    return f"{len(left_out)} batch{' is' if len(left_out) == 1 else 'es are'} left out"
