"""What each kind of objective needs of a transformers model: its auto class, its head, the names of its classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from trainer.config.objective import EACH_ALONE
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.records import Classes

logger = logging.getLogger(__name__)

BEGIN_BEHIND_PADDING = {
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "data2vec-text",
}
"""Positions of these begin at the padding index + 1, so the table has as many rows that no token uses."""

_ENDS = {
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""How transformers names the classes of models with such a head."""

_PROBLEMS: dict[str, Literal["single_label_classification", "multi_label_classification", "regression"]] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""`problem_type` of classifiers of sequences: how pipelines read their logits."""

_LANGUAGE = {"causal": "a causal", "masked": "a masked", "seq2seq": "an encoder–decoder"}
"""Kinds of language models."""

_OUTPUTS = {"regression": 1, "question_answering": 2}
"""Outputs of heads that tell no classes apart."""


@dataclass(frozen=True, slots=True)
class _Family:
    auto: Any
    model_types: Any
    """Architectures that have such a model."""
    text: str
    """What it is, for a person."""


_SEQUENCES = _Family(
    AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "classifier of sequences"
)
_FAMILIES = {
    "causal": _Family(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal language model"),
    "masked": _Family(AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked language model"),
    "classification": _SEQUENCES,
    "multi_label": _SEQUENCES,
    "regression": _SEQUENCES,
    "several": _SEQUENCES,
    "token_classification": _Family(
        AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "classifier of tokens"
    ),
    "question_answering": _Family(
        AutoModelForQuestionAnswering, MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "finder of answers"
    ),
    "seq2seq": _Family(
        AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "encoder–decoder language model"
    ),
}


def auto_class(config: RunConfig) -> Any:
    """The transformers auto class of the run's objective."""
    return _FAMILIES[config.objective.kind].auto


def check_objective(config: RunConfig, model: PreTrainedConfig) -> None:
    """Refuse an architecture that has no model for the objective, and options that such a model cannot follow.

    Raises:
        ConfigError: says which.
    """
    kind = config.objective.kind
    family, model_type = _FAMILIES[kind], model.model_type
    remote = kind in ("causal", "masked") and config.model.trust_remote_code and hasattr(model, "auto_map")
    knows = model_type in family.model_types
    if kind == "seq2seq":
        # the others of that family listen, or are two models with a vocabulary each
        knows = knows and bool(model.is_encoder_decoder) and model_type not in ("encoder-decoder", "fsmt")
    if not remote and not knows:
        other = next((each for each in _LANGUAGE if each != kind and kind in _LANGUAGE and _has(model, each)), None)
        hint = f" (it has {_LANGUAGE[other]} one: objective.kind={other})" if other else ""
        raise ConfigError([("objective.kind", f"transformers has no {family.text} of type {model_type}{hint}")])
    if kind == "causal" and knows and _has(model, "masked") and getattr(model, "is_decoder", True) is False:
        where = "model.overrides" if config.model.pretrained else "model.config"
        text = f"{model_type} sees the tokens that it is to predict unless this is true; "
        raise ConfigError([(f"{where}.is_decoder", f"{text}set it, or use objective.kind=masked")])
    if kind == "seq2seq":
        _check_seq2seq(config)


def _has(model: PreTrainedConfig, kind: str) -> bool:
    found = model.model_type in _FAMILIES[kind].model_types
    return found and (kind != "seq2seq" or bool(model.is_encoder_decoder))


def _check_seq2seq(config: RunConfig) -> None:
    problems = []
    if config.model.layers is not None:
        problems.append(("model.layers", "is for models of one stack of layers, which encoder–decoder models are not"))
    if config.data.tokenizer.keep != "all":
        problems.append(("data.tokenizer.keep", "`used` is not for encoder–decoder models; use `all`"))
    if config.data.boundaries == "block":
        text = "`block` is for packed samples; texts of encoder–decoder models are samples of their own: leave it out"
        problems.append(("data.boundaries", text))
    if problems:
        raise ConfigError(problems)


SEVERAL = "several_tasks"
"""In the configuration of a model whose outputs are of several tasks, which transformers has no word for."""


def head_of(model: PreTrainedConfig) -> str | None:
    """The kind of objective that the head of a configuration's weights was trained on; None: of a language model, or
    no head."""
    names = model.architectures or ()
    kind = next((kind for kind, end in _ENDS.items() if any(name.endswith(end) for name in names)), None)
    if kind != "classification":
        return kind
    if getattr(model, SEVERAL, False):
        return "several"
    default = "regression" if model.num_labels == 1 else "classification"
    return next((kind for kind, problem in _PROBLEMS.items() if problem == model.problem_type), default)


def own_classes(model: PreTrainedConfig) -> tuple[str, ...] | None:
    """Names of the classes that the weights of a configuration were trained on; None: of no classifier."""
    if head_of(model) not in ("classification", "multi_label", "token_classification"):
        return None
    names = {int(number): str(name) for number, name in (model.id2label or {}).items()}
    return tuple(names[number] for number in sorted(names))


def is_another_head(own: PreTrainedConfig, model: PreTrainedConfig, kind: str) -> bool:
    """Whether the weights of `own` have a head, and not one for what `model` is to tell.

    Heads of different tasks may bear the same names and shapes, and would be loaded for one another.
    """
    head = head_of(own)
    if head == kind == "several" and own.id2label != model.id2label:
        # other tasks, or in another order
        return True
    return head is not None and (head != kind or own.num_labels != model.num_labels)


def set_head(config: RunConfig, model: PreTrainedConfig, classes: Classes | None) -> None:
    """Write what the objective asks of the head into the configuration: its size, problem, names of classes, padding.

    Args:
        classes: of the data; None: not known yet, then the configuration's own number counts.

    Raises:
        ConfigError: a classifier of the same classes in another order.
    """
    kind = config.objective.kind
    if kind not in EACH_ALONE:
        return
    if kind in _OUTPUTS and (model.num_labels != _OUTPUTS[kind] or head_of(model) != kind):
        model.id2label = {number: f"LABEL_{number}" for number in range(_OUTPUTS[kind])}
        model.label2id = {name: number for number, name in model.id2label.items()}
    if classes is not None:
        if classes.names:
            _name_classes(config, model, classes)
        _set_padding(config, model, classes.pad_id)
    if kind == "seq2seq":
        _set_start(config, model)
    elif classes is not None or kind != "classification":
        model.problem_type = _PROBLEMS.get(kind)
    if kind == "several":
        setattr(model, SEVERAL, True)
    elif hasattr(model, SEVERAL):
        delattr(model, SEVERAL)


def _name_classes(config: RunConfig, model: PreTrainedConfig, classes: Classes) -> None:
    own = own_classes(model) if config.model.pretrained and head_of(model) == config.objective.kind else None
    if own is not None and len(own) == len(classes.names) and _alike(own) != _alike(classes.names):
        theirs, ours = ", ".join(own), ", ".join(classes.names)
        if sorted(_alike(own)) == sorted(_alike(classes.names)):
            problem = f"has the classes {theirs}, which the data numbers as {ours}; rename them, or use another model"
            raise ConfigError([("model.pretrained", problem)])
        logger.warning("the head of %s is kept: its classes %s become %s", config.model.pretrained, theirs, ours)
    model.id2label = dict(enumerate(classes.names))
    model.label2id = {name: number for number, name in enumerate(classes.names)}


def _set_padding(config: RunConfig, model: PreTrainedConfig, pad_id: int) -> None:
    own = getattr(model.get_text_config(), "pad_token_id", None)
    keeps_its_own = model.model_type in BEGIN_BEHIND_PADDING or config.objective.kind == "seq2seq"
    if config.model.pretrained and keeps_its_own and own is not None:
        return
    if config.model.pretrained and own is None:
        logger.warning("%s has no padding token: token %d fills up short texts", config.model.pretrained, pad_id)
    # models that read from left to right classify at the last token that is no padding
    model.pad_token_id = model.get_text_config().pad_token_id = pad_id


def _set_start(config: RunConfig, model: PreTrainedConfig) -> None:
    """A text is written from the decoder's start token on: by default, as in T5, the padding token."""
    given = config.model.pretrained is not None or "decoder_start_token_id" in (config.model.config or {})
    # what an architecture has by itself counts in the vocabulary that it was published with
    own = getattr(model, "decoder_start_token_id", None) if given else None
    if own is None and model.pad_token_id is not None:
        model.decoder_start_token_id = model.pad_token_id


def _alike(names: Sequence[str]) -> list[str]:
    return [name.casefold() for name in names]
