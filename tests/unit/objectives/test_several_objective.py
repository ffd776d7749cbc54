"""Several tasks at once against each task's loss written with torch alone, in double precision, one text at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.objective import ObjectiveConfig, TaskConfig
from trainer.errors import ConfigError
from trainer.objectives import make_objective
from trainer.objectives.objective import of_kind
from trainer.records import Classes

TASKS = (
    TaskConfig(name="films", kind="classification", weight=0.7),
    TaskConfig(name="tags", kind="multi_label", weight=1.5),
    TaskConfig(name="stars", kind="regression", weight=2.25),
    TaskConfig(name="topics", kind="classification"),
)
COLUMNS = {"films": slice(0, 3), "tags": slice(3, 7), "stars": slice(7, 8), "topics": slice(8, 10)}
NAMES = (
    *(f"films/{name}" for name in "abc"),
    *(f"tags/{name}" for name in "abcd"),
    "stars/value",
    *(f"topics/{name}" for name in ("x/y", "z")),
)
CLASSES = Classes(NAMES, 0)
ROWS = ("films", "tags", "stars", None, "topics", "films", "tags", "stars")
"""Whose each text is; None: an empty place."""


def labels_of(rows: tuple[str | None, ...] = ROWS, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((len(rows), len(NAMES)), torch.nan)
    for row, task in enumerate(rows):
        if task is None:
            continue
        own = COLUMNS[task]
        width = own.stop - own.start
        if task == "stars":
            labels[row, own] = torch.randn(1, generator=generator)
        elif task == "tags":
            labels[row, own] = torch.randint(0, 2, (width,), generator=generator).float()
        else:
            labels[row, own] = torch.eye(width)[torch.randint(0, width, (), generator=generator)]
    return labels


def logits_of(rows: int = len(ROWS), dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return (3 * torch.randn(rows, len(NAMES), generator=generator)).to(dtype).requires_grad_()


def dense(logits: Tensor, labels: Tensor, rows: tuple[str | None, ...], smoothing: float = 0.0) -> Tensor:
    """[texts]: 0 where there is none."""
    weights, result = {task.name: task.weight for task in TASKS}, []
    for x, y, task in zip(logits.double(), labels.double(), rows, strict=True):
        if task is None:
            result.append(torch.zeros((), dtype=torch.float64))
            continue
        x, y = x[COLUMNS[task]], y[COLUMNS[task]]
        if task == "stars":
            loss = (x - y).square().sum()
        elif task == "tags":
            loss = F.binary_cross_entropy_with_logits(x, y * (1 - smoothing) + smoothing / 2)
        else:
            loss = F.cross_entropy(x, y.argmax(), label_smoothing=smoothing)
        result.append(weights[task] * loss)
    return torch.stack(result)


def objective_of(**options: Any) -> Any:
    return make_objective(ObjectiveConfig(kind="several", tasks=TASKS, **options), classes=CLASSES)


def call(objective: Any, logits: Tensor, labels: Tensor) -> Any:
    return objective(
        lambda **_: SimpleNamespace(logits=logits), {"input_ids": logits, "labels": labels}, lambda _: None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_each_task(smoothing: float, dtype: torch.dtype) -> None:
    logits, labels = logits_of(dtype=dtype), labels_of()
    terms = call(objective_of(label_smoothing=smoothing), logits, labels)
    assert list(terms.sums) == ["loss"]
    assert (terms.total.dtype, terms.total.shape) == (torch.float32, ())
    (terms.total / 7.0).backward()
    twin = logits.detach().double().requires_grad_()
    expected = dense(twin, labels, ROWS, smoothing).sum()
    (expected / 7.0).backward()
    torch.testing.assert_close(terms.total.double(), expected, rtol=3e-6, atol=0)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(logits.grad.double(), twin.grad, rtol=tolerance, atol=tolerance)
    # a text moves its own task's outputs only
    for row, task in enumerate(ROWS):
        others = torch.ones(len(NAMES), dtype=torch.bool)
        others[COLUMNS[task] if task else slice(0, 0)] = False
        assert (logits.grad[row, others] == 0).all()
        assert task is None or (logits.grad[row, ~others] != 0).all()


@pytest.mark.parametrize("missing", COLUMNS)
def test_a_task_that_a_batch_lacks_has_no_gradient(missing: str) -> None:
    rows = tuple(task for task in ROWS if task != missing)
    logits, labels = logits_of(len(rows)), labels_of(rows)
    total = call(objective_of(label_smoothing=0.1), logits, labels).total
    total.backward()
    assert logits.grad is not None
    assert (logits.grad[:, COLUMNS[missing]] == 0).all()
    torch.testing.assert_close(total.double(), dense(logits.detach(), labels, rows, 0.1).sum(), rtol=3e-6, atol=0)


def test_a_batch_without_any_text_is_nothing_and_has_a_gradient() -> None:
    """All ranks compute the same graph: one whose places are all empty takes part in the backward pass."""
    logits = logits_of(2)
    total = call(objective_of(), logits, labels_of((None, None))).total
    assert total.item() == 0
    total.backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_an_empty_place_is_no_target() -> None:
    objective, labels = objective_of(), labels_of()
    assert objective.targets({"labels": labels}).tolist() == [int(task is not None) for task in ROWS]
    logits = logits_of().detach()
    whole = call(objective, logits, labels).total
    present = [row for row, task in enumerate(ROWS) if task is not None]
    torch.testing.assert_close(whole, call(objective, logits[present], labels[present]).total, rtol=1e-6, atol=0)


def test_the_loss_of_each_text() -> None:
    logits, labels = logits_of().detach(), labels_of()
    tensors = {"input_ids": logits, "labels": labels}
    found = objective_of(label_smoothing=0.1).sample_losses(lambda **_: SimpleNamespace(logits=logits), tensors)
    torch.testing.assert_close(found.double(), dense(logits, labels, ROWS, 0.1), rtol=3e-6, atol=0)


def test_evaluations_are_without_smoothing_and_with_weights() -> None:
    logits, labels = logits_of().detach(), labels_of()
    tensors = {"input_ids": logits, "labels": labels}
    found = objective_of(label_smoothing=0.3).evaluate(lambda **_: SimpleNamespace(logits=logits), tensors)
    assert found.keys() == {"loss"}
    torch.testing.assert_close(found["loss"].double(), dense(logits, labels, ROWS).sum(), rtol=3e-6, atol=0)
    predicted = objective_of().predict(lambda **_: SimpleNamespace(logits=logits.bfloat16()), tensors)
    assert torch.equal(predicted["logits"], logits.bfloat16().float())
    torch.testing.assert_close(predicted["labels"], labels, rtol=0, atol=0, equal_nan=True)


def test_tasks_are_found_by_the_names_of_the_outputs() -> None:
    """Whatever the order in which the config names them."""
    logits, labels = logits_of().detach(), labels_of()
    backwards = ObjectiveConfig(kind="several", tasks=TASKS[::-1])
    assert torch.equal(of_kind(backwards, NAMES).loss(logits, labels), call(objective_of(), logits, labels).total)
    with pytest.raises(
        ValueError, match="the outputs are of the tasks films, tags, stars, topics, and the tasks are films"
    ):
        of_kind(ObjectiveConfig(kind="several", tasks=TASKS[:2]), NAMES)
    with pytest.raises(ValueError, match="the outputs are of the tasks , and the tasks are films"):
        make_objective(ObjectiveConfig(kind="several", tasks=TASKS))


@pytest.mark.parametrize("option", [{"r_drop": 0.5}, {"z_loss": 0.1}, {"class_weights": "balanced"}])
def test_what_means_nothing_for_several_is_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=rf"objective\.{name}: has no meaning where objective\.kind is several"):
        objective_of(**option)
