"""The model writes: the ends of samples, token by token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer.terms import Model


@torch.no_grad()
def write_ends(
    model: PreTrainedModel,
    call: Model,
    ids: Tensor,
    *,
    tokens: int,
    temperature: float,
    end: int,
    positions: Tensor | None = None,
) -> Tensor:
    """Samples whose last `tokens` tokens the model draws itself, one forward pass a token; dropout is off.

    Random numbers come from torch's default generator of the device: seeded by the caller, the result is a function of
    weights and input. A collective where the model is sharded: all ranks write equally many tokens.

    Args:
        call: what runs `model`: the model, or DeepSpeed's engine around it.
        ids: [n, L] int64; what comes before the last `tokens` is the prompt, at least one token.
        temperature: of the drawing.
        end: end-of-text, after which positions begin again at 0.
        positions: [n, L] int64, of the prompt; None: the model is given none.

    Returns:
        [n, L] int64.
    """
    was_training, length = model.training, ids.shape[1]
    model.train(False)
    written = ids.clone()
    cache = DynamicCache(config=model.config)
    first = length - tokens
    fed, place = written[:, :first], None if positions is None else positions[:, :first]
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    for column in range(first, length):
        extra: dict[str, Any] = {} if place is None else {"position_ids": place}
        if last_only:
            extra["logits_to_keep"] = 1
        outputs = call(
            input_ids=fed,
            attention_mask=torch.ones_like(written[:, :column]),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        probabilities = torch.softmax(outputs.logits[:, -1].float() / temperature, -1)
        chosen = torch.multinomial(probabilities, 1)
        if place is not None:
            place = torch.where(fed[:, -1:] == end, 0, place[:, -1:] + 1)
        written[:, column], fed = chosen[:, 0], chosen
    model.train(was_training)
    return written
