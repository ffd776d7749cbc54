"""Scores of classes, beside sklearn's, and where texts count several times."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from trainer.scores.classes import classification, multi_label, sigmoid, softmax
from trainer.scores.score import score

NAMES = ("bad", "dull", "good", "never")


def predicted(number: int = 203, classes: int = 3, seed: int = 0, digits: int | None = None) -> tuple[np.ndarray, ...]:
    """Probabilities and truths of which about two thirds fit; `digits`: rounded, so that there are ties."""
    generator = np.random.default_rng(seed)
    truths = generator.integers(0, classes, number)
    logits = generator.normal(size=(number, classes)) + 1.2 * np.eye(classes)[truths]
    probabilities = softmax(logits)
    return (probabilities if digits is None else probabilities.round(digits)), truths


def sklearn_scores(probabilities: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    chosen = probabilities.argmax(axis=1)
    result = {
        "accuracy": metrics.accuracy_score(truths, chosen),
        "f1_micro": metrics.f1_score(truths, chosen, average="micro"),
        "matthews": metrics.matthews_corrcoef(truths, chosen),
    }
    for name, function in (("precision", metrics.precision_score), ("recall", metrics.recall_score)):
        result[f"{name}_macro"] = function(truths, chosen, average="macro", zero_division=0)
    result["f1_macro"] = metrics.f1_score(truths, chosen, average="macro", zero_division=0)
    return result


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_as_sklearn(classes: int) -> None:
    probabilities, truths = predicted(classes=classes)
    found = classification(probabilities, truths, [f"c{n}" for n in range(classes)])
    expected = sklearn_scores(probabilities, truths)
    chosen = probabilities.argmax(axis=1)
    if classes == 2:
        expected["auc"] = metrics.roc_auc_score(truths, probabilities[:, 1])
    else:
        expected["auc"] = metrics.roc_auc_score(truths, probabilities, multi_class="ovr", average="macro")
    expected["log_loss"] = metrics.log_loss(truths, probabilities)
    expected["brier"] = ((probabilities - np.eye(classes)[truths]) ** 2).sum(axis=1).mean()
    ece = found.values.pop("ece")
    assert found.values == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(found.confusion, metrics.confusion_matrix(truths, chosen))
    by_class = metrics.precision_recall_fscore_support(truths, chosen, zero_division=0)
    for number, own in enumerate(found.by_class):
        assert (own.precision, own.recall, own.f1, own.support) == pytest.approx([each[number] for each in by_class])
    # by its definition, bin by bin
    confidence, right = probabilities.max(axis=1), chosen == truths
    by_hand = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            by_hand += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert ece == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_texts_that_count_several_times(classes: int) -> None:
    """A text that counts k times is k texts: what bootstrap values rest on. With ties."""
    probabilities, truths = predicted(60, classes, digits=1)
    names = NAMES[:classes]
    counts = np.random.default_rng(3).integers(0, 4, (5, 60))
    found = classification(probabilities, truths, names).measure(counts.astype(float))
    for row, each in enumerate(counts):
        again = classification(np.repeat(probabilities, each, axis=0), np.repeat(truths, each), names)
        assert {name: value[row] for name, value in found.items()} == pytest.approx(again.values, rel=1e-12)


def test_a_class_that_does_not_occur_is_said() -> None:
    probabilities, truths = predicted(classes=3)
    with_never = np.concatenate([probabilities, np.zeros((len(truths), 1))], axis=1)
    found = classification(with_never, truths, NAMES)
    assert found.values["f1_macro"] == classification(probabilities, truths, NAMES[:3]).values["f1_macro"]
    assert found.values["auc"] == pytest.approx(
        metrics.roc_auc_score(truths, probabilities, multi_class="ovr", average="macro"), rel=1e-12
    )
    assert found.notes == {
        "auc": "leaves out: there are not texts both in and out of never",
        "f1_macro": "leaves out what is neither true of a text nor predicted: never",
    }


def test_one_class_alone_has_no_area() -> None:
    probabilities, _ = predicted(9, 2)
    found = classification(probabilities, np.zeros(9, dtype=np.int64), ("a", "b"))
    assert np.isnan(found.values["auc"])
    assert found.values["matthews"] == 0
    assert found.notes["auc"].startswith("is not defined")


def test_perfect_and_worst() -> None:
    truths = np.arange(4).repeat(5)
    best = classification(np.eye(4)[truths], truths, NAMES).values
    assert best == pytest.approx(dict.fromkeys(best, 1.0) | {"ece": 0, "brier": 0, "log_loss": 0})
    worst = classification(np.eye(4)[(truths + 1) % 4], truths, NAMES).values
    assert (worst["accuracy"], worst["ece"], worst["brier"], worst["f1_macro"]) == (0, 1, 2, 0)


@pytest.mark.parametrize(
    ("probabilities", "truths", "text"),
    [
        (np.full((2, 2), 0.5), np.array([0, 2]), "a class is 0 … 2, and there are 2"),
        (np.full((2, 3), 0.5), np.array([0, 1]), "do not fit"),
        (np.array([[np.nan, 1.0]]), np.array([0]), "not a finite number"),
        (np.zeros((0, 2)), np.zeros(0, dtype=np.int64), "there is no text"),
    ],
)
def test_refuses(probabilities: np.ndarray, truths: np.ndarray, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        score("classification", probabilities, truths, ("a", "b"))


def labels_of(number: int = 120, seed: int = 1, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truths = (generator.random((number, 4)) < [0.5, 0.2, 0.1, 0.6]).astype(np.float64)
    return sigmoid(generator.normal(size=(number, 4)) + 2 * truths - 1).round(digits), truths


def test_several_labels_as_sklearn() -> None:
    probabilities, truths = labels_of()
    # one text without any label, true or predicted
    probabilities[5], truths[5] = 0.1, 0
    chosen = probabilities >= 0.5
    found = multi_label(probabilities, truths, NAMES)
    expected = {"exact_match": metrics.accuracy_score(truths, chosen)}
    for average in ("micro", "macro"):
        values = metrics.precision_recall_fscore_support(truths, chosen, average=average, zero_division=0)
        expected |= {f"{n}_{average}": v for n, v in zip(("precision", "recall", "f1"), values, strict=False)}
    expected["f1_samples"] = metrics.f1_score(truths, chosen, average="samples", zero_division=0)
    expected["auc"] = metrics.roc_auc_score(truths, probabilities, average="macro")
    expected["mean_average_precision"] = metrics.average_precision_score(truths, probabilities, average="macro")
    assert found.values == pytest.approx(expected, rel=1e-12)


def test_several_labels_that_count_several_times() -> None:
    probabilities, truths = labels_of(50, digits=1)
    counts = np.random.default_rng(3).integers(0, 4, (4, 50))
    found = multi_label(probabilities, truths, NAMES).measure(counts.astype(float))
    for row, each in enumerate(counts):
        again = multi_label(np.repeat(probabilities, each, axis=0), np.repeat(truths, each, axis=0), NAMES)
        assert {name: value[row] for name, value in found.items()} == pytest.approx(again.values, rel=1e-12)


def test_probabilities_of_large_logits() -> None:
    np.testing.assert_array_equal(softmax(np.array([[1e4, 0.0], [-1e4, -1e4]])), [[1, 0], [0.5, 0.5]])
    np.testing.assert_array_equal(sigmoid(np.array([-1e4, 0.0, 1e4])), [0, 0.5, 1])


def test_a_class_that_is_predicted_and_never_true_counts() -> None:
    truths, chosen = np.array([0, 0, 1]), np.array([0, 2, 1])
    found = classification(np.eye(3)[chosen], truths, NAMES[:3])
    assert found.values["f1_macro"] == pytest.approx(metrics.f1_score(truths, chosen, average="macro"))
    assert found.values["recall_macro"] == pytest.approx(0.5)


def test_the_upper_edge_of_a_bin_belongs_to_it() -> None:
    found = classification(np.array([[0.6, 0.4], [0.62, 0.38]]), np.array([0, 1]), ("a", "b"))
    assert found.values["ece"] == pytest.approx((0.4 + 0.62) / 2)
