"""Mixup: what lies between two texts is to be classified as what lies between their targets."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.config.objective import TEXTS, ObjectiveConfig
from trainer.errors import ConfigError
from trainer.records import PARTNER, SHARE
from trainer.terms import Model, Objective, See, Terms


class Embeddings(Protocol):
    """The input embeddings of the model that is trained."""

    def mixed(self, own: Tensor, partners: Tensor, share: Tensor) -> AbstractContextManager[None]:
        """Within it, share · embeddings(own) + (1 − share) · embeddings(partners) are looked up."""
        ...


class Mixup:
    """λ·L(y) + (1 − λ)·L(y′) of one pass over λ·E(x) + (1 − λ)·E(x′): Zhang et al. 2018
    (https://arxiv.org/abs/1710.09412), on word embeddings as Guo et al. 2019 (https://arxiv.org/abs/1905.08941).

    The two texts are mixed place by place; where either has a token there is attention, and behind the end of the
    shorter one its padding is mixed in. Each sample has a partner and a λ of its own, which stand in the micro-batch.

    Args:
        objective: of whole texts, and of the model's logits alone. Its parts and measures are mixed alike; its scores
            of held-out texts are those without mixing.
    """

    def __init__(self, objective: Objective):
        self._objective = objective
        self._embeddings: Embeddings | None = None
        self.parts = objective.parts
        self.minimised = objective.minimised
        self.measures = objective.measures

    def attach(self, embeddings: Embeddings) -> None:
        """Say what is trained, before the first call."""
        self._embeddings = embeddings

    def alone(self, name: str) -> Mixup:
        result = Mixup(self._objective.alone(name))
        result._embeddings = self._embeddings
        return result

    def __call__(self, model: Model, tensors: Mapping[str, Tensor], see: See) -> Terms:
        assert self._embeddings is not None
        own = _own(tensors)
        partners = {name.removeprefix(PARTNER): each for name, each in tensors.items() if name.startswith(PARTNER)}
        share = tensors[SHARE]
        with self._embeddings.mixed(own["input_ids"], partners["input_ids"], share):
            logits = model(**_united(own, partners)).logits
        see(logits)
        terms = [
            (weight, self._objective(_Given(logits[row : row + 1]), _row(arrays, row), _blind))
            for arrays, weights in ((own, share), (partners, 1 - share))
            for row, weight in enumerate(weights)
        ]
        return Terms(
            _weighted([(weight, each.total) for weight, each in terms]),
            {name: _weighted([(weight, each.sums[name]) for weight, each in terms]) for name in terms[0][1].sums},
            {name: _weighted([(weight, each.measures[name]) for weight, each in terms]) for name in self.measures},
        )

    def targets(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._objective.targets(_own(tensors))

    def evaluate(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._objective.evaluate(model, _own(tensors))

    def predict(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._objective.predict(model, _own(tensors))

    def sample_losses(self, model: Model, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._objective.sample_losses(model, _own(tensors))


class _Given:
    """Stands for a model whose logits are known."""

    def __init__(self, logits: Tensor):
        self._outputs = SimpleNamespace(logits=logits)

    def __call__(self, **_: Any) -> SimpleNamespace:
        return self._outputs


def wrap(objective: Objective, config: ObjectiveConfig) -> Objective:
    """`objective` with the mixup that `config` asks for; itself where it asks for none.

    Raises:
        ConfigError: the targets are not those of whole texts, or follow from more than one pass.
    """
    if not config.mixup:
        return objective
    if config.r_drop:
        raise ConfigError([("objective.mixup", "mixes targets of one pass; R-Drop makes two: leave one of them out")])
    if config.kind not in TEXTS:
        raise ConfigError(
            [("objective.mixup", f"mixes targets of whole texts ({', '.join(TEXTS)}), not those of {config.kind}")]
        )
    return Mixup(objective)


def _united(own: Mapping[str, Tensor], partners: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with a token wherever either text has one: models read their length, and where they look for the
    class, from the tokens and from the mask."""
    if "attention_mask" not in own:
        return {name: tensor for name, tensor in own.items() if name != "labels"}
    present = own["attention_mask"] != 0
    return {name: each.where(present, partners[name]) for name, each in own.items() if name != "labels"}


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in tensors.items() if name != SHARE and not name.startswith(PARTNER)}


def _row(arrays: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: tensor[row : row + 1] for name, tensor in arrays.items()}


def _weighted(terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([weight.to(value.dtype) * value for weight, value in terms]).sum()


def _blind(_: Tensor) -> None:
    pass
