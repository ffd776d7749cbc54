"""Which layers of student and teacher a distillation looks into, and the sizes that decide whether they fit."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from trainer.config.distill import DistillConfig
from trainer.config.schema import ModelConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.configuration import pretrained_configuration

LayerPairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is kept of a forward pass, as arguments of :class:`trainer.model.capture.Capture`."""

    layers: tuple[int, ...]
    """Whose hidden states; 0: the embeddings."""
    attention: int | None
    """Whose queries, keys and values, from 1."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a transformer, from its configuration."""

    layers: int
    width: int
    """Features of a hidden state."""


def shape_of(config: PreTrainedConfig) -> Shape:
    """
    Raises:
        ConfigError: the configuration does not say it.
    """
    text_config = config.get_text_config()
    layers, width = (getattr(text_config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not isinstance(layers, int) or not isinstance(width, int):
        raise ConfigError([("model", f"a configuration of type {config.model_type} does not say its layers and width")])
    return Shape(layers, width)


def teacher_shape(config: RunConfig) -> Shape:
    """The shape of `distill.teacher`, from its configuration alone.

    Raises:
        ConfigError: it cannot be read.
    """
    assert config.distill is not None
    teacher = config.distill.teacher
    reference = ModelConfig(
        pretrained=teacher.pretrained, overrides=teacher.overrides, trust_remote_code=teacher.trust_remote_code
    )
    try:
        return shape_of(pretrained_configuration(reference))
    except ConfigError as error:
        problems = [(f"distill.teacher{path.removeprefix('model')}", text) for path, text in error.problems]
        raise ConfigError(problems) from error


def hidden_pairs(options: DistillConfig, student_layers: int, teacher_layers: int) -> LayerPairs:
    """(layer of the student, layer of the teacher) whose hidden states are compared; empty: none are.

    Raises:
        ConfigError: a layer that one of them does not have.
    """
    if options.hidden is None:
        return ()
    if options.hidden.layers is None:
        return ((student_layers, teacher_layers),)
    problems = [
        (f"distill.hidden.layers.{place}", f"names layer {layer} of the {who}, which has 0 (embeddings) to {last}")
        for place, pair in enumerate(options.hidden.layers)
        for who, layer, last in (("student", pair[0], student_layers), ("teacher", pair[1], teacher_layers))
        if layer > last
    ]
    if len(set(options.hidden.layers)) < len(options.hidden.layers):
        problems.append(("distill.hidden.layers", "has a pair twice"))
    if problems:
        raise ConfigError(problems)
    return options.hidden.layers


def wanted_of_student(options: DistillConfig, num_layers: int) -> Wanted:
    """What the losses need of a student with so many layers."""
    return _wanted(options, num_layers, 0, options.relations.student_layer if options.relations else None)


def wanted_of_teacher(options: DistillConfig, num_layers: int) -> Wanted:
    """What the losses need of a teacher with so many layers."""
    return _wanted(options, num_layers, 1, options.relations.teacher_layer if options.relations else None)


def _wanted(options: DistillConfig, num_layers: int, side: int, attention: int | None) -> Wanted:
    who = ("student", "teacher")[side]
    layers: tuple[int, ...] = ()
    if options.hidden is not None:
        pairs = options.hidden.layers
        layers = (num_layers,) if pairs is None else tuple(sorted({pair[side] for pair in pairs}))
    if options.relations is None:
        return Wanted(layers, None)
    if attention is not None and attention > num_layers:
        problem = f"is layer {attention}, but the {who} has layers 1 to {num_layers}"
        raise ConfigError([(f"distill.relations.{who}_layer", problem)])
    return Wanted(layers, attention or num_layers)
