"""A micro-batch of each kind with the outputs of a model for it: unequal targets, and an empty place at the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

KINDS = (
    "causal",
    "masked",
    "seq2seq",
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
)
ROWS, COLUMNS, CLASSES = 4, 6, 5


def example(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 2) -> tuple[dict[str, Tensor], Any]:
    """(tensors, outputs): the outputs' tensors are leaves that take a gradient; `outputs.leaves` lists them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    def classes(*shape: int) -> Tensor:
        return torch.randint(0, CLASSES, shape, generator=generator)

    lengths = torch.tensor([6, 4, 5, 3])
    mask = torch.arange(COLUMNS) < lengths[:, None]
    tensors = {"input_ids": classes(ROWS, COLUMNS), "attention_mask": mask.long()}
    if kind == "question_answering":
        labels = torch.tensor([[1, 4], [0, 0], [2, 2], [-100, -100]])
        start, end = draw(ROWS, COLUMNS), draw(ROWS, COLUMNS)
        return {**tensors, "labels": labels}, SimpleNamespace(start_logits=start, end_logits=end, leaves=[start, end])
    if kind == "regression":
        labels, logits = torch.tensor([1.5, -2.0, 0.25, torch.nan]), draw(ROWS, 1)
    elif kind == "multi_label":
        labels, logits = (classes(ROWS, CLASSES) % 2).float(), draw(ROWS, CLASSES)
        labels[3] = -100
    elif kind == "classification":
        labels, logits = classes(ROWS), draw(ROWS, CLASSES)
        labels[3] = -100
    else:
        labels, logits = classes(ROWS, COLUMNS).where(mask, -100), draw(ROWS, COLUMNS, CLASSES)
        labels[1, 1:3] = -100
        labels[3] = -100
    return {**tensors, "labels": labels}, SimpleNamespace(logits=logits, leaves=[logits])


TARGETS = {
    **{kind: [6, 2, 5, 0] for kind in ("causal", "masked", "seq2seq", "token_classification")},
    **{kind: [1, 1, 1, 0] for kind in ("classification", "multi_label", "regression", "question_answering")},
}


def dense(kind: str, tensors: dict[str, Tensor], outputs: Any, smoothing: float = 0.0) -> Tensor:
    """The loss from its definition in fp64, summed over the targets; one target at a time."""
    labels, total = tensors["labels"], torch.zeros((), dtype=torch.float64)

    def cross_entropy(x: Tensor, label: int) -> Tensor:
        wanted = torch.full(x.shape, smoothing / len(x), dtype=torch.float64)
        wanted[label] += 1 - smoothing
        return -(wanted * (x - x.exp().sum().log())).sum()

    for row in range(ROWS - 1):
        if kind == "question_answering":
            length = int(tensors["attention_mask"][row].sum())
            for x, label in zip((outputs.start_logits, outputs.end_logits), labels[row].tolist(), strict=True):
                total = total + cross_entropy(x[row, :length], label) / 2
        elif kind == "regression":
            total = total + (outputs.logits[row, 0] - float(labels[row])) ** 2
        elif kind == "multi_label":
            for x, label in zip(outputs.logits[row], labels[row].tolist(), strict=True):
                wanted = label * (1 - smoothing) + smoothing / 2
                p = 1 / (1 + (-x).exp())
                total = total - (wanted * p.log() + (1 - wanted) * (1 - p).log()) / CLASSES
        elif kind == "classification":
            total = total + cross_entropy(outputs.logits[row], int(labels[row]))
        else:
            for x, label in zip(outputs.logits[row], labels[row].tolist(), strict=True):
                if label >= 0:
                    total = total + cross_entropy(x, label)
    return total


def in_fp64(outputs: Any) -> Any:
    """The same outputs as leaves of their own in double precision."""
    named = {name: t.detach().double().requires_grad_() for name, t in vars(outputs).items() if name != "leaves"}
    return SimpleNamespace(**named, leaves=list(named.values()))
