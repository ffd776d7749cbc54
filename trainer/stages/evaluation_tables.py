"""What `trimtab evaluate` found, as tables for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trainer.records import IntArray
from trainer.scores import errors
from trainer.scores.resampling import Comparison, flips
from trainer.stages.evaluating import Material, Result
from trainer.stages.held_out import MOST_CLASSES, badness, clipped, shown

if TYPE_CHECKING:
    from rich.table import Table


def _table(*columns: str, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def tables(result: Result, material: Material, errors: int) -> Iterator[Table]:
    """Scores with intervals, scores by class, confusion, worst errors, generated texts."""
    noisy = ("with noise",) if result.noisy else ()
    scores = _table(
        "score", "value", "95 % interval", *noisy, title=f"{result.title}: {len(result.predicted.ids):,} texts"
    )
    values = result.scores.values | (result.written.values if result.written else {})
    for name, value in values.items():
        interval = result.intervals[name]
        more = [_number(result.noisy.values.get(name))] if result.noisy else []
        scores.add_row(name, _number(value), f"{_number(interval.low)} … {_number(interval.high)}", *more)
    if result.flips is not None:
        scores.add_row("prediction flips", "", "", _number(result.flips))
    yield scores
    if result.scores.by_class:
        by_class = _table("class", "precision", "recall", "F1", "support", title="By class")
        for one in result.scores.by_class:
            by_class.add_row(one.name, *map(_number, (one.precision, one.recall, one.f1)), f"{one.support:,}")
        yield by_class
    if result.scores.confusion is not None and len(material.names) <= MOST_CLASSES:
        yield confusion(result.scores.confusion, material.names)
    if wrong := worst(result, material, errors):
        table = _table("where", "true", "predicted", title="Worst errors")
        table.add_column("text", justify="left", overflow="fold")
        for error in wrong:
            place = error["where"].rsplit("/", 1)[-1]
            table.add_row(place, str(error["truth"]), str(error["prediction"]), error["text"])
        yield table
    if result.generated is not None:
        table = _table("text", "right", "generated", title="Generated, greedily")
        for number, truth, text in list(
            zip(result.generated.ids, result.generated.truths, result.generated.texts, strict=True)
        )[:3]:
            table.add_row(clipped(material.text(int(number))), clipped(truth), clipped(text))
        yield table


def confusion(matrix: IntArray, names: Sequence[str]) -> Table:
    """Rows are true, columns predicted."""
    table = _table("true ＼ predicted", *names, title="Confusion")
    for name, row in zip(names, matrix.tolist(), strict=True):
        table.add_row(name, *(f"{count:,}" if count else "·" for count in row))
    return table


def notes(result: Result) -> Iterator[str]:
    """What a reader of the scores should know."""
    both = result.scores.notes | (result.written.notes if result.written else {})
    yield from (f"{name}: {note}" for name, note in both.items())
    yield from (f"{count:,} × {what}" for what, count in result.counts.items())


def worst(result: Result, material: Material, limit: int, *, whole: bool = False) -> list[dict[str, Any]]:
    """The most wrong texts, the worst first: where, truth, prediction, text (its beginning, or all of it)."""
    found = result.predicted
    wrong = badness(found, result.scores)
    chosen = errors.worst(wrong, limit)
    truths, predictions = shown(found, material.names)
    ids = found.ids[chosen]
    show = str if whole else clipped
    return [
        {"where": where, "truth": truths[row], "prediction": predictions[row], "text": show(material.text(number))}
        for row, number, where in zip(chosen, ids.tolist(), material.where(ids), strict=True)
    ]


def comparison(first: Result, second: Result, found: dict[str, Comparison]) -> Table:
    """Both models by score."""
    columns = ("score", first.title, second.title, "difference", "95 % interval", "p (bootstrap)", "p", "test")
    table = _table(*columns, title=f"{second.title} against {first.title}")
    for name, one in found.items():
        interval = f"{_number(one.interval.low)} … {_number(one.interval.high)}"
        numbers = map(_number, (one.first, one.second, one.difference))
        table.add_row(name, *numbers, interval, _number(one.p_bootstrap), _number(one.p_value), one.test)
    return table


def disagreement(results: Sequence[Result], names: Sequence[str]) -> tuple[Table, list[list[float]]]:
    """Fraction of texts for which each two models predict something else."""
    predicted = [shown(one.predicted, names)[1] for one in results]
    matrix = [[flips(row, column) for column in predicted] for row in predicted]
    table = _table("prediction flips", *(one.title for one in results), title="Between models")
    for one, row in zip(results, matrix, strict=True):
        table.add_row(one.title, *map(_number, row))
    return table, matrix


def as_json(result: Result, material: Material, errors: int) -> dict[str, Any]:
    """All of it; what is not defined is null."""
    values = result.scores.values | (result.written.values if result.written else {})
    found: dict[str, Any] = {
        "model": result.title,
        "kind": result.predicted.kind,
        "texts": len(result.predicted.ids),
        "scores": values,
        "intervals": {name: [one.low, one.high] for name, one in result.intervals.items()},
        "by_class": [asdict(one) for one in result.scores.by_class],
        "classes": list(material.names),
        "confusion": None if result.scores.confusion is None else result.scores.confusion.tolist(),
        "notes": list(notes(result)),
        "worst": worst(result, material, errors),
    }
    if result.noisy is not None:
        found["noisy"] = {"scores": result.noisy.values, "flips": result.flips}
    if result.generated is not None:
        found["generated"] = result.generated.texts[:3]
    return found


def without_nan(value: Any) -> Any:
    """The same with null for what is no number: JSON has none."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
