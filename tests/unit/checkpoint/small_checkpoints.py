"""Checkpoints of one rank, made from numbers alone, without a process group."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import CheckpointStore, State

Said = list[tuple[str, str]]


def make_manifest(step: int, **changes: Any) -> Manifest:
    return Manifest(
        **{
            "step": step,
            "attempt": step,
            "next_batch": step,
            "quarantine": ((1, 2),),
            "world_size": 1,
            "stage": 2,
            "global_batch": 8,
            "config_fingerprint": "c",
            "data_fingerprint": "d",
            "parameters": ("w",),
            "files": (),
            **changes,
        }
    )


def make_state(step: int, num_elements: int = 1000) -> State:
    generator = torch.Generator().manual_seed(step)
    return {
        "flat.0.master": torch.randn(num_elements, generator=generator),
        "buffer.mask": torch.tensor([True, False]),
    }, {"fragments": [], "step": step}


def make_store(folder: Path, said: Said | None = None, **options: Any) -> CheckpointStore:
    say = (lambda level, text: said.append((level, text))) if said is not None else (lambda level, text: None)
    values = {"rank": 0, "world_size": 1, "replicated": False, "keep": 9, "say": say, **options}
    return CheckpointStore(folder, **values)


def save_steps(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(make_state(step), make_manifest(step))


def same(left: State, right: State) -> bool:
    """Names, types, shapes, numbers and all bits."""
    return (
        left[1] == right[1]
        and left[0].keys() == right[0].keys()
        and all(bits(left[0][name]) == bits(right[0][name]) for name in left[0])
    )


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_and_die(folder: Path, after: int) -> None:
    """Save step 1, then step 1 once more and step 2, killed at the moment of that number in them."""
    left = after

    def moment(name: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    save_steps(make_store(folder, keep=1), 1)
    store = make_store(folder, keep=1, moment=moment)
    store.save(make_state(7), make_manifest(1))
    save_steps(store, 2)
