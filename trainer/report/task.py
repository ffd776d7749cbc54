"""The page of a run that learned a task, `RUN/report.html`: how it went, what it takes for what, and where it errs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.files import RunFiles
from trainer.report.web import inline, page
from trainer.telemetry.ledger import Record, surviving

MOST_SCORES = 8
"""Columns of scores; all others are in the ledger."""
MOST_CLASSES = 60
"""Classes whose balance is shown."""
_MOST_EXAMPLES = 2
"""Of each kind of augmentation."""

_TEMPLATE = """
<p>{{ outcome }}</p>
<h2>Evaluations on held-out data</h2>
{% if curve %}<img alt="held-out loss and scores by step" src="{{ curve }}">{% endif %}
<div class="wide"><table><tr><th class="n">step</th>
{% for name in columns %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for row in evaluations %}
<tr{% if row.chosen %} class="chosen"{% endif %}><td class="n">{{ row.step }}</td>
{% for value in row.numbers %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="note">{{ choice }} The ledger has all scores; intervals and tests: <code>trimtab evaluate</code>.</p>
{% if matrix %}
<h2>Confusion</h2>
<div class="wide"><table class="matrix"><tr><th>true \\ predicted</th>
{% for name in classes %}<th class="up"><span>{{ name }}</span></th>{% endfor %}</tr>
{% for row in matrix %}
<tr><th>{{ row.name }}</th>
{% for cell in row.cells %}<td class="n" style="background: rgba(31, 119, 180, {{ cell.share }})">{{ cell.count }}</td>
{% endfor %}</tr>
{% endfor %}</table></div>
{% endif %}
{% if errors %}
<h2>Worst errors</h2>
<table><tr><th>text</th><th>true</th><th>predicted</th><th>document</th></tr>
{% for one in errors %}
<tr><td>{{ one.text }}</td><td>{{ one.truth }}</td><td>{{ one.prediction }}</td>
<td class="note">{{ one.document }}</td></tr>
{% endfor %}</table>
{% endif %}
<h2>Data</h2>
<table><tr><th>source</th><th class="n">train</th><th class="n">held out</th><th>left out</th></tr>
{% for one in sources %}
<tr><td>{{ one.name }}</td><td class="n">{{ one.train }}</td><td class="n">{{ one.held_out }}</td>
<td>{{ one.removed }}</td></tr>
{% endfor %}</table>
{% if balance %}
<p></p><table><tr><th>class</th><th class="n">train</th><th class="n">held out</th>
{% if matrix %}<th class="n">precision</th><th class="n">recall</th><th class="n">F1</th>{% endif %}</tr>
{% for one in balance %}
<tr><td>{{ one[0] }}</td>{% for value in one[1:] %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% if more_classes %}<p class="note">… and {{ more_classes }} more</p>{% endif %}
{% endif %}
{% if long %}<p class="note">{{ long }}</p>{% endif %}
{% if augmented %}
<h2>Augmentation, by example</h2>
<p>{{ said }}</p>
<table><tr><th>change</th><th>before</th><th>after</th></tr>
{% for one in augmented %}
<tr><td>{{ one[0] }}</td><td>{{ one[1] }}</td><td>{{ one[2] }}</td></tr>
{% endfor %}</table>
{% endif %}
{% if incidents %}
<h2>Incidents</h2>
<ul>{% for one in incidents %}<li><a href="{{ one }}">{{ one }}</a></li>{% endfor %}</ul>
{% endif %}
"""


def write(files: RunFiles, title: str, outcome: str) -> Path | None:
    """Write the page from the ledger, the report of the data and the folders of incidents.

    Args:
        outcome: why the run ended, in a sentence.

    Returns:
        Where it is; None: the run was not evaluated.

    Raises:
        OSError: it cannot be written.
    """
    records = [r for r in surviving(files.ledger) if r["kind"] in ("evaluation", "predictions")]
    # of a step that was evaluated again after a resume the last
    evaluations = {int(r["step"]): r for r in records if r["kind"] == "evaluation"}
    if not evaluations:
        return None
    newest = evaluations[max(evaluations)]
    best = newest.get("best")
    chosen = int(best["step"]) if best and best["step"] in evaluations else int(newest["step"])
    closely = {int(r["step"]): r for r in records if r["kind"] == "predictions"}.get(chosen, {})
    data = json.loads(files.data.read_text())["report"]
    text = page(
        title,
        _TEMPLATE,
        outcome=outcome[:1].upper() + outcome[1:] + ".",
        choice=_choice(best, chosen),
        **_table([evaluations[step] for step in sorted(evaluations)], chosen, best["score"] if best else "loss"),
        **_confusion(closely),
        errors=[{name: _text(value) for name, value in one.items()} for one in closely.get("errors", [])],
        **_data(data, closely),
        **_augmentation(files.root / "augmentation.json"),
        incidents=sorted(str(p.relative_to(files.root)) for p in files.incidents.glob("[0-9]*/report.md")),
    )
    partial = files.root / ".report.html"
    partial.write_text(text, encoding="utf-8")
    partial.replace(files.report)
    return files.report


def _choice(best: Mapping[str, Any] | None, chosen: int) -> str:
    if best is None:
        return f"What follows is of the newest, at step {chosen}."
    return f"What follows is of the best by {best['score']}, at step {chosen}, which is what is exported."


def _table(evaluations: Sequence[Record], chosen: int, compared: str) -> dict[str, Any]:
    known = dict.fromkeys(["loss", compared, *evaluations[-1].get("scores", {})])
    names = list(known)[: 1 + MOST_SCORES]
    values = [{"loss": each["loss"], **each.get("scores", {})} for each in evaluations]
    rows = [
        {
            "step": each["step"],
            "chosen": each["step"] == chosen,
            "numbers": [_number(value.get(name)) for name in names],
        }
        for each, value in zip(evaluations, values, strict=True)
    ]
    return {"columns": names, "evaluations": rows, "curve": _curve([e["step"] for e in evaluations], values, names)}


def _text(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else "–"


def _curve(steps: Sequence[int], values: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Loss above, scores between −1 and 1 below; empty for a single evaluation."""
    if len(steps) < 2:
        return ""
    from matplotlib.figure import Figure

    def line(name: str) -> list[float]:
        found = (each.get(name) for each in values)
        return [float(value) if isinstance(value, float | int) else np.nan for value in found]

    figure = Figure(figsize=(7.2, 3.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, line("loss"), marker=".")
    left.set_title("held-out loss", fontsize=9)
    for name in names[1:]:
        numbers = line(name)
        if all(not math.isfinite(number) or abs(number) <= 1 for number in numbers):
            right.plot(steps, numbers, marker=".", label=name)
    right.set_title("scores", fontsize=9)
    if right.lines:
        right.legend(fontsize=6)
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
    return inline(figure)


def _confusion(closely: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of true classes, each cell with its fraction of the row."""
    names: Sequence[str] = closely.get("classes", [])
    counts = np.asarray(closely.get("confusion", []), dtype=np.int64)
    rows = [
        {
            "name": name,
            "cells": [
                {"count": f"{count:,}" if count else "·", "share": f"{count / max(1, row.sum()):.3f}"} for count in row
            ],
        }
        for name, row in zip(names, counts, strict=True)
    ]
    return {"classes": names, "matrix": rows}


def _by_class(closely: Mapping[str, Any]) -> list[list[str]]:
    """Precision, recall and F1 of each class, where the confusion is known."""
    counts = np.asarray(closely.get("confusion", []), dtype=np.int64)
    result = []
    for number in range(len(counts)):
        hits, true, predicted = int(counts[number, number]), int(counts[number].sum()), int(counts[:, number].sum())
        parts = ((hits, predicted), (hits, true), (2 * hits, true + predicted))
        result.append([_number(part / whole if whole else None) for part, whole in parts])
    return result


def _data(report: Mapping[str, Any], closely: Mapping[str, Any]) -> dict[str, Any]:
    sources: list[Mapping[str, Any]] = report["sources"]
    shown = [
        {
            "name": source["name"],
            "train": f"{source.get('train', {}).get('documents', 0):,}",
            "held_out": f"{source.get('held_out', {}).get('documents', 0):,}",
            "removed": ", ".join(f"{found['documents']:,} {why}" for why, found in source["removed"].items()) or "none",
        }
        for source in sources
    ]
    names = report.get("classes") or []
    by_split = [
        [sum(column) for column in zip_longest(*(s.get(split, {}).get("classes", []) for s in sources), fillvalue=0)]
        for split in ("train", "held_out")
    ]
    scores = _by_class(closely)
    balance = [
        [name, *(f"{counts[number]:,}" if counts else "–" for counts in by_split), *(scores[number] if scores else [])]
        for number, name in enumerate(names)
    ]
    does = {"cut": "cut", "drop": "left out", "window": "read in windows"}.get(str(report.get("too_long")), "cut")
    texts = [
        f"{number:,} of the {split.replace('_', '-')} split"
        for split, number in report.get("cut", {}).items()
        if number
    ]
    long = f"Longer than a sample of {report.get('sequence_length')} tokens, and {does}: {', '.join(texts)}."
    return {
        "sources": shown,
        "balance": balance[:MOST_CLASSES],
        "more_classes": max(0, len(balance) - MOST_CLASSES),
        "long": long if texts else "",
    }


def _augmentation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"said": "", "augmented": []}
    found = json.loads(path.read_text())
    examples = [
        [kind, one["before"], one["after"]] for kind, each in found["examples"].items() for one in each[:_MOST_EXAMPLES]
    ]
    return {"said": f"{found['said']}.", "augmented": examples}
