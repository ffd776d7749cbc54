"""Weights from scratch as a pure function of (seed, name): the same bits in every ZeRO stage, world size and device."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.errors import ConfigError

RESIDUAL_WRITERS = (
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2, GPT-BigCode, StarCoder2's MLP
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo
    ("attention.output.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    ("attn.Wo", "mlp.Wo"),  # ModernBERT
    ("self_attn.out_proj", "fc2"),  # OPT
    ("attn.out_proj", "mlp.fc_out"),  # GPT-J, GPT-Neo
    ("self_attn.dense", "mlp.fc2"),  # Phi
    ("attn.out_proj", "ffn.down_proj"),  # MPT
    ("attention.out_lin", "ffn.lin2"),  # DistilBERT
    ("attention.dense", "ffn_output"),  # ALBERT
    ("experts.down_proj", "shared_expert.down_proj", "mixer.out_proj"),  # mixture of experts; Mamba
)
"""Layers that write to the residual stream, by the ends of their names within a numbered layer."""

_WRITER = re.compile(
    r"\.\d+\.(?:.*\.)?(?:"
    + "|".join(sorted({re.escape(name) for names in RESIDUAL_WRITERS for name in names}))
    + r")(?:\.weight)?$"
)


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int, *, scale_residual: bool = False) -> None:
    """Give every parameter its first value, by the model's own rules (`_init_weights`).

    Before the rules of a module run, the generator is seeded from (seed, module name); numbers are drawn on the CPU in
    fp32. Parameters that ZeRO-3 has sharded are gathered one layer at a time. The caller's random state is kept.

    Args:
        scale_residual: draw the weights that write to the residual stream with a standard deviation smaller by
            √(2·layers) (GPT-2, §2.3, https://cdn.openai.com/better-language-models/language_models.pdf).

    Raises:
        ConfigError: `scale_residual` knows no such weight in this architecture, or the model's rules leave a parameter
            without a value.
    """
    residual_std = _residual_std(model) if scale_residual else None
    done: set[int] = set()
    num_scaled = 0
    with torch.random.fork_rng(devices=[]):
        for own, touched, rules in _units(model):
            fresh = {name: parameter for name, parameter in own.items() if id(parameter) not in done}
            with gathered(list(touched.values())), _on_cpu_in_fp32(list(touched.values())):
                for parameter in fresh.values():
                    parameter.fill_(math.nan)
                for name, module, owner in rules:
                    if id(module) not in done:
                        torch.default_generator.manual_seed(seed_of(seed, name))
                        owner._init_weights(module)  # type: ignore[no-untyped-call]
                        done.add(id(module))
                for name, parameter in fresh.items():
                    if torch.isnan(parameter).any():
                        raise ConfigError(
                            [("model.config.model_type", f"{type(model).__name__} does not say how {name} begins")]
                        )
                    if residual_std is not None and parameter.dim() > 1 and _WRITER.search(name):
                        torch.default_generator.manual_seed(seed_of(seed, name))
                        parameter.normal_(0.0, residual_std)
                        num_scaled += 1
            done.update(id(parameter) for parameter in fresh.values())
    if scale_residual and not num_scaled:
        raise ConfigError(
            [
                (
                    "model.initialisation",
                    f"residual-scaled knows no layer of {type(model).__name__} that writes to the residual stream; "
                    "use default",
                )
            ]
        )


def output_bias(model: PreTrainedModel) -> str | None:
    """Name of what a classifier adds to its logits [classes]; None: nothing."""
    body = f"{model.base_model_prefix}."
    names = [
        f"{name}.bias"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(body)
        and module.out_features == model.config.num_labels
        and module.bias is not None
    ]
    return names[-1] if names else None


@torch.no_grad()
def begin_at_rates(model: PreTrainedModel, rates: Sequence[float]) -> None:
    """Let a classifier of yes or no begin with what it knows of no text: a bias of log p/(1−p) for each class.

    Otherwise the weights of rare classes all learn to say no at first, and the features with them (focal loss, §3.3,
    https://arxiv.org/abs/1708.02002). A classifier without a bias is left alone.

    Args:
        rates: p, the share of the texts that are of each class, [classes], each in (0, 1).
    """
    name = output_bias(model)
    if name is not None:
        bias = model.get_parameter(name)
        with gathered([bias]):
            bias.copy_(torch.tensor([math.log(rate / (1 - rate)) for rate in rates]))


_Rule = tuple[str, nn.Module, PreTrainedModel]
_Named = dict[str, nn.Parameter]


def _units(root: PreTrainedModel) -> Iterator[tuple[_Named, _Named, list[_Rule]]]:
    """What is initialised together: (own parameters, parameters that the rules may touch, rules in order).

    A unit is one layer of a `ModuleList`, whole, since rules reach into submodules (GPT-2's re-draw every `c_proj`
    below); elsewhere one module with its direct children. Children come before parents, as in transformers.
    """

    def rules_of(name: str, module: nn.Module, owner: PreTrainedModel) -> Iterator[_Rule]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            yield from rules_of(f"{name}.{child_name}".lstrip("."), child, owner)
        yield name, module, owner

    def walk(
        name: str, module: nn.Module, owner: PreTrainedModel, is_layer: bool
    ) -> Iterator[tuple[_Named, _Named, list[_Rule]]]:
        if is_layer:
            whole = dict(module.named_parameters(prefix=name))
            yield whole, whole, list(rules_of(name, module, owner))
            return
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}".lstrip("."), child, owner, isinstance(module, nn.ModuleList))
        own = dict(module.named_parameters(prefix=name, recurse=False))
        touched = dict(own)
        for child_name, child in module.named_children():
            if not isinstance(child, PreTrainedModel):
                touched |= child.named_parameters(prefix=f"{name}.{child_name}".lstrip("."), recurse=False)
        yield own, touched, [(name, module, owner)]

    yield from walk("", root, root, is_layer=False)


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """The full values of ZeRO-3 parameters; what rank 0 leaves in them is sharded again at the end."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return context


@contextmanager
def _on_cpu_in_fp32(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Lend the parameters CPU memory in fp32, so that type and device have no say in the numbers that are drawn."""
    homes = [parameter.data for parameter in parameters]
    for parameter, home in zip(parameters, homes, strict=True):
        parameter.data = home.to("cpu", torch.float32)
    try:
        yield
    finally:
        for parameter, home in zip(parameters, homes, strict=True):
            if home.data_ptr() != parameter.data_ptr():
                home.copy_(parameter.data)
                parameter.data = home


def seed_of(seed: int, name: str) -> int:
    """Seed of the values of what bears this name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def _residual_std(model: PreTrainedModel) -> float:
    config = model.config.get_text_config()
    std = getattr(config, "initializer_range", getattr(config, "init_std", None))
    if not isinstance(std, float) or std <= 0:
        raise ConfigError(
            [
                (
                    "model.initialisation",
                    f"residual-scaled needs `initializer_range`, which {model.config.model_type} lacks",
                )
            ]
        )
    return std / math.sqrt(2 * config.num_hidden_layers)
