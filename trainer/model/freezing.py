"""Which parameters are trained: all, or without those that are frozen, or low-rank adapters only."""

from __future__ import annotations

import difflib
import re
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.model.adapters import attach_adapters, plain_name
from trainer.model.depth import distances
from trainer.model.projections import is_projection

_LAYERS = re.compile(r"layers:(\d+)")


def choose_trained(
    model: PreTrainedModel, config: RunConfig, *, zero3: dict[str, Any] | None = None, dtype: torch.dtype
) -> None:
    """Attach the adapters of `model.lora`, and take what `optim.freeze` names from what is trained: `requires_grad`
    says the result. Nothing is done for runs that train everything.

    Args:
        zero3: the DeepSpeed configuration when parameters are sharded: a collective then.

    Raises:
        ConfigError: a name or a pattern matches nothing, or nothing would be trained.
    """
    if config.model.lora is not None:
        attach_adapters(model, config, zero3=zero3, dtype=dtype)
    if config.optim.freeze:
        _freeze(model, config.optim.freeze)


def is_partly_frozen(config: RunConfig) -> bool:
    """Whether a run has weights that it does not train."""
    return config.model.lora is not None or bool(config.optim.freeze)


def _freeze(model: PreTrainedModel, patterns: tuple[str, ...]) -> None:
    everything = dict(model.named_parameters(remove_duplicate=False))
    for place, pattern in enumerate(patterns):
        for name in _matching(model, list(everything), pattern, f"optim.freeze.{place}"):
            everything[name].requires_grad_(False)
    # projections to a teacher alone would teach the model nothing
    if not any(parameter.requires_grad for name, parameter in everything.items() if not is_projection(name)):
        raise ConfigError([("optim.freeze", "leaves nothing to train; freeze less")])


def _matching(model: PreTrainedModel, names: list[str], pattern: str, path: str) -> list[str]:
    if pattern.startswith("layers:"):
        match = _LAYERS.fullmatch(pattern)
        below = distances(model)
        deepest = max(below.values())
        if match is None or int(match[1]) > deepest - 1:
            text = f"{pattern!r} is not layers:N with N from 0 to {deepest - 1}, the layers of {type(model).__name__}"
            raise ConfigError([(path, text)])
        return [name for name in names if below.get(name, 0) >= deepest - int(match[1])]
    chosen = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(plain_name(name), pattern)]
    if not chosen:
        text = f"{pattern!r} matches no parameter of {type(model).__name__}; the nearest is {_nearest(pattern, names)}"
        raise ConfigError([(path, text)])
    return chosen


def _nearest(pattern: str, names: list[str]) -> str:
    plain = sorted({plain_name(name) for name in names})
    return (difflib.get_close_matches(pattern.rstrip(".*"), plain, n=1, cutoff=0.0) or plain)[0]
