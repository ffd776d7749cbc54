"""Teacher, student, and the same student without a teacher, side by side: what `distill.compare` asks for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.run_directory import read_outcome, write_atomically
from launcher.start import Request, completed_before
from trainer.config.check import check_config
from trainer.config.check_distill import PLAIN_SUFFIX
from trainer.config.facts import facts_from_json
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.telemetry.books import account, newest_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trainer.config.schema import RunConfig

SUFFIX = PLAIN_SUFFIX
"""Of the name of the run without a teacher."""
ON_SLURM = (
    "distill.compare is left out of a job: submit the same config with `stage={stage} distill= name={name}` too; when "
    "both are complete, `trimtab run {root}` shows them side by side"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One of the three models."""

    name: str
    """teacher · distilled · plain"""
    run: str | None
    """Directory of its run; None: it was not trained here."""
    parameters: int | None
    held_out_loss: float | None
    """Nats a target, on the same held-out text."""
    accuracy: float | None
    """Of a classifier, from 0 to 1."""
    tokens: int | None
    """That it was trained on here, padding included."""
    minutes: float | None
    """From its first start to its end, without the time between starts."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The content of `comparison.json`."""

    entries: tuple[Entry, ...]
    predicts: str
    """causal · masked · classification: what the loss is of."""

    @property
    def teacher(self) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == "teacher"), None)


def is_wanted(config: RunConfig) -> bool:
    """Whether a run is to be compared with one without a teacher."""
    return config.distill is not None and config.distill.compare


def plain(request: Request) -> Request:
    """The same run without its teacher: its text, its student, its length, its seed.

    Raises:
        ConfigError: there can be none; the text says why.
    """
    config = request.config
    assert config.distill is not None
    changes: dict[str, Any] = {
        "name": f"{config.name}{SUFFIX}",
        "stage": "pretrain" if config.model.pretrained is None else "finetune",
        "distill": None,
    }
    tokenizer = config.data.tokenizer
    if tokenizer.path is None and tokenizer.train is None and config.model.pretrained is None:
        # it was the teacher's
        tokenizer = tokenizer.model_copy(update={"path": config.distill.teacher.pretrained})
        changes["data"] = config.data.model_copy(update={"tokenizer": tokenizer})
    made = config.model_copy(update=changes)
    # options of the distillation that are without effect in it were warned about with the run itself
    check_config(made, f"{config.name}{SUFFIX}, the run without a teacher,")
    return Request(made, request.root.with_name(f"{request.root.name}{SUFFIX}"), ())


def is_done(request: Request) -> bool:
    """Whether nothing is left of the comparison that a run asks for, if it does."""
    if not is_wanted(request.config):
        return True
    return completed_before(plain(request).root) is not None and RunFiles(request.root).comparison.is_file()


def on_slurm(request: Request) -> str:
    """What is said when a run that asks for it is submitted."""
    beside = plain(request)
    return ON_SLURM.format(stage=beside.config.stage, name=beside.config.name, root=request.root)


def compare(request: Request, beside: Request) -> Comparison:
    """The three of them, from what their runs left.

    Raises:
        RunDirectoryError: one of the runs is not complete.
    """
    entries = [_trained("distilled", request), _trained("plain", beside)]
    teacher = _teacher(RunFiles(request.root))
    return Comparison(tuple([teacher, *entries] if teacher else entries), request.config.objective.kind)


def _teacher(files: RunFiles) -> Entry | None:
    """As the distillation measured it; None: it could not (a cache, a server), or did not."""
    try:
        scores = json.loads(files.teacher_scores.read_text(encoding="utf-8"))
        parameters, accuracy = scores.get("parameters"), scores.get("accuracy")
        return Entry("teacher", None, parameters, float(scores["loss"]), accuracy, None, None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _trained(name: str, request: Request) -> Entry:
    files, config = RunFiles(request.root), request.config
    outcome = read_outcome(request.root)
    if outcome is None or outcome["reason"] != "completed":
        raise RunDirectoryError(f"{request.root} is not complete, and cannot be compared yet")
    try:
        parameters = facts_from_json(files.model.read_text(encoding="utf-8")).num_parameters
    except (OSError, ValueError):
        parameters = None
    scores = (newest_of(files.ledger, "evaluation") or {}).get("scores") or {}
    step = outcome.get("step")
    return Entry(
        name=name,
        run=str(request.root),
        parameters=parameters,
        held_out_loss=outcome.get("held_out_loss"),
        accuracy=scores.get("accuracy"),
        tokens=None if step is None else step * config.batch.samples * config.data.sequence_length,
        minutes=round(account(files.ledger).goodput().allocated / 60, 2),
    )


def write(root: Path, found: Comparison) -> None:
    """`comparison.json` for programs and `comparison.md` for people, in the directory of the distillation.

    Raises:
        RunDirectoryError: they cannot be written.
    """
    files = RunFiles(root)
    write_atomically(files.comparison, json.dumps(_finite(asdict(found)), indent=1, ensure_ascii=False) + "\n")
    titles, rows = _cells(found)
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, ["---", *["---:"] * (len(titles) - 1)], *rows)]
    text = "\n".join(["# Teacher and students side by side", "", *lines, "", *sentences(found)])
    write_atomically(files.comparison.with_suffix(".md"), text + "\n")


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles, and the cells of each row."""
    classifies = found.predicts == "classification"
    whole = found.teacher.parameters if found.teacher else None
    scores = any(entry.accuracy is not None for entry in found.entries)
    titles = ["", "parameters", "size", "held-out"]
    titles += [*([] if classifies else ["perplexity"]), *(["accuracy"] if scores else []), "tokens", "minutes"]
    rows = []
    for entry in found.entries:
        loss, size = entry.held_out_loss, entry.parameters
        row = [
            entry.name,
            _short(size),
            _number(size / whole if size and whole and entry.name != "teacher" else None, ".0%"),
            _number(loss, ".4f"),
        ]
        row += [] if classifies else [_number(None if loss is None else _exp(loss), ",.2f")]
        row += [_number(entry.accuracy, ".2%")] if scores else []
        rows.append([*row, _short(entry.tokens), _number(entry.minutes, ".1f")])
    return titles, rows


def _short(count: int | None) -> str:
    """A count in its largest unit, so that the table fits a narrow terminal: 134.5 M."""
    if count is None:
        return "–"
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return str(count)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if math.isfinite(value) else str(value).replace("nan", "NaN")


def sentences(found: Comparison) -> list[str]:
    """What the figures say, a sentence each."""
    known = {entry.name: entry for entry in found.entries}
    distilled, alone, teacher = known["distilled"], known["plain"], known.get("teacher")
    result = []
    one, other = distilled.held_out_loss, alone.held_out_loss
    if one is not None and other is not None and math.isfinite(one) and math.isfinite(other):
        what = f"{abs(one - other):.4f} nats {'below' if one < other else 'above'} that of plain training"
        # a share of the gap means something only where there is one
        gap = other - teacher.held_out_loss if teacher and teacher.held_out_loss is not None else 0.0
        share = f", which is {(other - one) / gap:.0%} of the way to the teacher" if other - one > 0 and gap > 0 else ""
        result.append(f"The held-out loss of the distilled student is {what}{share}.")
    if found.predicts == "classification" and teacher and teacher.accuracy and distilled.accuracy is not None:
        kept = distilled.accuracy / teacher.accuracy
        beside = "" if alone.accuracy is None else f" (without it {alone.accuracy / teacher.accuracy:.1%})"
        result.append(f"It keeps {kept:.1%} of the teacher's accuracy{beside}.")
    return result


def table(found: Comparison) -> RenderableType:
    """For a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    titles, rows = _cells(found)
    result = Table(title="Side by side", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, title in enumerate(titles):
        result.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return Group(Text(), result, Text("\n".join(["", *sentences(found)])))
