"""One of several tasks as a model of its own: the shared body and the task's outputs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from trainer.config.objective import Outputs
from trainer.model.heads import SEVERAL
from trainer.model.quiet import without_bars

_PROBLEMS: dict[str, Literal["single_label_classification", "multi_label_classification", "regression"]] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


@torch.no_grad()
def save_task(export: Path, output: Path, task: Outputs) -> None:
    """Write what `pipeline("text-classification")` loads for one task.

    Args:
        export: an exported classifier of all tasks.
        output: directory; made here.
        task: whose outputs are kept.
    """
    with without_bars():
        _save_weights(export, output, task)
    for path in export.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copy(path, output)


def _save_weights(export: Path, output: Path, task: Outputs) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(export, dtype="auto")
    config = AutoConfig.from_pretrained(export)
    names = task.classes if task.kind != "regression" else ("LABEL_0",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = _PROBLEMS[task.kind]
    if hasattr(config, SEVERAL):
        delattr(config, SEVERAL)
    model = type(whole)(config).to(whole.dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # what has a row for each output is of another size, and nothing else
    kept = {
        name: tensor if tensor.shape == shapes[name] else tensor[task.columns]
        for name, tensor in whole.state_dict().items()
    }
    model.load_state_dict(kept)
    output.mkdir(parents=True)
    model.save_pretrained(output)
