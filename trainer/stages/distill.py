"""Distillation as an objective: the student's forward pass with the loss in its head, the teacher asked beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.config.distill import DistillConfig, DistillLossConfig
from trainer.config.schema import RunConfig
from trainer.engine.zero import Engine
from trainer.knowledge import (
    BESIDE_INPUTS,
    DATA_SHARE,
    TEACHER_IDS,
    TEACHER_LOG_PROBABILITIES,
    WRITTEN,
    Head,
    Knowledge,
    LogitTargets,
    Targets,
    Teacher,
)
from trainer.model.capture import Capture, num_layers
from trainer.model.head import InterceptedHead, find_head
from trainer.model.inner import LayerPairs, Wanted, hidden_pairs, teacher_shape, wanted_of_student
from trainer.model.projections import projector
from trainer.model.writing import write_ends
from trainer.objectives.fused import Distilled, fused_distillation, measures_of
from trainer.objectives.hidden import hidden_sum, token_weights
from trainer.objectives.logits import logit_distillation
from trainer.objectives.relations import relations_sum
from trainer.objectives.tasks import Classification, Task
from trainer.terms import Model, See, Terms


class Distillation:
    """The objective of a distillation. `loss` is the cross-entropy with the data's labels, whatever its weight; the
    other parts are as they enter the total.

    Args:
        vocabulary: real tokens, which both models have; rows of padding beyond are left out of the divergence.
        end: end-of-text.
    """

    def __init__(self, teacher: Teacher, config: RunConfig, *, vocabulary: int, end: int):
        assert config.distill is not None
        self._teacher = teacher
        self._options: DistillConfig = config.distill
        self._loss: DistillLossConfig = config.distill.loss
        self._scored = cross_entropy_only(config.distill.loss)
        self._z_loss = config.objective.z_loss
        self._classifies = config.objective.kind == "classification"
        self._sharded = config.zero.stage == 3
        self._vocabulary, self._end = vocabulary, end
        self._hidden, self._relations = config.distill.hidden, config.distill.relations
        self._config = config
        self._wanted = Wanted((), None)
        self._pairs: LayerPairs = ()
        self._module: PreTrainedModel | None = None
        self._head: InterceptedHead | None = None
        self.minimised = tuple(name for name, weight in self._weights().items() if weight)
        self.parts = tuple(name for name in self.minimised if name != "cross-entropy")
        self.measures = measures_of(uld=self._options.vocabulary == "uld")

    def _weights(self) -> dict[str, float]:
        return {
            "cross-entropy": self._loss.cross_entropy,
            "distillation": self._loss.weight,
            "hidden": self._hidden.weight if self._hidden else 0.0,
            "relations": self._relations.weight if self._relations else 0.0,
            "z_loss": self._z_loss,
        }

    def attach(self, engine: Engine) -> None:
        """Find the head of the student. A collective.

        Raises:
            ConfigError: its head, layers or attention are not known.
        """
        module = engine.module
        assert isinstance(module, PreTrainedModel)
        self._module = module
        if not self._classifies:
            module.train(False)
            self._head = find_head(module, engine.deepspeed)
            module.train()
        if self._looks_inside:
            student, teacher = num_layers(module), teacher_shape(self._config).layers
            self._wanted = wanted_of_student(self._options, student)
            self._pairs = hidden_pairs(self._options, student, teacher)

    def alone(self, name: str) -> Distillation:
        result = copy.copy(self)
        kept = {"cross-entropy": "cross_entropy", "distillation": "weight"}.get(name)
        result._loss = self._loss.model_copy(update={one: 0.0 for one in ("cross_entropy", "weight") if one != kept})
        result._z_loss = self._z_loss if name == "z_loss" else 0.0
        result._hidden = self._hidden if name == "hidden" else None
        result._relations = self._relations if name == "relations" else None
        return result

    def __call__(self, model: Model, tensors: Mapping[str, Tensor], see: See) -> Terms:
        assert self._module is not None
        tensors = self._with_own_text(model, tensors)
        with torch.no_grad():
            knowledge = self._teacher.knowledge(tensors)
        labels, written = tensors["labels"], tensors.get(WRITTEN)
        inputs = _inputs(tensors)
        parts: dict[str, Tensor] = {}
        found: list[Distilled] = []

        def total_of(distilled: Distilled) -> Tensor:
            found.append(distilled)
            parts.update(self._inner(seen, knowledge, tensors))
            total = distilled.total
            for value in parts.values():
                total = total + value
            return total

        def compute(hidden: Tensor, head: Head) -> Tensor:
            return total_of(
                fused_distillation(
                    hidden,
                    head,
                    labels,
                    knowledge.targets,
                    self._loss,
                    z_loss=self._z_loss,
                    vocabulary=self._vocabulary,
                    uld=self._options.vocabulary == "uld",
                    written=written,
                    see=see,
                )
            )

        watching = Capture(self._module, self._wanted.layers, self._wanted.attention) if self._looks_inside else None
        with watching or nullcontext() as seen:
            if self._head is not None:
                total = self._head.run(model, inputs, compute)
            else:
                logits = model(**inputs).logits
                see(logits)
                total = total_of(logit_distillation(logits, labels, _of_classes(knowledge.targets), self._loss))
        return self._terms(total, found[0], parts, tensors)

    @property
    def _looks_inside(self) -> bool:
        return self._hidden is not None or self._relations is not None

    def _inner(self, seen: Capture | None, knowledge: Knowledge, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts that come from hidden states and attention, as they enter the total."""
        if seen is None:
            return {}
        assert self._module is not None
        mask = tensors.get("attention_mask")
        weights = token_weights(tensors["labels"], mask, length=tensors["input_ids"].shape[1])
        parts = {}
        if self._hidden is not None:
            project = projector(self._module)
            value = hidden_sum(seen.states, knowledge.states, self._pairs, self._hidden.kind, weights, project)
            parts["hidden"] = self._hidden.weight * value
        if self._relations is not None:
            assert seen.attention is not None
            assert knowledge.attention is not None
            value = relations_sum(seen.attention, knowledge.attention, self._relations.heads, weights, mask)
            parts["relations"] = self._relations.weight * value
        return parts

    def _terms(
        self, total: Tensor, distilled: Distilled, parts: dict[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> Terms:
        loss = distilled.cross_entropy
        if WRITTEN in tensors:
            # a mean over the targets that are the data's, with the divisor that the engine uses
            loss = loss.where(~tensors[WRITTEN], 0.0) / tensors[DATA_SHARE][0, 0].clamp(min=1e-6)
        sums = {"loss": loss.sum()}
        if "distillation" in self.parts:
            sums["distillation"] = self._loss.weight * distilled.divergence.sum()
        if "z_loss" in self.parts:
            sums["z_loss"] = distilled.z_loss
        sums |= {
            name: parts[name] if name in parts else total.new_zeros(())
            for name in ("hidden", "relations")
            if name in self.parts
        }
        return Terms(total, sums, distilled.measures)

    def targets(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return Task().targets(tensors["labels"])

    def predict(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._classifies:
            return Classification().predict(model(**_inputs(tensors)).logits, tensors["labels"])
        return {"loss": self.sample_losses(model, tensors), "num_targets": self.targets(tensors)}

    def evaluate(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._plain(model, tensors)
        return {"loss": found.cross_entropy.sum(), "accuracy": found.right}

    def sample_losses(self, model: Model, tensors: Mapping[str, Tensor]) -> Tensor:
        losses = self._plain(model, tensors).cross_entropy
        result: Tensor = losses.flatten(1).sum(1) if losses.dim() > 1 else losses
        return result

    def _plain(self, model: Model, tensors: Mapping[str, Tensor]) -> Distilled:
        """The cross-entropy with the labels, without a teacher and without a gradient."""
        if self._head is None:
            return logit_distillation(model(**_inputs(tensors)).logits, tensors["labels"], None, self._scored)
        found: list[Distilled] = []

        def compute(hidden: Tensor, head: Head) -> Tensor:
            found.append(fused_distillation(hidden, head, tensors["labels"], None, self._scored))
            return found[0].total

        self._head.run(model, _inputs(tensors), compute)
        return found[0]

    def _with_own_text(self, model: Model, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The micro-batch, the ends of the chosen samples written by the student."""
        options = self._options.on_policy
        if options is None:
            return tensors
        assert self._module is not None
        rows = tensors[WRITTEN].any(dim=1)
        if not rows.any():
            if not self._sharded:
                return tensors
            # the others may write, and gather weights with every token
            rows = rows.clone()
            rows[0] = True
        positions = tensors.get("position_ids")
        ids = write_ends(
            self._module,
            model,
            tensors["input_ids"][rows],
            tokens=options.tokens,
            temperature=options.temperature,
            end=self._end,
            positions=None if positions is None else positions[rows],
        )
        if not tensors[WRITTEN].any():
            return tensors
        input_ids, labels = tensors["input_ids"].clone(), tensors["labels"].clone()
        input_ids[rows] = ids
        labels[rows, -options.tokens - 1 : -1] = ids[:, -options.tokens :]
        changed = {**tensors, "input_ids": input_ids, "labels": labels}
        # what a server said beforehand was of the data's text
        for name in (TEACHER_IDS, TEACHER_LOG_PROBABILITIES):
            changed.pop(name, None)
        if positions is not None:
            changed["position_ids"] = _positions(input_ids, positions, rows, options.tokens, self._end)
        return changed


def cross_entropy_only(options: DistillLossConfig) -> DistillLossConfig:
    """What a model is scored by, as many positions at once as in training."""
    return options.model_copy(update={"weight": 0.0, "cross_entropy": 1.0})


def _of_classes(targets: Targets | None) -> LogitTargets:
    assert isinstance(targets, LogitTargets)
    return targets


def _inputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "labels" and name not in BESIDE_INPUTS}


def _positions(ids: Tensor, positions: Tensor, rows: Tensor, tokens: int, end: int) -> Tensor:
    """Positions of samples whose ends were written: they begin again behind an end-of-text."""
    positions = positions.clone()
    for column in range(ids.shape[1] - tokens, ids.shape[1]):
        after = torch.where(ids[:, column - 1] == end, 0, positions[:, column - 1] + 1)
        positions[:, column] = torch.where(rows, after, positions[:, column])
    return positions
