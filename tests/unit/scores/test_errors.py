"""Which predictions are called the most wrong."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.scores.errors import badness, worst


def test_of_classes_the_least_probable_truth_comes_first() -> None:
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])
    found = badness("classification", probabilities, np.array([0, 1, 0, 0]))
    assert found.tolist() == pytest.approx([0.0, 0.9, 0.7, 0.55])
    assert worst(found, 2) == [1, 2]
    assert worst(found, 9) == [1, 2, 3]


def test_of_labels_only_the_wrong_ones_count() -> None:
    probabilities = np.array([[0.9, 0.4, 0.2], [0.6, 0.9, 0.1]])
    assert badness("multi_label", probabilities, np.array([[1, 1, 0], [1, 1, 0]])).tolist() == pytest.approx([0.6, 0.0])


def test_of_other_kinds() -> None:
    assert badness("regression", np.array([1.5, 2.0]), np.array([1.0, 4.0])).tolist() == [0.5, 2.0]
    assert badness("token_classification", [[1, 2], [], [0]], [[1, 1], [], [0]]).tolist() == [0.5, 0.0, 0.0]
    exact = np.array([True, False, False])
    assert worst(badness("question_answering", None, None, exact), 5) == [1, 2]
