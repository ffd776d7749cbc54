"""The last map of a language model, taken out of its forward pass: what goes into it is used where its weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.knowledge import Head
from trainer.terms import Model

Compute = Callable[[Tensor, Head], Tensor]
"""(what goes into the head [B, T, H], the head with its values) → anything of one tensor."""

_SCALES: dict[str, Callable[[float], tuple[float, ...]]] = {
    "logit_scale": lambda x: (x,),  # Cohere
    "logits_scaling": lambda x: (1 / x, x),  # Granite divides, HyperCLOVA X multiplies
    "lm_head_multiplier": lambda x: (x,),  # Falcon H1
    "output_multiplier": lambda x: (x,),
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
_PROBED = 60.0
"""Largest logit that is tried: beyond the soft caps in use."""


@dataclass(frozen=True, slots=True)
class InterceptedHead:
    """The head of one model, whole or sharded; made by :func:`find_head`."""

    module: nn.Module
    scale: float
    softcap: float | None

    def weights(self) -> Head:
        """The head as it lies in memory: under ZeRO-3 without values, unless it is gathered."""
        bias = getattr(self.module, "bias", None)
        return Head(_weight(self.module), bias if isinstance(bias, Tensor) else None, self.scale, self.softcap)

    def run(self, model: Model, tensors: Mapping[str, Tensor], compute: Compute) -> Tensor:
        """One forward pass with `compute` in the place of the head. Logits are not made.

        `compute` runs within the head's forward pass, where ZeRO-3 has gathered its weights. What it returns leaves
        through DeepSpeed's hooks of the head, so that its backward pass finds them gathered too.

        Args:
            model: what is called: the model, or DeepSpeed's engine around it.
            tensors: its arguments.

        Returns:
            What `compute` returned. Where gradients are enabled, a 0-dim total to be minimised.
        """
        results: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            return compute(hidden, self.weights())

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            results.append(output)
            # with a gradient function: DeepSpeed prepares its backward pass in a hook on the model's output
            stand_in = output.new_zeros((1,), requires_grad=output.requires_grad)
            return stand_in.expand(*inputs[0].shape[:-1], 1)

        # registered after DeepSpeed's own hooks, and so called with what those return
        handle = self.module.register_forward_hook(keep)
        try:
            with _replaced(self.module, forward):
                outputs = model(**tensors)
        finally:
            handle.remove()
        (result,) = results
        return result + outputs.logits.sum() * 0 if result.requires_grad else result


class StandIn(nn.Module):
    """Takes the place of a head in a frozen model, and keeps what went into it. ZeRO-3 then never gathers the head."""

    def __init__(self, head: InterceptedHead):
        super().__init__()
        # not as a submodule: its parameters are none of the model any more
        self.__dict__["_head"] = head.module
        self.training = head.module.training
        self._seen: list[Tensor] = []

    @classmethod
    def put_into(cls, model: nn.Module, head: InterceptedHead) -> StandIn:
        """Exchange the head of `model` for good."""
        stand_in = cls(head)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if child is head.module:
                    setattr(parent, name, stand_in)
        return stand_in

    @property
    def weight(self) -> Any:
        """Some models look at its type before they call their head."""
        return self.__dict__["_head"].weight

    def forward(self, hidden: Tensor) -> Tensor:
        self._seen.append(hidden)
        return hidden.new_zeros((1,)).expand(*hidden.shape[:-1], 1)

    def take(self) -> Tensor:
        """What went into the head in the last forward pass, [B, T, H]."""
        (hidden,) = self._seen
        self._seen.clear()
        return hidden


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Whole logits [B, T, V] in the type of `hidden`: for small things."""
    return finish(F.linear(hidden, head.weight, head.bias), head.scale, head.softcap)


def finish(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """cap(scale · logits), cap(x) = softcap · tanh(x / softcap)."""
    logits = logits * scale if scale != 1.0 else logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@torch.no_grad()
def find_head(model: nn.Module, call: Model | None = None) -> InterceptedHead:
    """The head of a transformers language model, tried on one short text: what the model does to its logits is known.

    A collective where the model is sharded by ZeRO-3.

    Args:
        model: in evaluation mode, so that no random number is drawn.
        call: what runs it: DeepSpeed's engine. None: the model itself.

    Raises:
        ConfigError: it has no head, or does something to its logits that is not a known scale and soft cap.
    """
    name = type(model).__name__
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if not isinstance(module, nn.Module) or not isinstance(getattr(module, "weight", None), Tensor):
        raise ConfigError([("model", f"{name} has no output embeddings: its knowledge cannot be taken from its head")])
    given, linear = _probe(module, model if call is None else call)
    sent, received = given
    if linear:
        config: Any = getattr(model, "config", None)
        for scale in _candidates(config, _SCALES):
            for softcap in (*_numbers(config, _SOFTCAPS), None):
                if received.shape == sent.shape and _close(finish(sent, scale, softcap), received):
                    return InterceptedHead(module, scale, softcap)
    what = "changes its logits" if linear else "makes its logits"
    raise ConfigError([("model", f"{name} {what} in a way that is not known; distillation would learn something else")])


def _probe(module: nn.Module, call: Model) -> tuple[tuple[Tensor, Tensor], bool]:
    """((logits given to the model in the place of its own, what it made of them), whether the head is a linear map)."""
    size, rows = 4, _rows(module)
    sent = torch.linspace(-_PROBED, _PROBED, rows)
    linear: list[bool] = []
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or args[0].dim() != 3:
            linear.append(False)
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        hidden = args[0]
        bias = getattr(module, "bias", None)
        linear.append(_close(F.linear(hidden, _weight(module), bias), original(hidden)))
        return sent.to(hidden.device, hidden.dtype).expand(*hidden.shape[:-1], rows)

    device = _weight(module).device
    ids = torch.arange(size, device=device).view(1, size)
    with _replaced(module, forward):
        received = call(input_ids=ids).logits
    dtype = _weight(module).dtype
    # some models turn their logits into fp32 at the end
    given = sent.to(device, dtype).float().expand(1, size, rows)
    return (given, received.to(dtype)), linear == [True]


def _rows(module: nn.Module) -> int:
    weight = _weight(module)
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _close(expected: Tensor, found: Tensor) -> bool:
    """Equal within the rounding of the type of `found`, which is the model's; bf16 keeps 8 bits."""
    tolerance = 0.02 if found.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool((expected.float() - found.float()).abs().max() <= tolerance * found.float().abs().max())


def _candidates(config: Any, fields: Mapping[str, Callable[[float], tuple[float, ...]]]) -> list[float]:
    """Scales that the configuration can mean, likeliest first."""
    found = [value for name, make in fields.items() for x in _numbers(config, (name,)) for value in make(x)]
    return [*found, 1.0]


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = [getattr(config, name, None) for name in names]
    return [float(value) for value in values if isinstance(value, int | float) and value]


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
