"""Texts looked into, for `trimtab evaluate --look`: the worst errors, or those that are given."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config.objective import TEXTS
from trainer.errors import ConfigError
from trainer.insight.attention import attention_maps
from trainer.insight.saliency import Saliency, integrated_gradients
from trainer.report.inside import DPI, Inside, attention_figure, write_page
from trainer.stages.any_model import AnyModel
from trainer.telemetry.events import EventFile
from trainer.telemetry.heatmap import to_picture
from trainer.telemetry.tensorboard import plain

BOARD = "inside"
"""Folder of what was looked into, beside the other event files of a run."""
_KINDS = tuple(kind for kind in TEXTS if kind != "several")
_BAR = 20
"""Characters of the longest bar."""


def look(
    model: AnyModel, texts: Sequence[tuple[str, str]], path: Path, title: str, tensorboard: Path | None = None
) -> None:
    """Write a page about texts.

    Args:
        texts: (heading, text).
        tensorboard: folder of a run's event files, to which the same is added; None: none.

    Raises:
        ConfigError: a kind of model whose prediction is not one number or class a text.
    """
    if model.kind not in _KINDS:
        each = "; of several tasks look into one: EXPORT/tasks/NAME" if model.kind == "several" else ""
        raise ConfigError([("", f"--look is for models of whole texts ({', '.join(_KINDS)}), not {model.kind}{each}")])
    found = [_inside(model, heading, text) for heading, text in texts]
    write_page(path, title, found)
    if tensorboard is not None:
        _add_to_board(tensorboard / BOARD, found)


def _add_to_board(folder: Path, texts: Sequence[Inside]) -> None:
    """A card and a picture of each text; those of an earlier look go."""
    shutil.rmtree(folder, ignore_errors=True)
    events, now = EventFile(folder), time.time()
    for number, text in enumerate(texts, 1):
        events.text(f"5 inside/{number}", _card(text), 0, now)
        if text.attention is not None:
            events.image(f"5 inside/{number} attention", to_picture(attention_figure(text.attention), DPI), 0, now)
    events.close()


def _card(text: Inside) -> str:
    """Markdown: a row a token, with what it adds."""
    lines = [f"**{plain(text.heading)}**", "", text.note]
    if text.saliency is not None:
        largest = max(float(np.abs(text.saliency).max()), 1e-12)
        lines += ["", "| token | adds |  |", "| --- | ---: | --- |"]
        for token, value in zip(text.tokens, text.saliency.tolist(), strict=True):
            lines.append(f"| {plain(token)} | {value:+.4f} | {'█' * round(abs(value) / largest * _BAR)} |")
    return "\n".join(lines)


def _inside(model: AnyModel, heading: str, text: str) -> Inside:
    found = model.tokenizer(text, truncation=True, max_length=model.length, return_tensors="pt")
    ids: list[int] = found["input_ids"][0].tolist()
    inputs: dict[str, Tensor] = {name: each.to(model.device) for name, each in found.items()}
    special = set(model.tokenizer.all_special_ids)
    ordinary = torch.tensor([each not in special for each in ids])
    predicted, name, spoken = _predicted(model, inputs)

    def output(outputs: Any) -> Tensor:
        scores: Tensor = outputs.logits.float()
        return (scores.log_softmax(-1) if model.kind == "classification" else scores)[:, predicted]

    saliency: Saliency = integrated_gradients(
        model.model, inputs, output, baseline_id=_baseline(model), ordinary=ordinary
    )
    note = (
        f"{spoken}; {name} {saliency.value:.4f}, without content {saliency.baseline:.4f}; "
        f"the tokens add {float(saliency.tokens.sum()):+.4f} (missed by the sum: {saliency.gap:.4f})"
    )
    tokens = tuple(_spelled(model.tokenizer, ids))
    return Inside(heading, tokens, saliency.tokens, note, attention_maps(model.model, inputs))


def _predicted(model: AnyModel, inputs: dict[str, Tensor]) -> tuple[int, str, str]:
    """Number of the output that is explained, what it is, and a clause about it."""
    with torch.no_grad():
        logits = model.model(**inputs).logits[0].float()
    best = int(logits.argmax())
    if model.kind == "regression":
        return 0, "value", "predicted as a number"
    if model.kind == "multi_label":
        probability = float(logits[best].sigmoid())
        return best, "logit", f"most probable: {model.names[best]} ({probability:.1%})"
    return best, "log-probability", f"predicted: {model.names[best]} ({float(logits.softmax(-1)[best]):.1%})"


def _baseline(model: AnyModel) -> int:
    tokenizer = model.tokenizer
    known = (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return int(next((each for each in known if each is not None), 0))


def _spelled(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as it is read."""
    return [tokenizer.decode([each]).strip() or tokenizer.convert_ids_to_tokens(each) for each in ids]
