"""What this rank itself computed: the norm of each of its gradients, seen in the backward pass before any reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.engine.injection import Injector


class LocalNorms:
    """Adds up the squared gradient norms of this rank's micro-batches.

    Hooks on the parameters see a gradient once a micro-batch (a tied weight's whole gradient once), before DeepSpeed's
    own hooks do, in every ZeRO stage and under activation checkpointing. Nothing waits for the device.
    """

    def __init__(self, injector: Injector):
        self._injector = injector
        self._norms: list[Tensor] = []

    def watch(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See the gradients of these parameters from now on."""
        for index, parameter in enumerate(parameters):
            parameter.register_hook(self._hook(index))  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Forget what was seen: another batch begins."""
        self._norms.clear()

    def squared(self) -> Tensor | None:
        """Σ ‖g‖² over parameters and micro-batches since :meth:`clear`, as DeepSpeed scaled the loss; 0-dim float64.
        None: no gradient was seen."""
        if not self._norms:
            return None
        return torch.stack(self._norms).double().square_().sum()

    def _hook(self, index: int) -> Callable[[Tensor], Tensor | None]:
        injector = self._injector

        def see(gradient: Tensor) -> Tensor | None:
            changed = injector.local_gradient(index, gradient) if injector.active else gradient
            # kept gradients could not be accumulated in place: only their norms stay
            self._norms.append(torch.linalg.vector_norm(changed.detach(), dtype=torch.float32))
            return None if changed is gradient else changed

        return see
