"""Scores of several tasks are those of each alone, digit for digit."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.config.objective import ObjectiveConfig, TaskConfig, outputs_of
from trainer.config.scores import names_of
from trainer.scores.classes import sigmoid, softmax
from trainer.scores.resampling import compare, intervals
from trainer.scores.score import MAIN, score
from trainer.scores.several import parts, several

CONFIGS = (
    TaskConfig(name="films", kind="classification"),
    TaskConfig(name="tags", kind="multi_label"),
    TaskConfig(name="stars", kind="regression"),
)
TASKS = outputs_of(CONFIGS, ("films/a", "films/b", "films/c", "tags/x", "tags/y", "stars/value"))
TEXTS = 90


def example(seed: int = 0, rows: int = TEXTS, only: tuple[str, ...] = ("films", "tags", "stars")):
    """(predictions, truths, {task: its own (rows, predictions, truths) as its kind has them}); texts are mixed."""
    generator = np.random.default_rng(seed)
    which = generator.choice(only, rows)
    truths = np.full((rows, 6), np.nan, dtype=np.float32)
    logits = generator.normal(size=(rows, 6)).astype(np.float32)
    predictions = np.concatenate([softmax(logits[:, :3]), sigmoid(logits[:, 3:5]), logits[:, 5:].astype(float)], axis=1)
    own = {}
    for task in only:
        of = np.flatnonzero(which == task)
        if task == "films":
            true = generator.integers(0, 3, len(of))
            truths[of, :3] = np.eye(3)[true]
            own[task] = (of, predictions[of, :3], true)
        elif task == "tags":
            true = generator.integers(0, 2, (len(of), 2)).astype(np.float32)
            truths[of, 3:5] = true
            own[task] = (of, predictions[of, 3:5], true)
        else:
            true = generator.normal(size=len(of)).astype(np.float32)
            truths[of, 5] = true
            own[task] = (of, predictions[of, 5], true.astype(np.float64))
    return predictions, truths, own


def alone(own):
    kinds = {task.name: task for task in TASKS}
    return {name: score(kinds[name].kind, p, t, kinds[name].classes) for name, (_, p, t) in own.items()}


def test_each_task_has_its_own_rows() -> None:
    predictions, truths, own = example()
    found = parts(predictions, truths, TASKS)
    assert [each.task.name for each in found] == ["films", "tags", "stars"]
    for each in found:
        rows, predicted, true = own[each.task.name]
        np.testing.assert_array_equal(each.rows, rows)
        np.testing.assert_array_equal(each.predictions, predicted)
        np.testing.assert_array_equal(each.truths, true)


def test_scores_are_those_of_each_task_alone() -> None:
    predictions, truths, own = example()
    found, each = several(predictions, truths, TASKS, score), alone(own)
    expected = {f"{task}/{name}": value for task, scores in each.items() for name, value in scores.values.items()}
    assert found.values == expected
    assert (found.kind, found.num_texts) == ("several", TEXTS)
    assert [(one.name, one.f1, one.support) for one in found.by_class] == [
        (f"{task}/{one.name}", one.f1, one.support) for task, scores in each.items() for one in scores.by_class
    ]
    # what an evaluation can be compared by is what it gives
    assert {"loss", *found.values} >= set(names_of(ObjectiveConfig(kind="several", tasks=CONFIGS)))


def test_under_the_counts_of_a_resample_too() -> None:
    predictions, truths, own = example()
    counts = np.random.default_rng(4).multinomial(TEXTS, np.full(TEXTS, 1 / TEXTS), size=25).astype(np.float64)
    # once no text of a task is drawn: its scores are then as undefined as alone
    counts[3, own["stars"][0]] = 0
    found, each = several(predictions, truths, TASKS, score).measure(counts), alone(own)
    assert len(found) == sum(len(scores.values) for scores in each.values())
    for task, scores in each.items():
        for name, values in scores.measure(counts[:, own[task][0]]).items():
            np.testing.assert_array_equal(found[f"{task}/{name}"], values, err_msg=f"{task}/{name}")
    assert np.isnan(found["stars/pearson"][3])


def test_the_first_score_of_each_task_is_told_first() -> None:
    predictions, truths, _ = example()
    found = list(several(predictions, truths, TASKS, score).values)
    assert found[:3] == [f"{task.name}/{MAIN[task.kind]}" for task in TASKS]


def test_a_task_without_texts_has_no_scores() -> None:
    predictions, truths, own = example(only=("films", "stars"))
    found = several(predictions, truths, TASKS, score)
    assert {name.split("/")[0] for name in found.values} == {"films", "stars"}
    assert found.values == {
        f"{task}/{name}": value for task, scores in alone(own).items() for name, value in scores.values.items()
    }
    with pytest.raises(ValueError, match="no text"):
        several(predictions[:0], truths[:0], TASKS, score)


def test_intervals_and_comparisons_are_by_task() -> None:
    predictions, truths, _ = example()
    found = several(predictions, truths, TASKS, score)
    bounds = intervals(found, resamples=60)
    assert set(bounds) == set(found.values)
    for name in ("films/accuracy", "tags/f1_micro", "stars/mae"):
        assert bounds[name].low < found.values[name] < bounds[name].high
    equal = compare(
        lambda predicted, true: several(predicted, true, TASKS, score), predictions, predictions, truths, resamples=50
    )
    assert {one.difference for one in equal.values()} == {0.0}
