"""Results of several tasks: what a person reads of them, how two models are compared, and which are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.config.objective import TaskConfig, outputs_of
from trainer.errors import ConfigError
from trainer.scores.errors import worst
from trainer.stages.evaluating import Options, Result, compared, require_fit
from trainer.stages.held_out import badness, shown, write_predictions
from trainer.stages.scoring import Predictions

NAMES = ("films/bad", "films/good", "tags/a", "tags/b", "stars/value")
TASKS = outputs_of(
    (
        TaskConfig(name="films", kind="classification"),
        TaskConfig(name="tags", kind="multi_label"),
        TaskConfig(name="stars", kind="regression"),
    ),
    NAMES,
)
NAN = np.nan
TRUTHS = np.array(
    [
        [1, 0, NAN, NAN, NAN],
        [NAN, NAN, 1, 1, NAN],
        [NAN, NAN, NAN, NAN, 2.5],
        [0, 1, NAN, NAN, NAN],
        [NAN, NAN, 0, 1, NAN],
        [NAN, NAN, NAN, NAN, -1.0],
    ],
    dtype=np.float32,
)
PREDICTED = np.array(
    [
        [0.9, 0.1, 0.5, 0.5, 0.0],
        [0.5, 0.5, 0.8, 0.2, 0.0],
        [0.5, 0.5, 0.5, 0.5, 2.25],
        [0.75, 0.25, 0.5, 0.5, 0.0],
        [0.5, 0.5, 0.1, 0.4, 0.0],
        [0.5, 0.5, 0.5, 0.5, 3.0],
    ]
)


def found(predictions: Any = PREDICTED, rows: Any = slice(None)) -> Predictions:
    return Predictions("several", np.arange(6)[rows], predictions[rows], TRUTHS[rows], TASKS)


def test_each_text_is_read_by_its_task(tmp_path: Path) -> None:
    truths, predictions = shown(found(), NAMES)
    assert truths == ["films: bad", "tags: a, b", "stars: 2.5", "films: good", "tags: b", "stars: -1"]
    assert predictions == ["films: bad", "tags: a", "stars: 2.25", "films: bad", "tags: none", "stars: 3"]
    write_predictions(tmp_path / "p.parquet", found(), NAMES, [f"a:{n}" for n in range(6)], 3)
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert rows[4] == {"sample": 4, "document": "a:4", "truth": "tags: b", "prediction": "tags: none"}


def test_the_worst_errors_are_of_all_tasks() -> None:
    scores = found().scores(NAMES)
    wrong = badness(found(), scores)
    assert wrong[0] == 0
    assert (wrong[[1, 2, 3, 4, 5]] > 0).all()
    for task, rows in ((0, [0, 3]), (1, [1, 4]), (2, [2, 5])):
        alone = Predictions(TASKS[task].kind, np.arange(2), *(
            (PREDICTED[rows, :2], TRUTHS[rows, :2].argmax(axis=1)) if task == 0
            else (PREDICTED[rows, 2:4], TRUTHS[rows, 2:4]) if task == 1
            else (PREDICTED[rows, 4], TRUTHS[rows, 4].astype(np.float64))
        ))  # fmt: skip
        np.testing.assert_array_equal(wrong[rows], badness(alone, alone.scores(TASKS[task].classes)))
    assert set(worst(wrong, 3)) <= {1, 2, 3, 4, 5}


def test_two_models_are_compared_by_task() -> None:
    other = PREDICTED.copy()
    other[3] = [0.25, 0.75, 0.5, 0.5, 0.0]
    one, two = (Result("x", each, each.scores(NAMES), {}) for each in (found(), found(other)))
    result = compared(one, two, NAMES, Options(resamples=50))
    assert set(result) == set(one.scores.values)
    assert abs(result["films/accuracy"].difference) == 0.5
    assert result["stars/mae"].difference == result["tags/f1_micro"].difference == 0
    less = found(rows=slice(1, None))
    fewer = Result("y", less, less.scores(NAMES), {})
    with pytest.raises(ConfigError, match="were not given the same texts"):
        compared(one, fewer, NAMES, Options(resamples=50))


def test_a_model_with_its_outputs_elsewhere_is_refused() -> None:
    """The same names in another order: its probabilities would be read as those of other classes."""

    def fits(kind: str, own: tuple[str, ...], model_kind: str = "several") -> None:
        material: Any = SimpleNamespace(kind=kind, names=NAMES)
        model: Any = SimpleNamespace(kind=model_kind, names=own, path=Path("m"))
        require_fit(material, model)

    fits("several", NAMES)
    for own in ((*NAMES[2:], *NAMES[:2]), (*NAMES[:4], "points/value"), NAMES[:4]):
        with pytest.raises(
            ConfigError, match="m has other tasks or classes than the data, or has them in another order"
        ):
            fits("several", own)
    with pytest.raises(ConfigError, match="m is a classification model, and the data is for several"):
        fits("several", NAMES, "classification")
    # of one task the columns are put in order
    fits("classification", NAMES[::-1], "classification")
