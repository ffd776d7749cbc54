"""How far each parameter lies from the head, in layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from trainer.errors import ConfigError
from trainer.model.capture import find_layers


def distances(model: PreTrainedModel) -> dict[str, int]:
    """Layers from the head down to each parameter, by its name: the head and what comes behind the last layer 0, the
    last layer 1, the first one as many as there are, embeddings (and what comes before the first layer) one more.

    In encoder–decoder models each of the two stacks counts its own layers.

    Raises:
        ConfigError: the layers are not recognised.
    """
    stacks = _stacks(model)
    deepest = 1 + max(len(layers) for _, layers in stacks)
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    result: dict[str, int] = {}
    reached: set[str] = set()
    for name, parameter in model.named_parameters():
        place = next((place for place in stacks if name.startswith(f"{place[0]}.")), None)
        if place is not None:
            path, layers = place
            reached.add(path)
            result[name] = len(layers) - int(name.removeprefix(f"{path}.").split(".")[0])
        else:
            embeds = id(parameter) in tables or "embedding" in name.lower()
            result[name] = deepest if embeds or not _comes_behind(name, reached, stacks) else 0
    return result


def _stacks(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """(name, blocks) of each stack of layers, in order: two in encoder–decoder models."""
    if not getattr(model.config, "is_encoder_decoder", False):
        layers = find_layers(model)
        return [(_name(model, layers), layers)]
    base = getattr(model, model.base_model_prefix, model)
    lists = [
        next(
            (module for module in getattr(base, name, nn.Module()).modules() if isinstance(module, nn.ModuleList)), None
        )
        for name in ("encoder", "decoder")
    ]
    found = [layers for layers in lists if layers is not None]
    if len(found) < len(lists):
        raise ConfigError([("model", f"the layers of {type(model).__name__} are not recognised")])
    return [(_name(model, layers), layers) for layers in found]


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(str(name) for name, each in model.named_modules() if each is module)


def _comes_behind(name: str, reached: set[str], stacks: list[tuple[str, nn.ModuleList]]) -> bool:
    """Whether a parameter outside of the layers comes behind those of its own stack; outside of all stacks: behind any.

    Models register what they compute first before what they compute last.
    """
    owners = [path for path, _ in stacks if name.startswith(f"{path.rpartition('.')[0]}.")]
    # the innermost: in models with one stack the base, in those with two the encoder or the decoder
    longest = max((len(path.rpartition(".")[0]) for path in owners), default=0)
    own = [path for path in owners if len(path.rpartition(".")[0]) == longest]
    return any(path in reached for path in own) if own else bool(reached)
