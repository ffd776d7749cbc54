"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685), by peft: attached, merged, and written as peft does."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.model.initialise import seed_of
from trainer.model.projections import NAME as PROJECTIONS
from trainer.model.projections import is_projection

ADAPTER = "default"
"""What peft calls the only adapter."""
_BASE = ".base_layer."
_LANGUAGE = ("causal", "masked", "seq2seq")
"""Objectives whose head is that of the pretrained model; others have one of their own, which is trained whole."""


def attach_adapters(
    model: PreTrainedModel, config: RunConfig, *, zero3: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    """Put low-rank adapters beside linear modules and freeze all but these, the head of a task, and the modules of
    `lora.train`. A pretrained weight `….weight` is then named `….base_layer.weight`.

    The first factor is drawn from U(−1/√in, 1/√in), which is peft's, as a pure function of (`config.seed`, name); the
    second is 0, so the model computes at first what it did. On the meta device no values are drawn.

    Args:
        zero3: the DeepSpeed configuration when parameters are sharded: a collective then.

    Raises:
        ConfigError: there is no pretrained model, or a name of `model.lora` matches no module.
    """
    from peft import inject_adapter_in_model

    assert config.model.lora is not None
    if config.model.pretrained is None:
        raise ConfigError([("model.lora", "needs model.pretrained: weights from scratch would never be trained")])
    trained = trained_modules(model, config)
    targets = target_names(model, config.model.lora.targets, trained)
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # it tells modules apart itself whose weights are stored transposed
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inject_adapter_in_model(peft_config(model, config, targets, ()), model, ADAPTER, low_cpu_mem_usage=is_meta)
    new = [layer for module in lora_layers(model).values() for layer in (module.lora_A, module.lora_B)]
    for name, module in lora_layers(model).items():
        for factor in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
            factor.to(dtype)
        if not is_meta:
            _draw(module, seed_of(config.seed, name))
    if zero3 is not None:
        import deepspeed

        deepspeed.zero.Init(module=nn.ModuleList(new), config_dict_or_path=zero3, dtype=dtype)
    for name, parameter in model.named_parameters():
        if is_projection(name) or _within(name, trained):
            parameter.requires_grad_(True)


def target_names(model: PreTrainedModel, targets: tuple[str, ...], trained: list[str]) -> list[str]:
    """Full names of the linear modules that `model.lora.targets` names, without those within `trained` modules.

    Raises:
        ConfigError: one of them names none, or one whose weight is tied to the embeddings.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    linear = [name for name in linear if not _within(name, [*trained, PROJECTIONS])]
    body = f"{model.base_model_prefix}."
    chosen: set[str] = set()
    for place, target in enumerate(targets):
        if target == "all-linear":
            found = [name for name in linear if name.startswith(body)]
        else:
            found = [name for name in linear if _names(target, name)]
        if not found:
            raise ConfigError([(f"model.lora.targets.{place}", _unknown(target, linear, "linear module", model))])
        chosen.update(found)
    embedding: Any = model.get_input_embeddings()
    for name in chosen:
        if embedding is not None and model.get_submodule(name).weight is embedding.weight:
            text = f"{name} shares its weight with the embeddings, which would change with it; leave it out"
            raise ConfigError([("model.lora.targets", text)])
    return [name for name in linear if name in chosen]


def trained_modules(model: PreTrainedModel, config: RunConfig) -> list[str]:
    """Full names of the modules that are trained whole beside adapters: the head of a task, and those of `lora.train`.

    Raises:
        ConfigError: one of these names none.
    """
    assert config.model.lora is not None
    modules = [name for name, _ in model.named_modules() if name]
    result: list[str] = []
    if config.objective.kind not in _LANGUAGE:
        outside, pooler = {model.base_model_prefix, PROJECTIONS}, f"{model.base_model_prefix}.pooler"
        # a model that was trained on masked tokens has no pooler: it is drawn with the head
        children = [(name, child) for name, child in model.named_modules() if "." not in name or name == pooler]
        result += [name for name, child in children if name and name not in outside and _has_parameters(child)]
    for place, wanted in enumerate(config.model.lora.train):
        found = [name for name in modules if _names(wanted, name)]
        if not found:
            raise ConfigError([(f"model.lora.train.{place}", _unknown(wanted, modules, "module", model))])
        result += [name for name in found if name not in result]
    return result


def peft_config(model: PreTrainedModel, config: RunConfig, targets: list[str], trained: Iterable[str]) -> Any:
    """peft's own configuration of the adapters: what `adapter_config.json` holds."""
    from peft import LoraConfig

    lora = config.model.lora
    assert lora is not None
    modules = dict(model.named_modules())
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides by the rank: any number will do
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        modules_to_save=list(trained) or None,
        fan_in_fan_out=any(isinstance(_base(modules[name]), Conv1D) for name in targets),
    )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by their names in the model."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def plain_name(name: str) -> str:
    """Name of a pretrained parameter as the model without adapters has it."""
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def merged(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(plain name, tensor) of every parameter and persistent buffer, with the products of the adapters added in fp32:
    what :func:`trainer.model.save.save_model` takes. One sum at a time is in memory beside the model."""
    layers = {f"{name}{_BASE}weight": module for name, module in lora_layers(model).items()}
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        if name in layers:
            tensor = tensor.float() + layers[name].get_delta_weight(ADAPTER).to(tensor.device)
        yield plain_name(name), tensor


def _base(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _names(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _unknown(wanted: str, names: list[str], what: str, model: nn.Module) -> str:
    known = sorted({*names, *(name.rpartition(".")[2] for name in names)})
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)
    return f"{wanted!r} names no {what} of {type(model).__name__}; the nearest is {near[0] if near else 'none'}"


@torch.no_grad()
def _draw(layer: Any, seed: int) -> None:
    first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    bound = 1 / math.sqrt(first.shape[1])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(first.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    first.copy_(drawn)
    second.zero_()
