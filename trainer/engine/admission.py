"""What a saved state may put into a live engine: known names and the kinds of value that are there already.

A checkpoint may come from elsewhere, and restoring one sets attributes by names that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer.errors import CheckpointError

MASTER = "master"
AVERAGE = "ema"
"""The moving average of the weights, with as many elements."""
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
"""Of Adam, with as many elements as the weights."""
SCALARS = frozenset({"step"})
SCALER = frozenset(
    {
        "cur_scale",
        "cur_iter",
        "last_overflow_iter",
        "scale_factor",
        "scale_window",
        "min_scale",
        "min_loss_scale",
        "delayed_shift",
        "cur_hysteresis",
    }
)
"""Numbers of DeepSpeed's loss scalers, of any ZeRO stage."""
IMPLEMENTATION = frozenset(
    {"foreach", "fused", "capturable", "differentiable", "bias_correction", "decoupled_weight_decay"}
)
"""Entries of a group that say how Adam is computed, not what: they stay as this start built them."""
SWITCHES = frozenset({"amsgrad", "maximize"})
"""Off where an implementation of Adam does not know them."""


def admit(
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    *,
    expected: Mapping[str, Any],
    flats: Sequence[Tensor],
    flat_groups: Sequence[int],
    known: Sequence[set[str]],
    buffers: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
    counters: Sequence[str],
    averaged: bool = False,
    origin: str = "",
) -> None:
    """Refuse a state that does not belong into an engine.

    Args:
        expected: entries of `numbers` that must be equal.
        flats, flat_groups: the live flat master tensors and their optimizer groups.
        known: names of the live optimizer state, of each flat tensor.
        buffers: the model's, by name.
        groups: the live optimizer's.
        counters: names that the counters must have.
        averaged: there is a moving average of the weights, and must be one in the state.
        origin: digest of the weights that the run comes back to at every start.

    Raises:
        CheckpointError: names the first thing that does not belong.
    """
    missing = {"scalars", "groups", "loss_scaler", "counters", "accumulation", "flats", *expected} - numbers.keys()
    if missing:
        raise CheckpointError(f"the checkpoint's numbers lack {min(missing)!r}; use another checkpoint")
    own = [{"num_elements": flat.numel(), "group": group} for flat, group in zip(flats, flat_groups, strict=True)]
    saved = [{key: flat.get(key) for key in ("num_elements", "group")} for flat in numbers["flats"]]
    if saved != own or any(numbers[name] != value for name, value in expected.items()):
        raise CheckpointError(
            "the checkpoint was written with another ZeRO stage, number of ranks or model, and was not converted; "
            "resume with the same zero.stage, ranks and model"
        )
    if numbers.get("origin", "") != origin:
        raise CheckpointError(
            "the weights that are not trained, or from which the run began, are others than those that this run "
            "began with: model.pretrained has changed; restore it, or begin a run under another name"
        )
    _admit_tensors(tensors, flats, known, buffers, {MASTER, AVERAGE} if averaged else {MASTER})
    for index, scalars in numbers["scalars"].items():
        if not (isinstance(index, str) and index.isdecimal() and int(index) < len(flats)):
            raise _foreign(f"scalars of a flat tensor {index!r}")
        for key, value in scalars.items():
            if key not in SCALARS | (known[int(index)] - MOMENTS) or not _is_number(value):
                raise _foreign(f"the optimizer state {key!r} = {value!r}")
    if len(numbers["groups"]) != len(groups):
        raise CheckpointError(
            f"the checkpoint has {len(numbers['groups'])} optimizer groups and this start has {len(groups)}"
        )
    for live, values in zip(groups, numbers["groups"], strict=True):
        restored_hyperparameters(live, values)
    for key, value in numbers["loss_scaler"].items():
        if key not in SCALER or not _is_number(value):
            raise _foreign(f"the loss scaler's {key!r} = {value!r}")
    if set(numbers["counters"]) != set(counters) or not all(
        type(value) is int and value >= 0 for value in numbers["counters"].values()
    ):
        raise _foreign(f"the counters {numbers['counters']!r}")
    if type(numbers["accumulation"]) is not int or numbers["accumulation"] < 1:
        raise _foreign(f"the accumulation {numbers['accumulation']!r}")


def restored_hyperparameters(live: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved hyperparameters that belong into the live group.

    Raises:
        CheckpointError: the live group has no such entry, or one of another kind; or lacks a saved one.
    """
    restored = {}
    for key, value in saved.items():
        if key in IMPLEMENTATION or (key in SWITCHES and key not in live and value is False):
            continue
        value = tuple(value) if isinstance(value, list) else value
        if key == "params" or key not in live or not _alike(live[key], value):
            raise _foreign(f"the hyperparameter {key!r} = {value!r}")
        restored[key] = value
    for key, value in live.items():
        if key in IMPLEMENTATION or key in restored or (key in SWITCHES and value is False):
            continue
        if isinstance(value, int | float | str | tuple):
            raise CheckpointError(f"the checkpoint lacks the hyperparameter {key!r} of a group; use another checkpoint")
    return restored


def _admit_tensors(
    tensors: Mapping[str, Tensor],
    flats: Sequence[Tensor],
    known: Sequence[set[str]],
    buffers: Mapping[str, Tensor],
    needed: set[str],
) -> None:
    wanted = {f"flat.{index}.{key}" for index in range(len(flats)) for key in needed}
    wanted |= {f"buffer.{name}" for name in buffers}
    if lacking := wanted - tensors.keys():
        raise CheckpointError(f"the checkpoint lacks the tensor {min(lacking)!r}; use another checkpoint")
    allowed = {
        f"flat.{index}.{key}": flat
        for index, flat in enumerate(flats)
        for key in needed | MOMENTS | (known[index] - SCALARS)
    }
    for name, tensor in tensors.items():
        if name in allowed:
            fits = tensor.dtype == allowed[name].dtype and tensor.numel() == allowed[name].numel()
        elif name.startswith("buffer.") and name.removeprefix("buffer.") in buffers:
            live = buffers[name.removeprefix("buffer.")]
            fits = tensor.dtype == live.dtype and tensor.shape == live.shape
        else:
            raise _foreign(f"the tensor {name!r}")
        if not fits:
            raise CheckpointError(
                f"the checkpoint's tensor {name!r} ({tensor.dtype}, {list(tensor.shape)}) does not fit this start; "
                "resume with the same precision and model"
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _alike(live: Any, value: Any) -> bool:
    """Of one kind: numbers are numbers, whether whole or not."""
    if isinstance(live, tuple):
        return isinstance(value, tuple) and len(live) == len(value) and all(map(_alike, live, value))
    if _is_number(live):
        return _is_number(value)
    return type(live) is type(value)


def _foreign(what: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint holds {what}, which this run has no place for; use another checkpoint")
