"""The model of a run: from scratch or pretrained, whole or sharded by ZeRO-3 from its first byte."""

from __future__ import annotations

import inspect
import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, prevent_arange_dtype_change

from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.model.configuration import (
    auto_class,
    check_positions,
    first_line,
    model_configuration,
    pretrained_reference,
)
from trainer.model.initialise import initialise

logger = logging.getLogger(__name__)


def build_model(
    config: RunConfig, *, vocabulary: int, zero3: dict[str, Any] | None, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of `config` in training mode, every parameter of type `dtype`.

    Weights from scratch are a pure function of (`config.seed`, parameter name); see :mod:`trainer.model.initialise`.

    Args:
        vocabulary: tokens of the run's tokenizer.
        zero3: the DeepSpeed configuration when parameters are sharded (stage 3): every rank then holds its shard only,
            and all ranks must call this together. None: the whole model, on the CPU.

    Raises:
        ConfigError: what is asked for does not exist, does not fit the data, or is not installed.
    """
    model_config = model_configuration(config, vocabulary)
    check_positions(config, model_config)
    if config.model.pretrained is None:
        model = _from_scratch(config, model_config, zero3, dtype)
    else:
        model = _from_pretrained(config, model_config, zero3, dtype)
    if config.model.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                [("model.activation_checkpointing", f"{type(model).__name__} does not support it; turn it off")]
            )
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def meta_model(config: RunConfig, vocabulary: int | None) -> PreTrainedModel:
    """The model without memory: every parameter has a shape and no values. Reads no weights.

    Raises:
        ConfigError: as :func:`build_model`.
    """
    model_config = model_configuration(config, vocabulary)
    check_positions(config, model_config)
    with torch.device("meta"):
        try:
            return _instantiate(config, model_config, torch.float32)
        except ConfigError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            # a plan is often made on a machine without the package that the nodes have
            logger.warning("model.attention=%s is not installed on this machine", config.model.attention)
            plain = config.model_copy(update={"model": config.model.model_copy(update={"attention": "auto"})})
            return _instantiate(plain, model_config, torch.float32)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model reads `position_ids`; ALiBi and state-space models do not, and must not be given any."""
    return "position_ids" in inspect.signature(model.forward).parameters


def position_offset(model: PreTrainedModel) -> int:
    """What the model expects to be added to positions that count from 0: RoBERTa's begin behind its padding index."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


def _from_scratch(
    config: RunConfig, model_config: PreTrainedConfig, zero3: dict[str, Any] | None, dtype: torch.dtype
) -> PreTrainedModel:
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if zero3 is not None:
            import deepspeed

            # before zero.Init, which would otherwise round the positions of rotary embeddings
            stack.enter_context(prevent_arange_dtype_change())
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=zero3, dtype=dtype))
        model = _instantiate(config, model_config, dtype)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        # Samples are packed without padding: the token that the architecture calls padding is one like any other.
        embedding.padding_idx = None
    initialise(model, config.seed, scale_residual=config.model.initialisation == "residual-scaled")
    model.tie_weights()
    return model


def _from_pretrained(
    config: RunConfig, model_config: PreTrainedConfig, zero3: dict[str, Any] | None, dtype: torch.dtype
) -> PreTrainedModel:
    # transformers shards while loading as long as this object lives
    keeps_sharded = HfDeepSpeedConfig(zero3) if zero3 is not None else None  # type: ignore[no-untyped-call]
    name, arguments = pretrained_reference(config.model)
    with torch.random.fork_rng(devices=[]):
        # weights that the checkpoint lacks (a new head) are drawn, and must not depend on what was drawn before
        torch.default_generator.manual_seed(config.seed)
        try:
            model, report = auto_class(config).from_pretrained(
                name,
                config=model_config,
                dtype=dtype,
                attn_implementation=_attention(config),
                output_loading_info=True,
                **arguments,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError([("model", f"{name} cannot be loaded: {first_line(error)}")]) from error
    del keeps_sharded
    for what, names in (
        ("does not have, drawn anew", "missing_keys"),
        ("has and the model does not", "unexpected_keys"),
    ):
        if report.get(names):
            logger.warning("weights that %s %s: %s", config.model.pretrained, what, ", ".join(sorted(report[names])))
    # a dequantised GGUF model cannot be saved while its configuration calls it quantised
    if "gguf_file" in arguments and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model  # type: ignore[no-any-return]


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
