"""The weights that a run begins with and comes back to: those that are not trained, and those that it is drawn to."""

from __future__ import annotations

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from trainer.engine.checksum import checksum


@torch.no_grad()
def digest_of(module: nn.Module, *, everything: bool = False) -> str:
    """xxh3-128 of the frozen parameters (`everything`: of all), name by name: the same in every ZeRO stage. "": there
    are none. A collective where parameters are sharded, which are gathered one at a time."""
    chosen = [(name, each) for name, each in module.named_parameters() if everything or not each.requires_grad]
    if not chosen:
        return ""
    is_sharded = any(hasattr(parameter, "ds_id") for _, parameter in chosen)
    state = xxhash.xxh3_128()
    for name, parameter in chosen:
        if not is_sharded:
            _take(state, name, parameter)
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                _take(state, name, parameter)
    box = [state.hexdigest()]
    if is_sharded:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _take(state: xxhash.xxh3_128, name: str, parameter: Tensor) -> None:
    state.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
    state.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class FrozenParts:
    """ZeRO-3: this rank's parts of the weights that are not trained, which no other rank holds. They are compared with
    themselves as the run began."""

    def __init__(self, module: nn.Module):
        self._frozen = [each for each in module.parameters() if not each.requires_grad and hasattr(each, "ds_tensor")]
        self._before = self._checksum()

    def harm(self) -> int:
        """0: they are what they were. Else what this rank's checksum is to be off by: so it shows between ranks."""
        now = self._checksum()
        return 0 if now == self._before else ((now ^ self._before) & 0xFFFFF) | 1

    def _checksum(self) -> int:
        return checksum(parameter.ds_tensor.data for parameter in self._frozen)
