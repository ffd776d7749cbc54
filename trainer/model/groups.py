"""Parameters of a model → what is decayed and what is spared, and the optimizer's groups."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trainer.config.schema import RunConfig
from trainer.model.depth import distances
from trainer.records import ParameterFacts


def parameter_facts(model: nn.Module, *, decay_embeddings: bool = False) -> tuple[ParameterFacts, ...]:
    """The trainable parameters in `named_parameters` order, tied weights once, with their whole shapes.

    Decay acts on matrices. Spared are biases and everything else with one dimension, norms, the state matrices of
    state-space models (`A_log`), and embeddings (of tokens and of positions, and an output head that is tied to one)
    unless `decay_embeddings`.
    """
    embeddings: set[int] = set()
    exempt: set[int] = set()
    for module in model.modules():
        own = [id(parameter) for parameter in module.parameters(recurse=False)]
        if isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__:
            embeddings.update(own)
        elif "Norm" in type(module).__name__:
            exempt.update(own)

    def decays(name: str, parameter: nn.Parameter) -> bool:
        if len(shape_of(parameter)) < 2 or id(parameter) in exempt or name.endswith(".A_log"):
            return False
        return decay_embeddings or id(parameter) not in embeddings

    return tuple(
        ParameterFacts(name=name, shape=shape_of(parameter), decay=decays(name, parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def parameter_groups(model: PreTrainedModel, config: RunConfig) -> list[dict[str, Any]]:
    """The optimizer's groups, `decay` before `spared`, without empty ones: dicts of `params`, `weight_decay`, `name`.

    With `optim.layer_decay` each of both is cut by depth, from the head to the embeddings, and a group's `lr_scale`,
    layer_decay ^ (layers between it and the head), is a factor on its learning rate (ULMFiT, section 3.1,
    https://arxiv.org/abs/1801.06146). Within a group the order is that of `named_parameters`: the same on every rank
    and in every start.

    Raises:
        ConfigError: layers are to have rates of their own, and are not recognised.
    """
    by_name = dict(model.named_parameters())
    facts = parameter_facts(model, decay_embeddings=config.optim.decay_embeddings)
    factor = config.optim.layer_decay
    below = distances(model) if factor != 1 else {}
    groups: list[dict[str, Any]] = []
    for name, decay, weight_decay in (("decay", True, config.optim.weight_decay), ("spared", False, 0.0)):
        for distance in sorted({below.get(fact.name, 0) for fact in facts}):
            chosen = [fact.name for fact in facts if fact.decay == decay and below.get(fact.name, 0) == distance]
            group = {"name": name, "params": [by_name[each] for each in chosen], "weight_decay": weight_decay}
            if factor != 1:
                group |= {"name": f"{name}-{distance}", "lr_scale": factor**distance}
            groups.append(group)
    return [group for group in groups if group["params"]]


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also where ZeRO-3 keeps a shard only."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
