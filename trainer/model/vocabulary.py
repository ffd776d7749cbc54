"""A smaller model with some of the tokens of a pretrained one: its configuration, and its rows of the embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from trainer.errors import ConfigError
from trainer.model.groups import shape_of
from trainer.records import IntArray


def cut_vocabulary(config: PreTrainedConfig, kept: IntArray) -> None:
    """Turn the configuration into that of a model which knows the tokens `kept` only, and by their places there.

    Args:
        kept: ids of tokens, ascending, [tokens].

    Raises:
        ConfigError: the model does not know them all.
    """
    text_config = config.get_text_config()
    if kept[-1] >= text_config.vocab_size:
        text = f"the tokenizer has a token {kept[-1]} and the model's vocabulary only {text_config.vocab_size} of them"
        raise ConfigError([("data.tokenizer", f"{text}; use the tokenizer of the model")])
    places = {int(old): new for new, old in enumerate(kept)}
    for each in {id(config): config, id(text_config): text_config}.values():
        for name, value in list(vars(each).items()):
            if not name.endswith("_token_id"):
                continue
            if isinstance(value, int):
                setattr(each, name, places.get(value))
            elif isinstance(value, list):
                setattr(each, name, [places[old] for old in value if old in places])
    text_config.vocab_size = len(kept)


def token_dimensions(whole: nn.Module, model: nn.Module) -> dict[str, int]:
    """Parameters with something for each token, and the dimension of the tokens in them: that in which a model that
    knows all tokens and one that knows some differ. Neither needs values."""
    ours = {name: shape_of(parameter) for name, parameter in model.named_parameters()}
    return {
        name: dimension
        for name, parameter in whole.named_parameters()
        for dimension, size in enumerate(shape_of(parameter))
        if size != ours[name][dimension]
    }


def rows_of(
    tensors: Mapping[str, Tensor], dimensions: Mapping[str, int], kept: IntArray, prefix: str
) -> dict[str, Tensor]:
    """The tensors of a checkpoint with what belongs to the tokens `kept` only; of the others nothing is read.

    Args:
        dimensions: of the tokens, by name in the model (:func:`token_dimensions`).
        prefix: of the base model; the checkpoint may lack it.

    Raises:
        ConfigError: the checkpoint names them otherwise, or does not know all the tokens.
    """
    places = {name.removeprefix(prefix): dimension for name, dimension in dimensions.items()}
    index = torch.from_numpy(kept)
    result = dict(tensors)
    found = set()
    for name, tensor in tensors.items():
        dimension = places.get(short := name.removeprefix(prefix))
        if dimension is None:
            continue
        if tensor.shape[dimension] <= int(kept[-1]):
            text = f"{name} of the model has {tensor.shape[dimension]} tokens and the tokenizer a token {kept[-1]}"
            raise ConfigError([("data.tokenizer", f"{text}; use the tokenizer of the model")])
        result[name] = tensor.index_select(dimension, index.to(tensor.device))
        found.add(short)
    if missing := sorted(places.keys() - found):
        text = f"the model names its embeddings otherwise ({missing[0]} is missing)"
        raise ConfigError([("data.tokenizer.keep", f"{text}; use `all`")])
    return result
