"""Checksums of what all ranks hold alike: replicas that differ are silent corruption of one of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from trainer.engine.gradients import Shards

BITS = 52
"""Every integer below 2⁵² is exact in the float64 of the message."""
_COLUMNS = 4096
_FACTOR = 6364136223846793005
"""Odd: a product with it modulo 2ⁿ loses no bit."""


def replica_checksum(engine: Any, shards: Shards, stage: int, further: Iterable[Tensor] = (), harm: int = 0) -> float:
    """A whole number below 2⁵² that changes with any flipped bit of what this rank should hold as all others do.

    ZeRO 0: weights, master weights and optimizer state; 1 and 2: the model's weights; 3: the small parameters that
    DeepSpeed leaves whole on every rank. In all of them the model's persistent buffers.

    Args:
        further: tensors that all ranks hold alike.
        harm: added: not 0 where this rank has found a part damaged that it holds alone.
    """
    return float((checksum([*replicas(engine, shards, stage), *further]) + harm) & ((1 << BITS) - 1))


def replicas(engine: Any, shards: Shards, stage: int) -> list[Tensor]:
    """The tensors that all ranks hold alike, as views."""
    module: nn.Module = engine.module
    tensors = [buffer for _, buffer in persistent_buffers(module)]
    if stage == 3:
        return tensors + [parameter.data for parameter in module.parameters() if whole_on_every_rank(parameter)]
    tensors += [parameter.data for parameter in module.parameters()]
    if stage == 0:
        known = {tensor.data_ptr() for tensor in tensors}
        for index, flat in enumerate(shards.flats()):
            if flat.data_ptr() not in known:
                tensors.append(flat)
            tensors += [value for value in shards.optimizer_state(index).values() if isinstance(value, Tensor)]
    return tensors


def whole_on_every_rank(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps the parameter unpartitioned between steps and holds it now."""
    return bool(getattr(parameter, "ds_persist", False)) and parameter.data.numel() == parameter.ds_numel


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to the model's state, by name."""
    names = set()
    for prefix, child in module.named_modules():
        skipped = child._non_persistent_buffers_set
        names |= {f"{prefix}.{name}" if prefix else name for name in child._buffers if name not in skipped}
    return [(name, buffer) for name, buffer in module.named_buffers() if name in names]


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> int:
    """52 bits of the tensors' content, in one pass over memory; equal contents on one kind of device give equal sums.

    In host memory XXH3; on a GPU sums of 32-bit words by column, multiplied by odd weights: a flipped bit changes one
    column by a power of two below 2³², and an odd multiple of that is not 0 modulo 2⁵².
    """
    host = xxhash.xxh3_64()
    total: Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if flat.device.type == "cpu":
            host.update(flat.numpy().data)
        elif flat.numel():
            part = _weighted_sum(flat)
            total = part if total is None else total * _FACTOR + part
    value = host.intdigest()
    if total is not None:
        value = value * _FACTOR + int(total.item())
    return value & ((1 << BITS) - 1)


def _weighted_sum(data: Tensor) -> Tensor:
    """0-dim int64 (wrapping) of a byte tensor on a GPU."""
    num_words = data.numel() // 4
    words = data[: num_words * 4].view(torch.int32)
    num_rows = num_words // _COLUMNS
    weights = torch.arange(1, 2 * (_COLUMNS + 4), 2, device=data.device, dtype=torch.int64) * _FACTOR
    total = (words[: num_rows * _COLUMNS].view(num_rows, _COLUMNS).sum(0, dtype=torch.int64) * weights[:_COLUMNS]).sum()
    tail = torch.cat([words[num_rows * _COLUMNS :].long(), data[num_words * 4 :].long()])
    return total * _FACTOR + (tail * weights[: tail.numel()]).sum()
