"""From the options of a run to the transformers configuration of its model, with everything checked that can be."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trainer.config.objective import EACH_ALONE
from trainer.config.schema import ModelConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.dropout import set_dropout
from trainer.model.heads import BEGIN_BEHIND_PADDING, check_objective, is_another_head, set_head
from trainer.model.layers import cut_configuration, kept_layers
from trainer.model.vocabulary import cut_vocabulary
from trainer.records import Classes, IntArray

_LEGACY_ROPE_FIELDS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
"""Not fields any more, but every class with `rope_parameters` still reads them."""


def pretrained_reference(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(name or directory, further arguments) for `from_pretrained`; a .gguf file is a directory and a file in it."""
    assert model.pretrained is not None
    arguments: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.pretrained.endswith(".gguf"):
        file = Path(model.pretrained)
        return str(file.parent), {**arguments, "gguf_file": file.name}
    return model.pretrained, arguments


def model_configuration(
    config: RunConfig, vocabulary: int | None, classes: Classes | None = None, kept: IntArray | None = None
) -> PreTrainedConfig:
    """The configuration of the model; reads no weights.

    Args:
        vocabulary: tokens of the tokenizer; None when it is not known yet, then only a given `vocab_size` counts.
        classes: of a classifier; None when they are not known yet, then the architecture's default counts.
        kept: of a tokenizer with some of the tokens that the pretrained model knows: their ids there, ascending,
            [vocabulary]. None: it has them all.

    Raises:
        ConfigError: unknown architecture or field, a wrong value, a vocabulary or positions that are too small, a
            classifier of the same classes in another order.
    """
    if (config.model.config is None) == (config.model.pretrained is None):
        raise ConfigError([("model", "needs exactly one of `config` (from scratch) and `pretrained`")])
    if config.model.pretrained is None:
        result = _from_fields(config.model.config or {}, vocabulary)
    else:
        result = pretrained_configuration(config.model)
    check_objective(config, result)
    if kept is not None and config.model.pretrained:
        _cut_vocabulary(result, kept)
    _check_vocabulary(config, result, vocabulary)
    set_head(config, result, classes)
    if config.model.dropout is not None:
        set_dropout(result, config.model.dropout, but={*config.model.overrides, *(config.model.config or {})})
    # caches of keys and values are for generation
    result.use_cache = False
    return result


def decoder_start(config: RunConfig) -> int | None:
    """The token that the decoder of an encoder–decoder model begins each text with; None: padding, as in T5.

    Raises:
        ConfigError: `model.pretrained` cannot be read.
    """
    if config.objective.kind != "seq2seq":
        return None
    if config.model.pretrained is None:
        given: int | None = (config.model.config or {}).get("decoder_start_token_id")
        return given
    return getattr(pretrained_configuration(config.model), "decoder_start_token_id", None)


def max_positions(model: PreTrainedConfig) -> int | None:
    """The longest sequence that the positions allow; None where nothing limits it."""
    text_config = model.get_text_config()
    value = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(value, int) or value <= 0:
        return None
    if model.model_type in BEGIN_BEHIND_PADDING:
        return value - (text_config.pad_token_id or 0) - 1
    return value


def check_positions(config: RunConfig, model: PreTrainedConfig) -> None:
    """Refuse a sequence that is longer than the model's positions.

    Raises:
        ConfigError: it is.
    """
    length, limit = config.data.sequence_length, max_positions(model)
    if limit is not None and length > limit:
        where = "model.overrides" if config.model.pretrained else "model.config"
        raise ConfigError(
            [
                (
                    "data.sequence_length",
                    f"{length} tokens are more than the {limit} positions of the model; "
                    f"shorten it, or raise `{where}.max_position_embeddings`",
                )
            ]
        )


def _from_fields(fields: dict[str, Any], vocabulary: int | None) -> PreTrainedConfig:
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError([("model.config.model_type", "is needed: the architecture in transformers, such as llama")])
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            [
                (
                    "model.config.model_type",
                    f"{model_type!r} is no architecture of transformers{_nearest(model_type, set(CONFIG_MAPPING))}",
                )
            ]
        )
    config_class = CONFIG_MAPPING[model_type]
    _refuse_unknown("model.config", fields, _names_of(config_class), config_class.__name__)
    if vocabulary is not None:
        fields.setdefault("vocab_size", vocabulary)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    size = fields.get("vocab_size", defaults.get("vocab_size"))
    for name, default in defaults.items():
        # ids of the tokenizer that the architecture was published with; in a smaller vocabulary they point nowhere
        if name.endswith("_token_id") and isinstance(default, int) and isinstance(size, int) and default >= size:
            # some must have a decoder's start; which one is settled with the padding
            fields.setdefault(name, 0 if name == "decoder_start_token_id" else None)
    return _checked("model.config", lambda: config_class(**fields))


def pretrained_configuration(model: ModelConfig) -> PreTrainedConfig:
    """The configuration of `model.pretrained` with its overrides, and of its chosen layers; reads no weights.

    Raises:
        ConfigError: it cannot be read, a field is unknown or has a wrong value, or a layer is not there.
    """
    name, arguments = pretrained_reference(model)
    try:
        result: PreTrainedConfig = AutoConfig.from_pretrained(name, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError([("model.pretrained", f"{model.pretrained} cannot be read: {first_line(error)}")]) from error
    known = _names_of(type(result)) | {name for name in vars(result) if not name.startswith("_")}
    _refuse_unknown("model.overrides", model.overrides, known, type(result).__name__)

    def override() -> PreTrainedConfig:
        for field, value in model.overrides.items():
            setattr(result, field, value)
        return result

    result = _checked("model.overrides", override)
    if model.layers is None:
        return result
    if {"num_hidden_layers", type(result).attribute_map.get("num_hidden_layers")} & model.overrides.keys():
        raise ConfigError([("model.overrides.num_hidden_layers", "is decided by model.layers; leave one of them out")])
    kept = kept_layers(model.layers, result)
    return _checked("model.layers", lambda: cut_configuration(result, kept))


def _names_of(config_class: type[PreTrainedConfig]) -> set[str]:
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return names | (_LEGACY_ROPE_FIELDS if "rope_parameters" in names else set())


def _refuse_unknown(path: str, fields: dict[str, Any], known: set[str], owner: str) -> None:
    problems = [
        (f"{path}.{name}", f"is no field of {owner}{_nearest(name, known)}") for name in fields if name not in known
    ]
    if problems:
        raise ConfigError(problems)


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _checked(path: str, make: Any) -> PreTrainedConfig:
    try:
        result: PreTrainedConfig = make()
        result.validate()
    except StrictDataclassError as error:
        # "Validation error for field 'hidden_size':\n    TypeError: Field 'hidden_size' expected int, got str (…)"
        text = str(error).strip().splitlines()[-1].strip().partition(": ")[2]
        raise ConfigError([(path, text or first_line(error))]) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError([(path, f"is refused by transformers: {first_line(error)}")]) from error
    return result


def has_another_head(config: RunConfig, model: PreTrainedConfig) -> bool:
    """Whether `model.pretrained` has a head for another task, or for another number of classes than `model`."""
    assert config.model.pretrained is not None
    kind = config.objective.kind
    if kind not in EACH_ALONE or kind == "seq2seq" or config.model.pretrained.endswith(".gguf"):
        return False
    return is_another_head(pretrained_configuration(config.model), model, kind)


def _cut_vocabulary(model: PreTrainedConfig, kept: IntArray) -> None:
    padding = model.get_text_config().pad_token_id
    cut_vocabulary(model, kept)
    if model.model_type in BEGIN_BEHIND_PADDING and model.get_text_config().pad_token_id != padding:
        text = f"the positions of a model of type {model.model_type} begin at the id of its padding, which would change"
        raise ConfigError([("data.tokenizer.keep", f"{text}; use `all`")])


def _check_vocabulary(config: RunConfig, model: PreTrainedConfig, vocabulary: int | None) -> None:
    size = model.get_text_config().vocab_size
    if vocabulary is not None and size < vocabulary:
        path, remedy = "model.config.vocab_size", "raise it or leave it out"
        if config.model.pretrained:
            path, remedy = "data.tokenizer", "use the tokenizer of the model"
        raise ConfigError(
            [(path, f"the tokenizer has {vocabulary} tokens and the model's vocabulary only {size}; {remedy}")]
        )


def first_line(error: Exception) -> str:
    """The first sentence-like line of a library's error."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
