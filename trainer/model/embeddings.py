"""The output of a model's input embeddings, changed on its way into the first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError


class InputEmbeddings:
    """The input embeddings of one model, whole or sharded; made by :func:`find_embeddings`.

    Attributes:
        module: looks the tokens up.
        encoder: of an encoder–decoder model: only what is looked up within its forward pass is changed, since the
            decoder may share the module. None: the model is one stack.
        sharded: by ZeRO-3, whose hooks count the passes through a graph: none can be gone through twice.
    """

    def __init__(self, module: nn.Module, encoder: nn.Module | None, sharded: bool):
        self.module = module
        self.encoder = encoder
        self.sharded = sharded

    @contextmanager
    def moved(self, delta: Tensor | None) -> Iterator[list[Tensor]]:
        """Within it, every forward pass goes on from embeddings + `delta`.

        The hook is there from entry to exit and sees what DeepSpeed's own hooks return, so that a gradient with respect
        to the embeddings ends before the lookup and its weight: no parameter is reached.

        Args:
            delta: [B, L, H] of any floating type, cast to that of the embeddings; where the same samples go through
                the model n times at once, [n·B, L, H], every time. None: they stay as they are.

        Returns:
            The embeddings that the model went on with, [n·B, L, H], one for each forward pass; they have a gradient
            where gradients are enabled, even where the lookup is frozen.

        Raises:
            ValueError: the embeddings have a shape that does not fit `delta`.
        """
        seen: list[Tensor] = []

        def change(output: Tensor) -> Tensor:
            if delta is not None:
                times, rest = divmod(len(output), len(delta))
                if rest or delta.shape[1:] != output.shape[1:]:
                    raise ValueError(
                        f"embeddings of the shape {list(output.shape)} cannot be moved by {list(delta.shape)}"
                    )
                output = output + delta.to(output.dtype).repeat(times, 1, 1)
            if torch.is_grad_enabled() and not output.requires_grad:
                output = output.detach().requires_grad_()
            seen.append(output)
            return output

        with self._hooked(change):
            yield seen

    @contextmanager
    def mixed(self, own: Tensor, partners: Tensor, share: Tensor) -> Iterator[None]:
        """Within it, what is looked up is share · embeddings(own) + (1 − share) · embeddings(partners), whatever tokens
        the model asks for. One lookup of both, within the module's own forward pass: where ZeRO-3 has its weight.

        Args:
            own, partners: tokens [B, L].
            share: [B].

        Raises:
            ValueError: the model asks for another number of tokens.
        """
        original, before = self.module.forward, self.module.__dict__.get("forward")
        both = torch.cat([own, partners])

        def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if ids.shape != own.shape:
                raise ValueError(f"tokens of the shape {list(ids.shape)} cannot be mixed with {list(own.shape)}")
            ours, theirs = original(both, *args, **kwargs).chunk(2)
            factor = share.to(ours.dtype)[:, None, None]
            mixed: Tensor = factor * ours + (1 - factor) * theirs
            return mixed

        self.module.forward = forward
        try:
            yield
        finally:
            if before is None:
                del self.module.forward
            else:
                self.module.forward = before

    @contextmanager
    def _hooked(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        inside = self.encoder is None

        def enter(*_: Any) -> None:
            nonlocal inside
            inside = True

        def leave(*_: Any) -> None:
            nonlocal inside
            inside = False

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            return change(output) if inside else None

        handles = [self.module.register_forward_hook(hook)]
        if self.encoder is not None:
            handles.append(self.encoder.register_forward_pre_hook(enter))
            handles.append(self.encoder.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_embeddings(model: nn.Module) -> InputEmbeddings:
    """The input embeddings of a transformers model; of an encoder–decoder model, its encoder's.

    Args:
        model: not DeepSpeed's engine around it; under ZeRO-3 after `deepspeed.initialize`.

    Raises:
        ConfigError: it has none, or recomputes activations in a way that allows no gradient of its embeddings alone.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    encoder: nn.Module | None = None
    if getattr(config, "is_encoder_decoder", False):
        encoder = model.get_encoder()  # type: ignore[operator]
    stack = model if encoder is None else encoder
    getter = getattr(stack, "get_input_embeddings", None)
    try:
        module = getter() if getter is not None else None
    except NotImplementedError:
        module = None
    if not isinstance(module, nn.Module):
        raise ConfigError([("model", f"{name} has no input embeddings that could be moved or mixed")])
    if _recomputes_reentrantly(model):
        raise ConfigError(
            [
                (
                    "model.activation_checkpointing",
                    f"{name} recomputes activations in torch's reentrant way, which has no gradient of the embeddings "
                    "alone; enable it with use_reentrant=False",
                )
            ]
        )
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return InputEmbeddings(module, encoder, sharded)


def _recomputes_reentrantly(model: nn.Module) -> bool:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and function is not None:
            options = getattr(function, "keywords", {})
            if options.get("use_reentrant", False):
                return True
    return False
