"""What the command line says at the end of a run."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from trainer.config.files import RunFiles

KEEP_EVERY_POINT = "--samples_per_plugin scalars=100000"

_HEADLINES = {
    "completed": "The run is complete",
    "stopped": "The run stopped as asked",
    "halted": "The guard halted the run",
    "crashed": "The run crashed",
    "refused": "The run was refused",
    "superseded": "Another start of the run goes on with it",
}


def closing(root: Path, outcome: dict[str, Any]) -> str:
    """Why the run ended, its figures, and what to open."""
    files = RunFiles(root)
    reason = str(outcome["reason"])
    lines = ["", _HEADLINES.get(reason, reason)]
    if reason == "completed":
        lines[-1] += "."
    elif message := outcome.get("message"):
        lines[-1] += f": {message}"
    rows = []
    if outcome.get("step") is not None:
        rows.append(("step", f"{outcome['step']} of {outcome.get('steps', '?')}"))
    if (held_out := outcome.get("held_out_loss")) is not None:
        rows.append(("held-out loss", f"{held_out:.4f} {_unit(root)}"))
    if num_incidents := len(list((root / "incidents").glob("[0-9]*/report.md"))):
        rows.append(("incidents", f"{num_incidents}, each with a report in {_path(root / 'incidents')}"))
    if files.report.is_file():
        rows.append(("report", _path(files.report)))
    if files.tensorboard.is_dir():
        # by itself TensorBoard keeps 1,000 points of a curve, and so drops spikes
        rows.append(("TensorBoard", f"tensorboard --logdir {_path(files.tensorboard)} {KEEP_EVERY_POINT}"))
    if files.export.is_dir():
        rows.append(("export", _path(files.export)))
    rows.append(("run directory", _path(root)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(lines + [f"  {name:<{width}}  {text}" for name, text in rows])


_UNITS = {
    "multi_label": "nats a class",
    "regression": "squared error",
    "token_classification": "nats a word",
    "question_answering": "nats an end of the answer",
    "seq2seq": "nats a token",
}
"""Of the held-out loss, where it is not that of texts with a class or of tokens of packed text."""


def _unit(root: Path) -> str:
    """Of the held-out loss, with the loss of who knows the frequencies alone, where preparing recorded it."""
    try:
        report = json.loads(RunFiles(root).data.read_text(encoding="utf-8"))["report"]
    except (OSError, ValueError, LookupError, TypeError):
        return "nats a token"
    unit = _UNITS.get(report.get("kind"), "nats a text" if "classes" in report else "nats a token")
    known = ("class_entropy", "class entropy"), ("unigram_entropy", "unigram entropy of that text")
    key, name = known[0] if "classes" in report else known[1]
    entropy = report.get(key)
    return f"{unit} ({name}: {entropy:.4f})" if isinstance(entropy, int | float) else unit


def _path(path: Path) -> str:
    """As it is pasted into a shell; relative where that is shorter."""
    relative = os.path.relpath(path)
    return shlex.quote(relative if len(relative) < len(str(path)) else str(path))


def visible(text: str) -> str:
    """Text of a user on one line of a terminal: control characters as Python writes them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
