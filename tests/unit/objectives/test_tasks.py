"""Losses of every kind against their definitions, torch's and transformers' own; what is counted, scored, predicted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from task_examples import CLASSES, KINDS, ROWS, TARGETS, dense, example, in_fp64
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from trainer.config.objective import ObjectiveConfig
from trainer.errors import ConfigError
from trainer.objectives import make_objective
from trainer.objectives.losses import symmetric_binary_kl_sum, symmetric_kl_sum
from trainer.objectives.tasks import balanced_weights
from trainer.records import Classes

SMOOTHED = [kind for kind in KINDS if kind not in ("regression", "question_answering")]
R_DROPPED = [kind for kind in KINDS if kind != "regression"]


def see(_: Tensor) -> None:
    pass


def terms_of(kind: str, tensors: dict[str, Tensor], outputs: Any, **options: Any) -> Any:
    objective = make_objective(ObjectiveConfig(kind=kind, **options))  # type: ignore[arg-type]
    return objective(lambda **_: outputs, tensors, see)


def assert_like(outputs: Any, twin: Any, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for ours, theirs in zip(outputs.leaves, twin.leaves, strict=True):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "smoothing"), [*((kind, 0.0) for kind in KINDS), *((kind, 0.1) for kind in SMOOTHED)])
def test_loss_and_gradient_are_those_of_the_definition(kind: str, smoothing: float, dtype: torch.dtype) -> None:
    tensors, outputs = example(kind, dtype=dtype)
    terms = terms_of(kind, tensors, outputs, label_smoothing=smoothing)
    assert list(terms.sums) == ["loss"]
    assert (terms.total.dtype, terms.total.shape) == (torch.float32, ())
    (terms.total / 7.0).backward()
    twin = in_fp64(outputs)
    expected = dense(kind, tensors, twin, smoothing)
    (expected / 7.0).backward()
    torch.testing.assert_close(terms.total.double(), expected, rtol=3e-6, atol=0)
    assert_like(outputs, twin, dtype)
    for leaf in outputs.leaves:
        assert leaf.grad[ROWS - 1].abs().max() == 0
    if kind == "question_answering":
        assert outputs.start_logits.grad[1, 4:].abs().max() == 0


@pytest.mark.parametrize("kind", ["classification", "token_classification", "causal"])
@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_label_smoothing_is_that_of_torch(kind: str, smoothing: float) -> None:
    tensors, outputs = example(kind)
    terms_of(kind, tensors, outputs, label_smoothing=smoothing).total.backward()
    twin = example(kind)[1]
    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="sum")
    loss(twin.logits.flatten(0, -2), tensors["labels"].flatten()).backward()
    torch.testing.assert_close(outputs.logits.grad, twin.logits.grad, rtol=1e-5, atol=1e-6)


THEIRS = {
    "multi_label": ("ForSequenceClassification", "multi_label_classification"),
    "regression": ("ForSequenceClassification", "regression"),
    "classification": ("ForSequenceClassification", "single_label_classification"),
    "token_classification": ("ForTokenClassification", None),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_means_are_those_of_transformers(kind: str) -> None:
    name, problem = THEIRS[kind]
    tensors, outputs = example(kind)
    # they know no empty places
    present = {key: tensor[: ROWS - 1] for key, tensor in tensors.items()}
    shown = SimpleNamespace(logits=outputs.logits[: ROWS - 1])
    loss = terms_of(kind, present, shown).total / sum(TARGETS[kind])
    loss.backward()
    twin = example(kind)[1]
    config = SimpleNamespace(problem_type=problem, num_labels=1 if kind == "regression" else CLASSES)
    logits = twin.logits[: ROWS - 1]
    if name == "ForTokenClassification":
        theirs = LOSS_MAPPING[name](logits, present["labels"], config)
    else:
        theirs = LOSS_MAPPING[name](present["labels"], logits, config)
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs.logits.grad, twin.logits.grad, rtol=1e-5, atol=1e-7)


def test_answers_without_padding_are_those_of_transformers() -> None:
    tensors, outputs = example("question_answering")
    del tensors["attention_mask"]
    present = {key: tensor[: ROWS - 1] for key, tensor in tensors.items()}
    shown = SimpleNamespace(start_logits=outputs.start_logits[:3], end_logits=outputs.end_logits[:3])
    loss = terms_of("question_answering", present, shown).total / 3
    start, end = present["labels"].unbind(1)
    theirs = LOSS_MAPPING["ForQuestionAnswering"](shown.start_logits, shown.end_logits, start.clone(), end.clone())
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_count_and_score_the_targets_alone(kind: str) -> None:
    tensors, outputs = example(kind)
    plain = make_objective(ObjectiveConfig(kind=kind))  # type: ignore[arg-type]
    hard = {"label_smoothing": 0.2} if kind in SMOOTHED else {}
    if kind in R_DROPPED:
        hard["r_drop"] = 0.5
    trained = make_objective(ObjectiveConfig(kind=kind, **hard))  # type: ignore[arg-type]
    assert plain.targets(tensors).tolist() == TARGETS[kind]
    found = trained.evaluate(lambda **_: outputs, tensors)
    torch.testing.assert_close(found["loss"].double(), dense(kind, tensors, in_fp64(outputs)), rtol=3e-6, atol=0)
    if kind == "regression":
        expected = (outputs.logits[:3, 0] - tensors["labels"][:3]).abs().sum()
        torch.testing.assert_close(found["absolute_error"], expected)
        return
    right = 0
    for row in range(ROWS - 1):
        labels = tensors["labels"][row]
        if kind == "question_answering":
            length = int(tensors["attention_mask"][row].sum())
            ends = [int(each[row, :length].argmax()) for each in (outputs.start_logits, outputs.end_logits)]
            right += ends == labels.tolist()
        elif kind == "multi_label":
            right += (outputs.logits[row] > 0).float().tolist() == labels.tolist()
        else:
            right += int((outputs.logits[row].argmax(-1) == labels).sum())
    assert found["accuracy"] == right


@pytest.mark.parametrize("kind", KINDS)
def test_samples_add_up_to_the_loss(kind: str) -> None:
    tensors, outputs = example(kind)
    options = {"label_smoothing": 0.2} if kind in SMOOTHED else {}
    objective = make_objective(ObjectiveConfig(kind=kind, **options))  # type: ignore[arg-type]
    losses = objective.sample_losses(lambda **_: outputs, tensors)
    assert losses.shape == (ROWS,)
    assert losses[ROWS - 1] == 0
    torch.testing.assert_close(losses.sum(), objective(lambda **_: outputs, tensors, see).sums["loss"])


def test_predictions_are_what_scores_need() -> None:
    def predict(kind: str) -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
        tensors, outputs = example(kind, dtype=torch.bfloat16)
        objective = make_objective(ObjectiveConfig(kind=kind))  # type: ignore[arg-type]
        return tensors, outputs, objective.predict(lambda **_: outputs, tensors)

    for kind in ("classification", "multi_label"):
        tensors, outputs, found = predict(kind)
        assert found.keys() == {"logits", "labels"}
        assert torch.equal(found["logits"], outputs.logits.float())
        assert torch.equal(found["labels"], tensors["labels"])
    _, outputs, found = predict("regression")
    assert torch.equal(found["values"], outputs.logits[:, 0].float())
    tensors, outputs, found = predict("token_classification")
    assert torch.equal(found["predictions"], outputs.logits.argmax(-1))
    assert torch.equal(found["labels"], tensors["labels"])
    tensors, outputs, found = predict("question_answering")
    inside = tensors["attention_mask"] == 1
    for name in ("start_logits", "end_logits"):
        assert torch.equal(found[name][inside], getattr(outputs, name).float()[inside])
        assert found[name][~inside].max() < -1e30
    for kind in ("causal", "seq2seq"):
        tensors, outputs, found = predict(kind)
        assert found["num_targets"].tolist() == TARGETS[kind]
        expected = dense(kind, tensors, in_fp64(outputs))
        torch.testing.assert_close(found["loss"].double().sum(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_weights_weigh_whole_texts_and_average_to_one(smoothing: float) -> None:
    counts = torch.tensor([6, 0, 3, 1, 2])
    weights = balanced_weights(counts)
    assert weights[1] == 0
    torch.testing.assert_close((weights * counts).sum() / counts.sum(), torch.tensor(1.0))
    torch.testing.assert_close((weights * counts)[counts > 0], torch.full((4,), 3.0))
    config = ObjectiveConfig(kind="classification", class_weights="balanced", label_smoothing=smoothing)
    objective = make_objective(config, classes=Classes(tuple("abcde"), 0), class_counts=counts)
    tensors, outputs = example("classification")
    tensors["labels"] = torch.tensor([0, 3, 4, -100])
    objective(lambda **_: outputs, tensors, see).total.backward()
    twin = in_fp64(outputs)
    each = F.cross_entropy(twin.logits[:3], tensors["labels"][:3], reduction="none", label_smoothing=smoothing)
    (each * weights[tensors["labels"][:3]]).sum().backward()
    assert_like(outputs, twin)
    plain = make_objective(ObjectiveConfig(kind="classification")).evaluate(lambda **_: outputs, tensors)
    assert torch.equal(objective.evaluate(lambda **_: outputs, tensors)["loss"], plain["loss"])
    with pytest.raises(ValueError, match="of every class"):
        make_objective(config)
    with pytest.raises(ValueError, match="of every class"):
        make_objective(config, classes=Classes(("a", "b"), 0), class_counts=counts)


def test_z_loss_goes_with_smoothing_and_weights() -> None:
    tensors, outputs = example("classification")
    config = ObjectiveConfig(kind="classification", class_weights="balanced", label_smoothing=0.1, z_loss=0.3)
    counts = torch.tensor([6, 1, 3, 1, 2])
    terms = make_objective(config, class_counts=counts)(lambda **_: outputs, tensors, see)
    terms.total.backward()
    twin = in_fp64(outputs)
    labels = tensors["labels"][:3]
    each = F.cross_entropy(twin.logits[:3], labels, reduction="none", label_smoothing=0.1)
    squared = 0.3 * twin.logits[:3].logsumexp(-1).square().sum()
    ((each * balanced_weights(counts)[labels]).sum() + squared).backward()
    torch.testing.assert_close(terms.sums["z_loss"].double(), squared, rtol=1e-6, atol=0)
    assert_like(outputs, twin)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("regression", {"r_drop": 1.0}, "r_drop"),
        ("regression", {"label_smoothing": 0.1}, "label_smoothing"),
        ("question_answering", {"label_smoothing": 0.1}, "label_smoothing"),
        ("multi_label", {"z_loss": 0.1}, "z_loss"),
        ("multi_label", {"class_weights": "balanced"}, "class_weights"),
        ("causal", {"class_weights": "balanced"}, "class_weights"),
    ],
)
def test_options_without_a_meaning_are_refused(kind: str, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{name}: has no meaning where objective\.kind is {kind}"):
        make_objective(ObjectiveConfig(kind=kind, **options))  # type: ignore[arg-type]


def kl(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """(KL(p‖q) + KL(q‖p)) / 2 of each row from the definition."""
    if kind == "multi_label":
        p, q = (torch.stack([x.sigmoid(), 1 - x.sigmoid()], -1) for x in (p, q))
        return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean(-1) / 2
    p, q = p.softmax(-1), q.softmax(-1)
    return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["classification", "multi_label", "causal"])
def test_symmetric_divergence_is_that_of_the_definition(kind: str, dtype: torch.dtype) -> None:
    (tensors, first), (_, second) = example(kind, dtype=dtype), example(kind, dtype=dtype, seed=3)
    function = symmetric_binary_kl_sum if kind == "multi_label" else symmetric_kl_sum
    value = function(first.logits, second.logits, tensors["labels"])
    (value / 5).backward()
    twins = in_fp64(first), in_fp64(second)
    labels = tensors["labels"][:, 0] if kind == "multi_label" else tensors["labels"]
    expected = kl(kind, twins[0].logits, twins[1].logits).where(labels >= 0, 0.0).sum()
    (expected / 5).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert_like(first, twins[0], dtype)
    assert_like(second, twins[1], dtype)


@pytest.mark.parametrize("kind", R_DROPPED)
def test_r_drop_is_the_mean_of_two_passes_and_their_divergence(kind: str) -> None:
    (tensors, first), (_, second) = example(kind), example(kind, seed=3)
    passes = []

    def model(**inputs: Tensor) -> Any:
        passes.append({name: tensor.shape[0] for name, tensor in inputs.items()})
        both = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in vars(first)
                if name != "leaves"}  # fmt: skip
        return SimpleNamespace(**both)

    objective = make_objective(ObjectiveConfig(kind=kind, r_drop=0.7))  # type: ignore[arg-type]
    assert objective.parts == ("r_drop",)
    assert objective.minimised == ("loss", "r_drop")
    terms = objective(model, tensors, see)
    assert passes == [{"input_ids": 2 * ROWS, "attention_mask": 2 * ROWS}]
    terms.total.backward()
    twins = in_fp64(first), in_fp64(second)
    loss = (dense(kind, tensors, twins[0]) + dense(kind, tensors, twins[1])) / 2
    divergence = torch.zeros((), dtype=torch.float64)
    for row in range(ROWS - 1):
        labels, length = tensors["labels"][row], int(tensors["attention_mask"][row].sum())
        if kind == "question_answering":
            for name in ("start_logits", "end_logits"):
                p, q = (getattr(twin, name)[row, :length] for twin in twins)
                divergence = divergence + kl(kind, p, q) / 2
        else:
            rows = kl(kind, twins[0].logits[row], twins[1].logits[row])
            counted = torch.ones((), dtype=torch.bool) if kind == "multi_label" else labels >= 0
            divergence = divergence + rows.where(counted, 0.0).sum()
    (loss + 0.7 * divergence).backward()
    torch.testing.assert_close(terms.sums["loss"].double(), loss, rtol=3e-6, atol=0)
    torch.testing.assert_close(terms.sums["r_drop"].double(), 0.7 * divergence, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.total, terms.sums["loss"] + terms.sums["r_drop"])
    assert_like(first, twins[0])
    assert_like(second, twins[1])
    torch.testing.assert_close(objective.sample_losses(model, tensors).sum(), terms.sums["loss"])
    assert torch.equal(objective.alone("r_drop")(model, tensors, see).total, terms.sums["r_drop"])
