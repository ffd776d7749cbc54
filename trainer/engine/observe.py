"""Slow signs of a run that will fail: the size of logits, weights and updates. Measured without changing a bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.attention import find_attention
from trainer.engine.gradients import Shards
from trainer.records import FloatArray


@dataclass(frozen=True, slots=True)
class WeightStats:
    """Norms of the weights and of their last update, [parameters], equal on all ranks."""

    parameter_norms: FloatArray
    update_ratios: FloatArray
    """‖update‖ / ‖weight‖; NaN where the weight is all zero."""


def compare_weights(shards: Shards, before: Sequence[Tensor], num_parameters: int, device: torch.device) -> WeightStats:
    """Norms of the present master weights and of their difference to `before` (flat as they are). A collective."""
    after = shards.flats()
    vector = torch.zeros(2, num_parameters, dtype=torch.float64, device=device)
    for fragment in shards.fragments:
        if fragment.counted:
            place = slice(fragment.offset, fragment.offset + fragment.num_elements)
            new, old = after[fragment.flat][place], before[fragment.flat][place]
            vector[0, fragment.parameter] += new.double().square().sum()
            vector[1, fragment.parameter] += (new - old).double().square().sum()
    dist.all_reduce(vector)
    weights, updates = np.sqrt(vector.cpu().numpy())
    with np.errstate(divide="ignore", invalid="ignore"):
        return WeightStats(weights, np.where(weights > 0, updates / weights, np.nan))


class LogitProbe:
    """Bounds of the attention logits and the largest output logit, from hooks that are there while armed.

    The logit of a query q and a key k is q·k/√d ≤ ‖q‖·‖k‖/√d (Cauchy–Schwarz), and a rotary embedding changes no norm;
    so max‖q‖·max‖k‖/√d over all positions and heads bounds a layer's logits whatever the attention kernel, which
    keeps them to itself. Models are recognised as in :mod:`trainer.attention`; in others nothing is found.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self._layers = find_attention(module)
        self._device = device
        self._armed = False
        self._watching = False
        self._largest = torch.zeros(len(self._layers), 2, device=device)
        self._output = torch.zeros((), device=device)

    def arm(self) -> None:
        """Watch during the next :meth:`watching`."""
        self._armed = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The forward passes within are watched where :meth:`arm` was called before."""
        if not self._armed:
            yield
            return
        self._armed, self._watching = False, True
        self._largest.zero_()
        self._output.zero_()
        handles = []
        for index, layer in enumerate(self._layers):
            if layer.packing != "apart":
                handles.append(layer.query.register_forward_hook(self._hook(index, None)))
            else:
                handles.append(layer.query.register_forward_hook(self._hook(index, 0)))
                handles.append(layer.key.register_forward_hook(self._hook(index, 1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._watching = False

    @torch.no_grad()
    def see_output(self, logits: Tensor) -> None:
        """The model's output logits, any shape."""
        if self._watching:
            smallest, largest = torch.aminmax(logits.detach())
            self._output = torch.maximum(self._output, torch.maximum(-smallest, largest).float())

    def reduce(self) -> tuple[FloatArray, float]:
        """(bound of the attention logits, [layers]; largest absolute output logit), equal on all ranks; infinite where
        something was not a number. A collective."""
        vector = torch.cat([self._largest.flatten(), self._output[None]]).double()
        vector.nan_to_num_(nan=math.inf, posinf=math.inf)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
        values = vector.cpu().numpy()
        products = values[:-1].reshape(-1, 2).prod(axis=1)
        bounds = products / np.sqrt([float(layer.head_size) for layer in self._layers])
        return np.nan_to_num(bounds, nan=math.inf, posinf=math.inf), float(values[-1])

    def _hook(self, layer: int, which: int | None) -> Callable[[nn.Module, Any, Tensor], None]:
        """Sees queries (0), keys (1), or both and values in one tensor (None)."""

        @torch.no_grad()
        def see(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if which is None:
                query, key, _ = self._layers[layer].split(output.detach())
                self._see(layer, 0, query)
                self._see(layer, 1, key)
            else:
                self._see(layer, which, output.detach())

        return see

    def _see(self, layer: int, which: int, states: Tensor) -> None:
        heads = states.reshape(-1, self._layers[layer].head_size)
        largest = torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32).amax()
        self._largest[layer, which] = torch.maximum(self._largest[layer, which], largest)
