"""Loss curves from the files that people have them in: ledgers, JSON lines, CSV, TensorBoard events."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.files import RunFiles
from trainer.errors import DataError
from trainer.telemetry.ledger import lived

_LOSS = re.compile("loss", re.IGNORECASE)
_NORM = re.compile(r"grad(?:ient)?s?[ _-]?norm$", re.IGNORECASE)
_STEP = re.compile(r"^(?:step|global_step|iteration|iter|_step)$", re.IGNORECASE)
_NAMES = re.compile(r"^(?:loss|train[_/]loss|value)$", re.IGNORECASE)
_DELIMITERS = ",\t;"


@dataclass(frozen=True, slots=True)
class Curve:
    """A saved loss curve, in the order in which it was written. All sequences have one length."""

    source: str
    """Where it comes from, for a person."""
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...] | None
    steps: tuple[int, ...]


def read_curve(path: Path, tag: str | None = None) -> Curve:
    """The curve in a run directory, a ledger, JSON lines, a CSV file, or TensorBoard events (a file or a folder).

    Args:
        tag: name of the loss: a tag, a column or a field. None: the first that holds "loss".

    Raises:
        DataError: there is nothing there, or no loss in it.
    """
    if path.is_dir():
        ledger = RunFiles(path).ledger
        return _of_ledger(ledger) if tag is None and ledger.is_file() else _of_events(path, tag)
    if not path.is_file():
        raise DataError(
            f"there is no file or folder {path}; name a run, a ledger, JSON lines, CSV or TensorBoard events"
        )
    if "tfevents" in path.name:
        return _of_events(path, tag)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if not first.lstrip().startswith("{"):
                return _of_csv(path, file, tag)
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text; name a ledger, JSON lines, CSV or a TensorBoard event file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        is_ledger = tag is None and "kind" in json.loads(first) and "start" in json.loads(first)
    except ValueError:
        is_ledger = False
    return _of_ledger(path) if is_ledger else _of_json_lines(path, tag)


def _of_ledger(path: Path) -> Curve:
    # of an attempt and its replay the guard's own curve has the second
    attempts = [r for r in lived(path) if r["kind"] == "attempt" and r["verdict"] != "replay"]
    if not attempts:
        raise DataError(f"{path} holds no attempt yet")
    return Curve(
        str(path),
        tuple(record["loss"] for record in attempts),
        tuple(record["grad_norm"] for record in attempts),
        tuple(record["step"] for record in attempts),
    )


def _of_json_lines(path: Path, tag: str | None) -> Curve:
    rows: list[Mapping[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(f"line {number} of {path} is not JSON; one object a line is expected") from None
            if isinstance(row, dict):
                rows.append(row)
    return _of_rows(path, rows, tag)


def _of_csv(path: Path, file: Iterable[str], tag: str | None) -> Curve:
    lines = [line for line in file if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty")
    delimiter = max(_DELIMITERS, key=lines[0].count)
    return _of_rows(path, list(csv.DictReader(lines, delimiter=delimiter)), tag)


def _of_rows(path: Path, rows: Sequence[Mapping[str, Any]], tag: str | None) -> Curve:
    """Rows without a loss (evaluations, summaries) are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    name = tag or next((n for n in names if _NAMES.match(n)), None) or next((n for n in names if _LOSS.search(n)), None)
    if name is None or name not in names:
        known = ", ".join(names[:12]) or "nothing"
        raise DataError(f"{path} has no {f'field {tag!r}' if tag else 'field that holds a loss'}; it has {known}")
    used = [row for row in rows if row.get(name) not in (None, "")]
    norm = next((n for n in names if _NORM.search(n)), None)
    step = next((n for n in names if _STEP.match(n)), None)
    norms = None
    if norm is not None and all(row.get(norm) not in (None, "") for row in used):
        norms = tuple(_number(path, norm, row[norm]) for row in used)
    steps: tuple[int, ...] = tuple(range(1, len(used) + 1))
    if step is not None and all(row.get(step) not in (None, "") for row in used):
        steps = tuple(_whole(path, step, row[step]) for row in used)
    losses = tuple(_number(path, name, row[name]) for row in used)
    if not losses:
        raise DataError(f"{path} holds no value of {name!r}")
    return Curve(f"{path}, {name}", losses, norms, steps)


def _number(path: Path, name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"{path}: {name} is {value!r}, which is not a number") from None


def _whole(path: Path, name: str, value: object) -> int:
    number = _number(path, name, value)
    if not math.isfinite(number):
        raise DataError(f"{path}: {name} is {value!r}, which is not a step")
    return int(number)


def _of_events(path: Path, tag: str | None) -> Curve:
    folder = path if path.is_file() else _folder_of_events(path)
    points = _scalars(folder)
    name = tag or next((name for name in points if _LOSS.search(name)), None)
    if name is None or name not in points:
        known = ", ".join(list(points)[:12]) or "no scalars"
        raise DataError(f"{folder} has no {f'tag {tag!r}' if tag else 'tag that holds a loss'}; it has {known}")
    losses = points[name]
    norm = next((other for other in points if _NORM.search(other)), None)
    norms = dict(points[norm]) if norm else {}
    steps = tuple(step for step, _ in losses)
    return Curve(
        f"{folder}, {name}",
        tuple(value for _, value in losses),
        tuple(norms[step] for step in steps) if norms.keys() >= set(steps) else None,
        steps,
    )


def _folder_of_events(path: Path) -> Path:
    """The folder itself, or the one folder below it that holds event files; of several the one called main."""
    found = sorted({file.parent for file in path.rglob("*tfevents*") if file.is_file()})
    if path in found:
        return path
    main = [folder for folder in found if folder.name == "main"]
    chosen = main if len(main) == 1 else found
    if not chosen:
        raise DataError(f"{path} holds neither a ledger.jsonl nor TensorBoard events; name a run or a file")
    if len(chosen) > 1:
        names = ", ".join(str(folder.relative_to(path)) for folder in chosen[:8])
        raise DataError(f"{path} holds TensorBoard events of several runs ({names}); name one of these folders")
    return chosen[0]


def _scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value), in the order of the file; tensors that are scalars (TensorFlow 2) too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    reader = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    try:
        reader.Reload()
    except Exception as error:
        raise DataError(f"{path} cannot be read as TensorBoard events: {error}") from error
    tags = reader.Tags()
    points = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:
        if reader.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            points[tag] = [(event.step, float(make_ndarray(event.tensor_proto))) for event in reader.Tensors(tag)]
    return {tag: values for tag, values in points.items() if values}
