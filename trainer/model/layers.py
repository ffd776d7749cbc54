"""A smaller model from some of the layers of a pretrained one: its configuration, and what must hold for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from trainer.config.layers import chosen_layers
from trainer.errors import ConfigError
from trainer.model.capture import find_layers
from trainer.model.groups import shape_of

_INDICES = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
"""Fields that list layers by their numbers."""
_THRESHOLDS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "moe_layer_start_index")
"""Fields that say how many layers from the first on are of another kind than the rest."""


def kept_layers(text: str, source: PreTrainedConfig) -> tuple[int, ...]:
    """The layers of `source` that `model.layers` names, from 0.

    Raises:
        ConfigError: it does not name layers of this model.
    """
    number = getattr(source.get_text_config(), "num_hidden_layers", None)
    if not isinstance(number, int):
        raise ConfigError([("model.layers", f"a configuration of type {source.model_type} does not say its layers")])
    try:
        return chosen_layers(text, number)
    except ValueError as error:
        raise ConfigError([("model.layers", str(error))]) from error


def cut_configuration(source: PreTrainedConfig, kept: tuple[int, ...]) -> PreTrainedConfig:
    """The configuration of a model of these layers of `source`, each as it was; `source` stays as it is.

    Lists with one entry a layer are cut, lists of layer numbers are renumbered, and numbers of first layers count those
    that are kept.
    """
    result = copy.deepcopy(source)
    config = result.get_text_config()
    number = config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if name in _INDICES and isinstance(value, list | tuple):
            changes[name] = [kept.index(layer) for layer in value if layer in kept]
        elif name in _THRESHOLDS and isinstance(value, int):
            changes[name] = sum(layer < value for layer in kept)
        elif isinstance(value, list) and len(value) == number and not name.endswith("token_id"):
            changes[name] = [value[layer] for layer in kept]
    for name, value in changes.items():
        setattr(config, name, value)
    return result


def check_places(source: PreTrainedModel, model: PreTrainedModel, kept: tuple[int, ...]) -> None:
    """Refuse layers that are not the same at their new places: what a layer is may depend on its number.

    Args:
        source: the whole model, without values.
        model: that of :func:`cut_configuration`, without values.

    Raises:
        ConfigError: a layer, or something outside of the layers, differs.
    """
    blocks, new_blocks = find_layers(source), find_layers(model)
    for new, old in enumerate(kept):
        before, after = dict(blocks[old].named_modules()), dict(new_blocks[new].named_modules())
        if before.keys() != after.keys():
            raise _another(old, new, model, ", ".join(sorted(before.keys() ^ after.keys())[:3]))
        for name in before:
            if difference := _difference(before[name], after[name], old, new):
                raise _another(old, new, model, f"{name}.{difference}".lstrip("."))
    inside = (f"{layers_path(source)}.", f"{layers_path(model)}.")
    shapes, new_shapes = (
        {name: shape_of(parameter) for name, parameter in each.named_parameters() if not name.startswith(inside)}
        for each in (source, model)
    )
    if shapes != new_shapes:
        wrong = sorted(name for name, shape in {**shapes, **new_shapes}.items() if new_shapes.get(name) != shape)
        raise ConfigError(
            [
                (
                    "model.layers",
                    f"{wrong[0]} of {type(model).__name__} depends on the number of layers; keep all of them",
                )
            ]
        )


def layers_path(model: nn.Module) -> str:
    """Name of the list of blocks within the model."""
    layers = find_layers(model)
    return next(str(name) for name, module in model.named_modules() if module is layers)


def renaming(source: PreTrainedModel, kept: tuple[int, ...]) -> Callable[[str], str | None]:
    """Name of a tensor in the whole model, or in a checkpoint of it or of its base → its name in the smaller one; None:
    of a layer that is left out."""
    path = layers_path(source).removeprefix(f"{source.base_model_prefix}.")
    number = re.compile(rf"^((?:.*?\.)?{re.escape(path)}\.)(\d+)(\..*)$")
    places = {str(old): str(new) for new, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        match = number.match(name)
        if match is None:
            return name
        place = places.get(match[2])
        return None if place is None else f"{match[1]}{place}{match[3]}"

    return rename


def _difference(before: nn.Module, after: nn.Module, old: int, new: int) -> str | None:
    """Name of what differs in the two modules themselves, their own numbers aside."""
    if type(before) is not type(after):
        return "class"
    ours, theirs = (
        {
            **{name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)},
            **{name: shape_of(parameter) for name, parameter in module.named_parameters(recurse=False)},
        }
        for module in (before, after)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        is_place = isinstance(a, int) and isinstance(b, int) and "layer" in name and a - old == b - new
        if a != b and not is_place:
            return name
    return None


def _another(old: int, new: int, model: PreTrainedModel, what: str) -> ConfigError:
    return ConfigError(
        [
            (
                "model.layers",
                f"layer {old} of {type(model).__name__} would be another one in place {new} ({what} differs there); "
                "choose layers that keep the pattern of the model",
            )
        ]
    )
