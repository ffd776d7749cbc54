"""This rank's part of the training state as named tensors and plain numbers: what a checkpoint or a snapshot holds.

Randomness, learning rate and data order are functions of the position, so nothing of them is kept here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.engine.admission import AVERAGE, MASTER, admit, restored_hyperparameters
from trainer.engine.audit import Updates
from trainer.engine.checksum import persistent_buffers
from trainer.engine.gradients import Fragment
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def read_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The live tensors (not copies) by name, and the numbers that go with them.

    Names are `flat.INDEX.master`, `flat.INDEX.exp_avg`, … for the flat master tensors of this rank, `buffer.NAME`
    for the model's persistent buffers. The numbers hold, as plain JSON: the fragments that say which parameter lies
    where, the flat tensors' sizes and groups, scalar optimizer state, hyperparameters of every group, the loss scaler,
    DeepSpeed's counters, and the digest of the weights that are not among the tensors.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    flats: list[dict[str, Any]] = []
    for index, (flat, group) in enumerate(zip(engine.shards.flats(), engine.shards.groups(), strict=True)):
        own = {MASTER: flat}
        for key, value in engine.shards.optimizer_state(index).items():
            if isinstance(value, Tensor) and value.numel() == flat.numel() and value.dim() > 0:
                own[key] = value.view(-1)
            else:
                number = value.item() if isinstance(value, Tensor) else value
                scalars.setdefault(str(index), {})[key] = number
        if engine.average is not None:
            own[AVERAGE] = engine.average.flats[index]
        tensors |= {f"flat.{index}.{key}": value for key, value in own.items()}
        flats.append({"num_elements": flat.numel(), "group": group, "tensors": list(own)})
    for name, buffer in persistent_buffers(engine.module):
        tensors[f"buffer.{name}"] = buffer
    numbers = {
        "stage": engine.stage,
        "fragments": [_fragment_to_json(fragment) for fragment in engine.shards.fragments],
        "flats": flats,
        "scalars": scalars,
        "groups": [_hyperparameters(group) for group in engine.shards.inner.param_groups],
        "loss_scaler": _loss_scaler(engine),
        "counters": {name: int(getattr(engine.deepspeed, name)) for name in COUNTERS},
        "accumulation": _accumulation(engine),
    }
    if engine.origin:
        numbers["origin"] = engine.origin
    return tensors, numbers


def read_shape(engine: Engine) -> dict[str, Any]:
    """What a checkpoint must look like to go into this engine: fields of `trainer.checkpoint.elastic.Shape`."""
    return {
        "stage": engine.stage,
        "world_size": int(engine.deepspeed.world_size),
        "fragments": tuple(_fragment_to_json(fragment) for fragment in engine.shards.fragments),
        "flats": tuple(flat.numel() for flat in engine.shards.flats()),
        "groups": tuple(engine.shards.groups()),
        "parameters": engine.names,
        "optimizer": optimizer_kind(engine),
        "precision": compute_precision(engine),
    }


def optimizer_kind(engine: Engine) -> str:
    """What a checkpoint's manifest calls the optimizer: implementations of Adam can go on with each other's state."""
    name = type(engine.shards.inner).__name__
    return "Adam" if name in ("AdamW", "Adam", "DeepSpeedCPUAdam", "FusedAdam") else name


def compute_precision(engine: Engine) -> str:
    """fp32, bf16 or fp16."""
    if engine.deepspeed.bfloat16_enabled():
        return "bf16"
    return "fp16" if engine.deepspeed.fp16_enabled() else "fp32"


@torch.no_grad()
def write_state(engine: Engine, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put a state of this engine's shape (as :func:`read_state` gives it, or converted) into it. A collective.

    The accumulation may be another than that of the engine that gave it. Names that this engine does not know are
    refused: a checkpoint sets what it should and nothing else.

    Raises:
        CheckpointError: the state is of another shape, or holds what it should not; nothing has been changed then.
    """
    shards = engine.shards
    fragments = [_fragment_to_json(fragment) for fragment in shards.fragments]
    flats = shards.flats()
    admit(
        tensors,
        numbers,
        expected={"stage": engine.stage, "fragments": fragments},
        flats=flats,
        flat_groups=shards.groups(),
        known=[set(shards.optimizer_state(index)) for index in range(len(flats))],
        buffers=dict(persistent_buffers(engine.module)),
        groups=shards.inner.param_groups,
        counters=COUNTERS,
        averaged=engine.average is not None,
        origin=engine.origin,
    )
    counters = _counters(numbers, _accumulation(engine))
    for index, flat in enumerate(flats):
        state = shards.optimizer_state(index)
        prefix = f"flat.{index}."
        scalars = numbers["scalars"].get(str(index), {})
        for key in [key for key in state if f"{prefix}{key}" not in tensors and key not in scalars]:
            # a state from before the first step has no moments: the optimizer makes them anew
            del state[key]
        for name in [name for name in tensors if name.startswith(prefix)]:
            key = name.removeprefix(prefix)
            if key == MASTER:
                flat.copy_(tensors[name])
            elif key == AVERAGE and engine.average is not None:
                engine.average.flats[index].copy_(tensors[name])
            elif key in state:
                state[key].view(-1).copy_(tensors[name])
            else:
                state[key] = tensors[name].to(flat.device, copy=True).view(shards.master_shape(index))
        for key, value in scalars.items():
            if isinstance(state.get(key), Tensor):
                state[key].fill_(value)
            else:
                state[key] = shards.scalar_state(key, value, flat)
    for name, buffer in persistent_buffers(engine.module):
        buffer.copy_(tensors[f"buffer.{name}"])
    for group, saved in zip(shards.inner.param_groups, numbers["groups"], strict=True):
        group.update(restored_hyperparameters(group, saved))
    _set_loss_scaler(engine, numbers["loss_scaler"])
    for name, value in counters.items():
        setattr(engine.deepspeed, name, value)
    shards.publish()
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
    # no earlier copy is one of this state
    engine.updates = Updates()


def _fragment_to_json(fragment: Fragment) -> dict[str, Any]:
    return {
        "name": fragment.name,
        "shape": list(fragment.shape),
        "start": fragment.start,
        "num_elements": fragment.num_elements,
        "flat": fragment.flat,
        "offset": fragment.offset,
    }


def _accumulation(engine: Engine) -> int:
    return int(engine.deepspeed.gradient_accumulation_steps())


def _counters(numbers: dict[str, Any], accumulation: int) -> dict[str, int]:
    """DeepSpeed's counters, micro-steps counted anew where the accumulation is another.

    Raises:
        CheckpointError: the state was taken between two micro-batches.
    """
    counters, before = dict(numbers["counters"]), numbers["accumulation"]
    if before != accumulation:
        whole, left = divmod(counters["micro_steps"], before)
        if left:
            raise CheckpointError(
                f"the checkpoint was written after {left} of {before} micro-batches; it fits no other accumulation"
            )
        counters["micro_steps"] = whole * accumulation
    return counters


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
    """What this stage's scaler has too: ZeRO 0 knows no hysteresis, without fp16 there may be no scaler at all."""
    own = _loss_scaler(engine)
    for key in own.keys() & saved.keys():
        setattr(_scaler(engine), key, saved[key])
