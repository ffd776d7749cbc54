"""Digests of weights that nothing may change."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

_BYTES_AT_ONCE = 1 << 26


def digest(tensor: Tensor) -> int:
    """XXH3 (64 bits) of a tensor's content. From a GPU it is copied to the host in pieces."""
    hashed = xxhash.xxh3_64()
    for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(_BYTES_AT_ONCE):  # type: ignore[no-untyped-call]
        hashed.update(piece.cpu().numpy().data)
    return hashed.intdigest()
