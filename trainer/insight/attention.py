"""What each head attends to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.records import FloatArray


def attention_maps(model: Any, inputs: Mapping[str, Tensor]) -> FloatArray:
    """Attention of one text, [layers, heads, L, L]; rows attend to columns and sum to 1. Of encoder–decoder models that
    of the encoder.

    Raises:
        ConfigError: the architecture does not tell.
    """
    with _eager(model), torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    layers = getattr(outputs, "encoder_attentions", None) or getattr(outputs, "attentions", None)
    if not layers or layers[0] is None:
        raise ConfigError([("", f"{type(model).__name__} does not give its attention")])
    return np.stack([layer[0].float().cpu().numpy() for layer in layers])


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Fused kernels never hold the probabilities."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
