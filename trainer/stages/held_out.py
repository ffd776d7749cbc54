"""The evaluation of a run: loss and scores over its held-out data, and the predictions behind them in a file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch.distributed as dist

from trainer.config.objective import Kind
from trainer.data.labelled import LabelledSamples
from trainer.data.questions import QuestionSamples
from trainer.data.samples import Samples
from trainer.engine.zero import Engine
from trainer.records import Evaluation, FloatArray, IntArray
from trainer.scores import errors, several
from trainer.scores.classes import THRESHOLD
from trainer.scores.scores import Scores
from trainer.stages.build import held_out_batches
from trainer.stages.scoring import SCORED, Keeper, Predictions, gathered, held_out_ids, of_texts

if TYPE_CHECKING:
    import pyarrow as pa

    from trainer.stages.build import Setting

PREDICTIONS = "predictions.parquet"
"""In the run directory: what the newest evaluation predicted for each sample, for lists of errors."""
MOST_CLASSES = 20
"""Of a confusion matrix that is shown."""
_ERRORS = 10
_CLIP = 160
"""Characters of a text that are shown."""
LANGUAGE: frozenset[Kind] = frozenset({"causal", "masked", "seq2seq"})
"""Kinds whose targets are tokens: the exponential of their loss is a perplexity."""

Say = Callable[[Literal["info", "warning"], str], None]


def evaluate_held_out(setting: Setting, engine: Engine, micro: int, step: int, say: Say) -> Evaluation | None:
    """Loss and scores, equal on all ranks; None: given up, since a rank was asked to stop. A collective.

    Scores that are not defined on these samples are not among them. Rank 0 writes PREDICTIONS.
    """
    objective = setting.config.objective
    batches = held_out_batches(setting, micro)
    if objective.kind not in SCORED:
        found = engine.evaluate(batches, lambda: setting.stop.requested)
        if found is None or objective.kind not in LANGUAGE:
            return found
        return replace(found, scores={"perplexity": math.exp(min(found.loss, 700.0)), **found.scores})
    data, ranks = setting.config.data, setting.ranks
    samples = setting.prepared.samples("held_out", data.sequence_length, data.boundaries)
    ids = held_out_ids(
        len(samples),
        micro=micro,
        rank=ranks.rank,
        ranks=ranks.world_size,
        max_samples=setting.config.evaluation.max_samples,
    )
    classes = setting.prepared.classes
    names = classes.names if classes is not None else ()
    keeper = Keeper(objective, ids, samples.columns if isinstance(samples, QuestionSamples) else None, names)
    with keeper.watching(engine.module):
        found = engine.evaluate(keeper.seen(batches), lambda: setting.stop.requested)
    if found is None:
        return None
    predicted = gathered(keeper.predictions())
    box: list[dict[str, float]] = [{}]
    closely: dict[str, Any] | None = None
    if predicted is not None:
        if not predicted.finite:
            say("warning", f"at step {step} the model predicts numbers that are not finite: there are no scores")
        else:
            assert isinstance(samples, LabelledSamples)
            predicted = of_texts(predicted, samples)
            scores = predicted.scores(names)
            values = scores.values
            closely = look_closely(predicted, scores, names, samples)
            box = [{name: value for name, value in values.items() if not math.isnan(value)}]
        try:
            write_predictions(
                setting.files.root / PREDICTIONS, predicted, names, documents(samples, predicted.ids), step
            )
        except OSError as error:
            say("warning", f"the predictions of step {step} were not written: {error}")
    dist.broadcast_object_list(box, src=0)
    return replace(found, scores={**found.scores, **box[0]}, closely=closely)


def look_closely(predicted: Predictions, scores: Scores, names: Sequence[str], samples: Samples) -> dict[str, Any]:
    """The confusion of at most MOST_CLASSES classes, and the worst errors with their texts: plain JSON."""
    wrong = badness(predicted, scores)
    rows = errors.worst(wrong, _ERRORS)
    truths, predictions = shown(predicted, names)
    ids = predicted.ids[rows]
    result: dict[str, Any] = {
        "errors": [
            {
                "document": document,
                "truth": truths[row],
                "prediction": predictions[row],
                "text": clipped(" ‖ ".join(text for _, _, text in samples.describe(number))),
            }
            for row, number, document in zip(rows, ids.tolist(), documents(samples, ids), strict=True)
        ]
    }
    if scores.confusion is not None and len(names) <= MOST_CLASSES:
        result |= {"classes": list(names), "confusion": scores.confusion.tolist()}
    return result


def badness(predicted: Predictions, scores: Scores) -> FloatArray:
    """How wrong each prediction is, [texts]; 0: it is right."""
    if predicted.kind != "several":
        return errors.badness(predicted.kind, predicted.predictions, predicted.truths, scores.hits.get("exact_match"))
    result = np.zeros(len(predicted.ids))
    for own in several.parts(predicted.predictions, predicted.truths, predicted.tasks):
        result[own.rows] = errors.badness(own.task.kind, own.predictions, own.truths)
    return result


def clipped(text: str) -> str:
    """On one line, not too long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _CLIP else flat[: _CLIP - 1] + "…"


def documents(samples: Samples, ids: IntArray) -> list[str]:
    """Name of the document of each sample of labelled texts."""
    assert isinstance(samples, LabelledSamples)
    # each file of names is read once
    names = [source.names.read_text(encoding="utf-8").split("\n") for source in samples.sources]
    return [names[place.source][place.document] for place in samples.places(ids)]


def write_predictions(
    path: Path, predicted: Predictions, names: Sequence[str], where: Sequence[str], step: int
) -> None:
    """A row a sample: `sample` (its id), `document`, `truth`, `prediction`, and of classes `probabilities` in the order
    of the names, which stand in the table's metadata beside kind and step."""
    import json

    import pyarrow.parquet as pq

    notes = {"kind": predicted.kind, "step": str(step), "classes": json.dumps(list(names))}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(_table(predicted, names, where).replace_schema_metadata(notes), partial)
    partial.replace(path)


def _table(predicted: Predictions, names: Sequence[str], where: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    truths, predictions = shown(predicted, names)
    columns = {"sample": predicted.ids, "document": list(where), "truth": truths, "prediction": predictions}
    if predicted.kind in ("classification", "multi_label"):
        columns["probabilities"] = np.asarray(predicted.predictions, dtype=np.float32).tolist()
    return pa.table(columns)


def shown(predicted: Predictions, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Truths and predictions as a person reads them, one a sample: names of classes, lists of them, numbers, tokens."""
    match predicted.kind:
        case "classification":
            chosen = np.asarray(predicted.predictions).argmax(axis=1)
            return [names[n] for n in predicted.truths.tolist()], [names[n] for n in chosen.tolist()]
        case "multi_label":
            first, second = (
                [
                    [name for name, probable in zip(names, row, strict=True) if probable >= THRESHOLD]
                    for row in each.tolist()
                ]
                for each in (predicted.truths, predicted.predictions)
            )
            return first, second
        case "token_classification":
            first, second = (
                [[names[n] for n in row] for row in each] for each in (predicted.truths, predicted.predictions)
            )
            return first, second
        case "question_answering":
            return [true[0] if true else "" for true in predicted.truths], list(predicted.predictions)
        case "several":
            truths: list[Any] = [None] * len(predicted.ids)
            predictions: list[Any] = [None] * len(predicted.ids)
            for own in several.parts(predicted.predictions, predicted.truths, predicted.tasks):
                of_task = Predictions(cast(Kind, own.task.kind), own.rows, own.predictions, own.truths)
                for row, true, found in zip(own.rows.tolist(), *shown(of_task, own.task.classes), strict=True):
                    truths[row], predictions[row] = (
                        f"{own.task.name}: {_text(true)}",
                        f"{own.task.name}: {_text(found)}",
                    )
            return truths, predictions
        case _:
            return np.asarray(predicted.truths).tolist(), np.asarray(predicted.predictions).tolist()


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
