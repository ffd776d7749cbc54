"""Windows of long texts become one prediction a text; predictions become a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.data.labelled import LabelledSamples
from trainer.data.questions import QuestionSamples
from trainer.stages.held_out import write_predictions
from trainer.stages.scoring import Predictions, of_texts

DOCUMENTS = np.array([0, 0, 1, 2, 2, 2])


class Windows(LabelledSamples):
    """Six windows of three texts."""

    def __init__(self) -> None:
        pass

    def document_of(self, ids: np.ndarray) -> np.ndarray:
        return DOCUMENTS[ids]


class Questions(QuestionSamples):
    def __init__(self, answers: list[tuple[str, ...]]):
        self.answers = answers

    def document_of(self, ids: np.ndarray) -> np.ndarray:
        return DOCUMENTS[ids]

    def answers_of(self, sample: int) -> tuple[str, ...]:
        return self.answers[DOCUMENTS[sample]]

    def passage(self, sample: int, first: int, last: int) -> str:
        return f"{sample}:{first}-{last}"


def of(kind: Any, predictions: Any, truths: Any) -> Predictions:
    return Predictions(kind, np.arange(6), predictions, truths)


def test_probabilities_of_windows_are_averaged() -> None:
    probabilities = np.array([[1, 0], [0.5, 0.5], [0.2, 0.8], [0, 1], [0, 1], [0.9, 0.1]])
    found = of_texts(of("classification", probabilities, np.array([0, 0, 1, 1, 1, 1])), Windows())
    assert found.ids.tolist() == [0, 2, 3]
    np.testing.assert_allclose(found.predictions, [[0.75, 0.25], [0.2, 0.8], [0.3, 0.7]])
    assert found.truths.tolist() == [0, 1, 1]


def test_words_of_windows_are_put_together() -> None:
    words = [[1, 2], [3], [4], [5], [], [6]]
    found = of_texts(of("token_classification", words, words), Windows())
    assert found.predictions == [[1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        # all have an answer: the best span of all windows, whatever else they prefer
        ([("a",), ("b",), ("c",)], ["1:4-5", "2:1-1", "3:2-2"]),
        # some have none: none where every window prefers that to the best span of all
        ([("a",), (), ("c",)], ["1:4-5", "", "3:2-2"]),
    ],
)
def test_the_best_answer_of_all_windows(answers: list[tuple[str, ...]], expected: list[str]) -> None:
    spans = [(9.0, 1.0, 2, 3), (0.0, 2.0, 4, 5), (3.0, 2.0, 1, 1), (0.0, 5.0, 2, 2), (9.0, 4.0, 1, 1), (9.0, 0.0, 1, 1)]
    found = of_texts(of("question_answering", spans, [[0, 0]] * 6), Questions(answers))
    assert found.predictions == expected
    assert found.truths == [list(each) for each in answers]


def test_predictions_are_kept_in_a_file(tmp_path: Path) -> None:
    probabilities = np.array([[0.75, 0.25], [0.25, 0.75]])
    found = Predictions("classification", np.array([3, 7]), probabilities, np.array([1, 1]))
    write_predictions(tmp_path / "p.parquet", found, ("no", "yes"), ("a.csv:4", "a.csv:8"), 12)
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.to_pylist() == [
        {"sample": 3, "document": "a.csv:4", "truth": "yes", "prediction": "no", "probabilities": [0.75, 0.25]},
        {"sample": 7, "document": "a.csv:8", "truth": "yes", "prediction": "yes", "probabilities": [0.25, 0.75]},
    ]
    notes = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert (notes["kind"], notes["step"], json.loads(notes["classes"])) == ("classification", "12", ["no", "yes"])
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


@pytest.mark.parametrize(
    ("kind", "predictions", "truths", "row"),
    [
        ("multi_label", np.array([[0.5, 0.1]]), np.array([[0.0, 1.0]]), (["b"], ["a"])),
        ("regression", np.array([0.5]), np.array([0.25]), (0.25, 0.5)),
        ("token_classification", [[0, 1]], [[1, 1]], (["b", "b"], ["a", "b"])),
        ("question_answering", ["x"], [["y", "z"]], ("y", "x")),
    ],
)
def test_rows_of_other_kinds(tmp_path: Path, kind: Any, predictions: Any, truths: Any, row: tuple[Any, Any]) -> None:
    found = Predictions(kind, np.array([0]), predictions, truths)
    write_predictions(tmp_path / "p.parquet", found, ("a", "b"), ("d",), 1)
    (written,) = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert (written["truth"], written["prediction"]) == row
