"""Texts looked into, for `trimtab evaluate --look`: the worst errors, or those that are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config.objective import TEXTS
from trainer.errors import ConfigError
from trainer.insight.attention import attention_maps
from trainer.insight.saliency import Saliency, integrated_gradients
from trainer.report.inside import Inside, write_page
from trainer.stages.any_model import AnyModel


def look(model: AnyModel, texts: Sequence[tuple[str, str]], path: Path, title: str) -> None:
    """Write a page about texts.

    Args:
        texts: (heading, text).

    Raises:
        ConfigError: a kind of model whose prediction is not one number or class a text.
    """
    if model.kind not in TEXTS:
        raise ConfigError([("", f"--look is for models of whole texts ({', '.join(TEXTS)}), not {model.kind}")])
    write_page(path, title, [_inside(model, heading, text) for heading, text in texts])


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
