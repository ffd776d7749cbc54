"""The model of a run: from scratch or pretrained, whole or sharded by ZeRO-3 from its first byte."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, prevent_arange_dtype_change

from trainer.config.objective import EACH_ALONE
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.model.configuration import (
    check_positions,
    first_line,
    has_another_head,
    model_configuration,
    pretrained_configuration,
    pretrained_reference,
)
from trainer.model.freezing import choose_trained
from trainer.model.heads import auto_class
from trainer.model.initialise import begin_at_rates, initialise, output_bias
from trainer.model.layers import check_places, kept_layers, layers_path, renaming
from trainer.model.projections import attach_projections
from trainer.model.tensors import read_tensors
from trainer.model.vocabulary import rows_of, token_dimensions
from trainer.records import Classes, IntArray

logger = logging.getLogger(__name__)


def build_model(
    config: RunConfig,
    *,
    vocabulary: int,
    zero3: dict[str, Any] | None,
    dtype: torch.dtype,
    classes: Classes | None = None,
    kept: IntArray | None = None,
) -> PreTrainedModel:
    """The model of `config` in training mode, every parameter of type `dtype`.

    `position_ids` that it is given count from 0, whatever the architecture makes of them.
    Weights from scratch are a pure function of (`config.seed`, parameter name); see :mod:`trainer.model.initialise`.

    Args:
        vocabulary: tokens of the run's tokenizer.
        zero3: the DeepSpeed configuration when parameters are sharded (stage 3): every rank then holds its shard only,
            and all ranks must call this together. None: the whole model, on the CPU.
        classes: of a classifier, and what pads texts that are samples of their own. A pretrained head for another task,
            or for another number of classes, is drawn anew.
        kept: ids in the pretrained model of the tokens that this one is to know, ascending, [vocabulary]; None: all.

    Raises:
        ConfigError: what is asked for does not exist, does not fit the data, or is not installed.
    """
    model_config = model_configuration(config, vocabulary, classes, kept)
    check_positions(config, model_config)
    rates = classes.rates if classes else ()
    if config.model.pretrained is None:
        model = _from_scratch(config, model_config, zero3, dtype, rates)
    elif zero3 is not None and config.model.pretrained.endswith(".gguf"):
        model = _from_gguf_sharded(config, model_config, zero3, dtype, rates)
    else:
        model = _from_pretrained(config, model_config, zero3, dtype, kept, rates)
    attach_projections(model, config, zero3=zero3, dtype=dtype)
    choose_trained(model, config, zero3=zero3, dtype=dtype)
    _adapt_positions(model, config)
    if config.model.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                [("model.activation_checkpointing", f"{type(model).__name__} does not support it; turn it off")]
            )
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def meta_model(
    config: RunConfig, vocabulary: int | None, classes: Classes | None = None, kept: IntArray | None = None
) -> PreTrainedModel:
    """The model without memory: every parameter has a shape and no values. Reads no weights.

    Raises:
        ConfigError: as :func:`build_model`.
    """
    model_config = model_configuration(config, vocabulary, classes, kept)
    check_positions(config, model_config)
    with torch.device("meta"):
        try:
            model = _instantiate(config, model_config, torch.float32)
        except ConfigError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            # a plan is often made on a machine without the package that the nodes have
            logger.warning("model.attention=%s is not installed on this machine", config.model.attention)
            config = _with_options(config, attention="auto")
            model = _instantiate(config, model_config, torch.float32)
    if config.model.layers is not None:
        _renaming_of_kept(config, model, kept)
    attach_projections(model, config, dtype=torch.float32)
    choose_trained(model, config, dtype=torch.float32)
    return model


def frozen_model(
    config: RunConfig, model_config: PreTrainedConfig, *, zero3: dict[str, Any] | None, group: Any, dtype: torch.dtype
) -> PreTrainedModel:
    """A model that is never trained, in evaluation mode and without gradients; its weights are still to be filled in.

    `position_ids` count from 0, as for :func:`build_model`.

    Args:
        zero3: as for :func:`build_model`.
        group: the ranks that a parameter is sharded over; None: all.

    Raises:
        ConfigError: as :func:`build_model`.
    """
    with torch.random.fork_rng(devices=[]):
        model = _without_values(config, model_config, zero3, dtype, group)
    model.tie_weights()
    _adapt_positions(model, config)
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model reads `position_ids`; ALiBi and state-space models do not."""
    return "position_ids" in inspect.signature(model.forward).parameters


def position_offset(model: PreTrainedModel) -> int:
    """What the model expects to be added to positions that count from 0: RoBERTa's begin behind its padding index."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


def _from_scratch(
    config: RunConfig,
    model_config: PreTrainedConfig,
    zero3: dict[str, Any] | None,
    dtype: torch.dtype,
    rates: Sequence[float],
) -> PreTrainedModel:
    model = _without_values(config, model_config, zero3, dtype)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        # The token that the architecture calls padding is one like any other where samples are packed, and what texts
        # are written from in T5.
        embedding.padding_idx = None
    initialise(model, config.seed, scale_residual=config.model.initialisation == "residual-scaled")
    if rates:
        begin_at_rates(model, rates)
    model.tie_weights()
    for module in model.modules():
        # an encoder and a decoder look up the same weights, each in a module of its own
        if isinstance(module, nn.Embedding) and module.weight is embedding.weight:
            module.padding_idx = None
    return model


def _without_values(
    config: RunConfig,
    model_config: PreTrainedConfig,
    zero3: dict[str, Any] | None,
    dtype: torch.dtype,
    group: Any = None,
) -> PreTrainedModel:
    """Parameters with shapes and arbitrary values, not tied yet; under ZeRO-3 each is sharded as soon as it is made."""
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if zero3 is not None:
            import deepspeed

            # before zero.Init, which would otherwise round the positions of rotary embeddings
            stack.enter_context(prevent_arange_dtype_change())
            stack.enter_context(deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=zero3, dtype=dtype))
        return _instantiate(config, model_config, dtype)


def _from_gguf_sharded(
    config: RunConfig,
    model_config: PreTrainedConfig,
    zero3: dict[str, Any],
    dtype: torch.dtype,
    rates: Sequence[float],
) -> PreTrainedModel:
    """Rank 0 reads the file and deals out the shards: transformers would dequantise the whole model on every rank."""
    import deepspeed

    is_first = torch.distributed.get_rank() == 0
    source: dict[str, torch.Tensor] = {}
    failure: list[str | None] = [None]
    if is_first:
        try:
            source = _from_pretrained(config, model_config, None, dtype, rates=rates).state_dict()
        except ConfigError as error:
            failure[0] = error.problems[0][1]
    torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ConfigError([("model", failure[0])])
    model = _without_values(config, model_config, zero3, dtype)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if is_first:
                    parameter.copy_(source[name])
    return model


def _from_pretrained(
    config: RunConfig,
    model_config: PreTrainedConfig,
    zero3: dict[str, Any] | None,
    dtype: torch.dtype,
    kept: IntArray | None = None,
    rates: Sequence[float] = (),
) -> PreTrainedModel:
    name, arguments = pretrained_reference(config.model)
    if "gguf_file" in arguments:
        # where a kernel for packed weights is installed, they would stay packed, which cannot be trained
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    load: Callable[..., Any] = partial(auto_class(config).from_pretrained, name, **arguments)
    if config.model.layers is not None or has_another_head(config, model_config) or kept is not None:
        load = _from_some(config, model_config, zero3, dtype, kept)
    # transformers shards while loading as long as this object lives
    keeps_sharded = HfDeepSpeedConfig(zero3) if zero3 is not None else None  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]):
        # weights that the checkpoint lacks (a new head) are drawn, and must not depend on what was drawn before
        torch.default_generator.manual_seed(config.seed)
        try:
            model, report = load(
                config=model_config, dtype=dtype, attn_implementation=_attention(config), output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError([("model", f"{name} cannot be loaded: {first_line(error)}")]) from error
    del keeps_sharded
    if config.model.layers is not None:
        lacking = sorted(each for each in report["missing_keys"] if each.startswith(f"{layers_path(model)}."))
        if lacking:
            text = f"{config.model.pretrained} does not name the weights of its layers as {type(model).__name__} does"
            raise ConfigError([("model.layers", f"{text}: {lacking[0]} is missing")])
    for what, names in (
        ("does not have, drawn anew", "missing_keys"),
        ("has and the model does not", "unexpected_keys"),
    ):
        if report.get(names):
            logger.warning("weights that %s %s: %s", config.model.pretrained, what, ", ".join(sorted(report[names])))
    if rates and output_bias(model) in report["missing_keys"]:
        begin_at_rates(model, rates)
    if getattr(model, "hf_quantizer", None) is not None:
        # a dequantised model cannot be saved while it is called quantised
        model.hf_quantizer.remove_quantization_config(model)
    return model  # type: ignore[no-any-return]


def _from_some(
    config: RunConfig,
    model_config: PreTrainedConfig,
    zero3: dict[str, Any] | None,
    dtype: torch.dtype,
    kept: IntArray | None,
) -> Callable[..., Any]:
    """`from_pretrained` with the kept layers and tokens of the checkpoint, and without a head for other classes. Of the
    others nothing is read; but transformers reads a .gguf file only whole."""
    with torch.device("meta"):
        small = _instantiate(config, model_config, dtype)
    rename = _renaming_of_kept(config, small, kept)
    if has_another_head(config, model_config):
        rename = _body_only(rename, f"{small.base_model_prefix}.")
    name, arguments = pretrained_reference(config.model)
    if "gguf_file" in arguments:
        source = _from_pretrained(*_whole(config, model_config, None), None, dtype)
        tensors = {new: each for name, each in source.state_dict().items() if (new := rename(name)) is not None}
    else:
        # transformers deals out the values that the first rank has
        has_values = zero3 is None or torch.distributed.get_rank() == 0
        try:
            tensors = read_tensors(name, rename, with_values=has_values)
        except OSError as error:
            raise ConfigError([("model", f"{name} cannot be loaded: {first_line(error)}")]) from error
    if kept is not None:
        dimensions = _token_dimensions(config, model_config, small)
        tensors = rows_of(tensors, dimensions, kept, f"{small.base_model_prefix}.")
    return partial(type(small).from_pretrained, None, state_dict=tensors)


def _token_dimensions(config: RunConfig, model_config: PreTrainedConfig, small: PreTrainedModel) -> dict[str, int]:
    knows_all = copy.deepcopy(model_config)
    knows_all.get_text_config().vocab_size = pretrained_configuration(config.model).get_text_config().vocab_size
    with torch.device("meta"):
        return token_dimensions(_instantiate(config, knows_all, torch.float32), small)


def _renaming_of_kept(
    config: RunConfig, model: PreTrainedModel, tokens: IntArray | None
) -> Callable[[str], str | None]:
    """Names in the checkpoint → names in `model`, which has the kept layers only.

    Raises:
        ConfigError: they would not be the same layers there.
    """
    if config.model.layers is None:
        return str
    whole, source_config = _whole(config, model.config, tokens)
    kept = kept_layers(config.model.layers, source_config)
    with torch.device("meta"):
        source = _instantiate(whole, source_config, torch.float32)
    check_places(source, model, kept)
    return renaming(source, kept)


def _body_only(rename: Callable[[str], str | None], prefix: str) -> Callable[[str], str | None]:
    return lambda name: rename(name) if name.startswith(prefix) else None


def _whole(config: RunConfig, cut: PreTrainedConfig, tokens: IntArray | None) -> tuple[RunConfig, PreTrainedConfig]:
    """The config of a run and of its model with all layers, and otherwise like `cut`."""
    whole = _with_options(config, layers=None)
    source_config = model_configuration(whole, None, kept=tokens)
    source_config.id2label = cut.id2label
    return whole, source_config


def _with_options(config: RunConfig, **options: Any) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=options)})


def _adapt_positions(model: PreTrainedModel, config: RunConfig) -> None:
    """Let the model be given `position_ids` that count from 0, whatever it makes of them.

    Raises:
        ConfigError: attention is to stay inside documents, and the model takes no positions to tell them by.
    """
    if not takes_positions(model):
        if config.objective.kind in EACH_ALONE:
            return
        if config.data.boundaries == "block":
            raise ConfigError(
                [("data.boundaries", f"block needs positions, and {type(model).__name__} takes none; use join")]
            )
        if config.data.boundaries == "positions":
            logger.warning("data.boundaries=positions has no effect: %s takes no positions", type(model).__name__)
        model.register_forward_pre_hook(_drop_positions, with_kwargs=True)
    elif offset := position_offset(model):

        def shift(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            positions = kwargs.get("position_ids")
            if positions is None:
                ids = kwargs["input_ids"]
                positions = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
            return args, {**kwargs, "position_ids": positions + offset}

        model.register_forward_pre_hook(shift, with_kwargs=True)


def _drop_positions(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "position_ids"}


def _instantiate(config: RunConfig, model_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return auto_class(config).from_config(  # type: ignore[no-any-return]
            model_config,
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=config.model.trust_remote_code,
        )
    except (ValueError, ImportError, KeyError, AssertionError, ZeroDivisionError) as error:
        path = "model.attention" if isinstance(error, ImportError) else "model"
        raise ConfigError([(path, f"transformers refuses to build it: {first_line(error)}")]) from error


def _attention(config: RunConfig) -> str | None:
    return None if config.model.attention == "auto" else config.model.attention
