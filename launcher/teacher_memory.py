"""Memory that the teacher of a distillation takes of a rank. Pure arithmetic, as `launcher.memory` has it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.resolve import Precision
from trainer.config.schema import RunConfig
from trainer.records import ModelFacts


@dataclass(frozen=True, slots=True)
class TeacherModel:
    """A teacher that is loaded by the ranks."""

    facts: ModelFacts
    precision: Precision


@dataclass(frozen=True, slots=True)
class TeacherMemory:
    """Bytes of one rank."""

    resident: int = 0
    """Its weights, or this rank's share of them: always there."""
    passing: int = 0
    """What is there while it is asked: weights that are gathered, one layer's activations, a chunk of logits."""


def layer_bytes(facts: ModelFacts, element: int, attention: str, length: int) -> int:
    """What one layer makes of one token, `element` bytes a number (`launcher.memory.activation_bytes` says what)."""
    hidden, inner = facts.hidden_size, facts.intermediate_size
    is_gated = any("gate" in parameter.name for parameter in facts.parameters)
    keys = next((p.shape[0] for p in facts.parameters if p.name.endswith("k_proj.weight")), hidden)
    result = element * (8 * hidden + 2 * keys + (4 if is_gated else 2) * inner)
    if attention == "eager":
        result += (4 + 2 * element) * facts.num_attention_heads * length
    return result


def largest_parameter(facts: ModelFacts) -> int:
    """Elements of it."""
    return max((parameter.num_elements for parameter in facts.parameters), default=0)


def chunk_of(config: RunConfig) -> int:
    """Positions of a micro-batch whose logits the loss of a distillation holds at once."""
    assert config.distill is not None
    return min(config.distill.loss.chunk, config.batch.micro * config.data.sequence_length)


def teacher_memory(config: RunConfig, teacher: TeacherModel | None, ranks: int) -> TeacherMemory:
    """What the teacher takes of the fullest rank.

    `replica`: all of its weights. `zero3`: this rank's share of them, of the ranks of a node with `within_node`; while
    it is asked one bucket that is fetched ahead and the largest parameter are gathered.

    A forward pass without gradients holds one layer's activations at a time, the hidden states between two layers, and
    those that are learned from (`hidden`, `relations`). Of its logits there is one chunk.

    Args:
        teacher: None: it is elsewhere, or there is none.
    """
    if teacher is None or config.distill is None:
        return TeacherMemory()
    distill, facts = config.distill, teacher.facts
    element = 4 if teacher.precision == "fp32" else 2
    weights, gathered = facts.num_parameters, 0
    if distill.teacher.place == "zero3":
        sharing = config.cluster.ranks_per_node if distill.teacher.within_node else ranks
        gathered = min(weights, config.zero.bucket_elements + largest_parameter(facts))
        weights = math.ceil(weights / sharing)
    length = config.data.sequence_length
    tokens = config.batch.micro * length
    kept = 0
    if distill.hidden is not None:
        kept += len({pair[1] for pair in distill.hidden.layers}) if distill.hidden.layers is not None else 1
    if distill.relations is not None:
        kept += 3
    of_token = layer_bytes(facts, element, distill.teacher.attention, length) + (2 + kept) * element * facts.hidden_size
    logits = 0 if config.objective.kind == "classification" else element * chunk_of(config) * facts.vocabulary
    return TeacherMemory(element * weights, element * gathered + tokens * of_token + logits)
