"""What a model computes on its way: hidden states and attention of chosen layers, seen by hooks during one forward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.attention import Attention, find_attention
from trainer.errors import ConfigError
from trainer.knowledge import AttentionStates


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformers model, in order.

    Raises:
        ConfigError: they are not recognised.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    number = getattr(text_config, "num_hidden_layers", None)
    for module in model.modules():
        # the outermost comes first: experts, which may be as many, lie within a block
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ConfigError([("model", f"the layers of {_name_of(model)} are not recognised")])


def num_layers(model: nn.Module) -> int:
    """Blocks of a transformers model.

    Raises:
        ConfigError: they are not recognised.
    """
    return len(find_layers(model))


class Capture:
    """Within it, the first forward pass of `model` leaves its states here: with gradient where they have one.

    The hooks exist from entry to exit. What they keep is the tensors that the model itself goes on with; nothing is
    copied. A recomputation of checkpointed activations changes nothing.

    Args:
        model: a transformers model, whole or sharded by ZeRO-3 (after `deepspeed.initialize`).
        layers: whose output is kept, from 1; 0: the embeddings as they enter the first layer.
        attention: layer whose queries, keys and values are kept, from 1.

    Raises:
        ConfigError: the model's layers or attention are not recognised, or it has no such layer.
    """

    states: dict[int, Tensor]
    """By layer, [B, T, H]; the last one is before a last norm."""

    def __init__(self, model: nn.Module, layers: Collection[int], attention: int | None = None):
        self.states = {}
        self._blocks = find_layers(model)
        self._layers = sorted(set(layers))
        for layer in [*self._layers, *([] if attention is None else [attention])]:
            if not 0 <= layer <= len(self._blocks) or (layer == 0 and attention == 0):
                raise ConfigError([("model", f"{_name_of(model)} has layers 1 to {len(self._blocks)}, and no {layer}")])
        self._attention: Attention | None = None
        if attention is not None:
            found = find_attention(self._blocks[attention - 1], getattr(model, "config", None))
            if not found or found[0].value is None:
                raise ConfigError(
                    [("model", f"the queries, keys and values of layer {attention} of {_name_of(model)} are not found")]
                )
            self._attention = found[0]
        self._parts: dict[str, Tensor] = {}
        self._normalised: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        # DeepSpeed's hooks were there before: ours see what theirs return, so that a loss on a state gathers weights
        for layer in self._layers:
            if layer == 0:
                self._handles.append(self._blocks[0].register_forward_pre_hook(self._see_input, with_kwargs=True))
            else:
                self._handles.append(self._blocks[layer - 1].register_forward_hook(self._see_state(layer)))
        if self._attention is not None:
            parts = {"query": self._attention.query, "key": self._attention.key, "value": self._attention.value}
            if self._attention.packing != "apart":
                parts = {"fused": self._attention.query}
            for name, module in parts.items():
                assert module is not None
                self._handles.append(module.register_forward_hook(self._see_part(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def attention(self) -> AttentionStates | None:
        """Queries, keys and values, each [B, T, heads · size]: queries and keys as their norms leave them where there
        are such, before any rotary embedding. None: not asked for, or no forward pass yet."""
        if self._attention is None or not self._parts:
            return None
        if "fused" in self._parts:
            return AttentionStates(*self._attention.split(self._parts["fused"]))
        value = self._parts["value"]
        return AttentionStates(self._flat("query", value), self._flat("key", value), value)

    def _flat(self, name: str, value: Tensor) -> Tensor:
        """[B, T, heads · size], whatever shape the norm was given: [B, T, heads, size], [B, heads, T, size], …"""
        part, length = self._parts[name], value.shape[1]
        if part.dim() == 4:
            second, third = part.shape[1:3]
            given = self._normalised[name]
            # as many heads as tokens: the memory tells, since a projection writes the heads of a token side by side
            if second != length or (third == length and given.stride(1) < given.stride(2)):
                part = part.transpose(1, 2)
        return part.reshape(value.shape[0], length, -1)

    def _see_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.states.setdefault(0, args[0] if args else kwargs["hidden_states"])

    def _see_state(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.states.setdefault(layer, output if isinstance(output, Tensor) else output[0])

        return see

    def _see_part(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def see(_module: nn.Module, inputs: Any, output: Tensor) -> None:
            if name not in self._parts:
                self._parts[name], self._normalised[name] = output, inputs[0]

        return see


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return f"{type(model).__name__} ({config.model_type})" if config is not None else type(model).__name__
