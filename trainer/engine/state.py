"""This rank's part of the training state as named tensors and plain numbers: what a checkpoint or a snapshot holds.

Randomness, learning rate and data order are functions of the position, so nothing of them is kept here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.engine.audit import Updates
from trainer.engine.checksum import persistent_buffers
from trainer.engine.gradients import Fragment
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError

MASTER = "master"


def read_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The live tensors (not copies) by name, and the numbers that go with them.

    Names are `flat.INDEX.master`, `flat.INDEX.exp_avg`, … for the flat master tensors of this rank, `buffer.NAME`
    for the model's persistent buffers. The numbers hold, as plain JSON: the fragments that say which parameter lies
    where, scalar optimizer state, hyperparameters of every group, the loss scaler and DeepSpeed's counters.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, flat in enumerate(engine.shards.flats()):
        tensors[f"flat.{index}.{MASTER}"] = flat
        for key, value in engine.shards.optimizer_state(index).items():
            if isinstance(value, Tensor) and value.numel() == flat.numel() and value.dim() > 0:
                tensors[f"flat.{index}.{key}"] = value.view(-1)
            else:
                number = value.item() if isinstance(value, Tensor) else value
                scalars.setdefault(str(index), {})[key] = number
    for name, buffer in persistent_buffers(engine.module):
        tensors[f"buffer.{name}"] = buffer
    numbers = {
        "stage": engine.stage,
        "fragments": [_fragment_to_json(fragment) for fragment in engine.shards.fragments],
        "scalars": scalars,
        "groups": [_hyperparameters(group) for group in engine.shards.inner.param_groups],
        "loss_scaler": _loss_scaler(engine),
        "counters": {name: getattr(engine.deepspeed, name) for name in COUNTERS},
    }
    return tensors, numbers


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@torch.no_grad()
def write_state(engine: Engine, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put a state that :func:`read_state` gave, on a run of the same shape, into the live engine. A collective.

    Raises:
        CheckpointError: the state is of another shape; nothing has been changed then.
    """
    fragments = [_fragment_to_json(fragment) for fragment in engine.shards.fragments]
    if numbers["stage"] != engine.stage or numbers["fragments"] != fragments:
        raise CheckpointError(
            "the checkpoint was written with another ZeRO stage, number of ranks or model; "
            "resume with the same zero.stage, ranks and model"
        )
    flats = engine.shards.flats()
    left = set(tensors)
    for index, flat in enumerate(flats):
        state = engine.shards.optimizer_state(index)
        prefix = f"flat.{index}."
        scalars = numbers["scalars"].get(str(index), {})
        for key in [key for key in state if f"{prefix}{key}" not in tensors and key not in scalars]:
            # a state from before the first step has no moments: the optimizer makes them anew
            del state[key]
        for name in [name for name in tensors if name.startswith(prefix)]:
            key = name.removeprefix(prefix)
            left.discard(name)
            if key == MASTER:
                flat.copy_(tensors[name])
            elif key in state:
                state[key].view(-1).copy_(tensors[name])
            else:
                shape = engine.shards.master_shape(index)
                state[key] = tensors[name].to(flat.device, copy=True).view(shape)
        for key, value in scalars.items():
            if isinstance(state.get(key), Tensor):
                state[key].fill_(value)
            else:
                state[key] = engine.shards.scalar_state(key, value, flat)
    for name, buffer in persistent_buffers(engine.module):
        buffer.copy_(tensors[f"buffer.{name}"])
        left.discard(f"buffer.{name}")
    if left:
        raise CheckpointError(f"the checkpoint holds {sorted(left)[0]!r}, which this run has no place for")
    for group, saved in zip(engine.shards.inner.param_groups, numbers["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    _set_loss_scaler(engine, numbers["loss_scaler"])
    for name, value in numbers["counters"].items():
        setattr(engine.deepspeed, name, value)
    engine.shards.publish()
    engine.updates = Updates()


@torch.no_grad()
def reset_moments(engine: Engine) -> None:
    """Adam's moments and its step counts as at the start of a run; weights and schedule stay."""
    for index, flat in enumerate(engine.shards.flats()):
        state = engine.shards.optimizer_state(index)
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":
                state[key] = engine.shards.scalar_state(key, 0, flat)


def _fragment_to_json(fragment: Fragment) -> dict[str, Any]:
    return {
        "name": fragment.name,
        "shape": list(fragment.shape),
        "start": fragment.start,
        "num_elements": fragment.num_elements,
        "flat": fragment.flat,
        "offset": fragment.offset,
    }


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, int | float | str | tuple)}


def _scaler(engine: Engine) -> Any:
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _loss_scaler(engine: Engine) -> dict[str, float]:
    scaler = _scaler(engine)
    if scaler is None:
        return {}
    return {key: value for key, value in vars(scaler).items() if type(value) in (int, float)}


def _set_loss_scaler(engine: Engine, saved: dict[str, float]) -> None:
    scaler = _scaler(engine)
    for key, value in saved.items():
        setattr(scaler, key, value)
