"""Checkpoints of made-up models, cut as each ZeRO stage cuts them: written and compared without DeepSpeed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.elastic import Shape
from trainer.checkpoint.manifest import Manifest, entry_of, write_manifest

KEYS = ("master", "exp_avg", "exp_avg_sq")
PADDING = 99.0
"""What lies in the padding of the files, to see that nobody takes it along."""


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    group: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def fragment(parameter: Parameter, start: int, num_elements: int, flat: int, offset: int) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "shape": list(parameter.shape),
        "start": start,
        "num_elements": num_elements,
        "flat": flat,
        "offset": offset,
    }


def cut(parameters: list[Parameter], stage: int, world_size: int, sub_group: int = 10**9) -> list[Shape]:
    """What each rank holds; `sub_group`: ZeRO 3 starts another flat tensor after so many elements."""
    groups = sorted({parameter.group for parameter in parameters})
    shapes = []
    for rank in range(world_size):
        fragments: list[dict[str, Any]] = []
        flats: list[int] = []
        of_flat: list[int] = []
        for group in groups:
            members = [parameter for parameter in parameters if parameter.group == group]
            if stage == 0:
                for parameter in members:
                    fragments.append(fragment(parameter, 0, parameter.numel, len(flats), 0))
                    flats.append(parameter.numel)
                    of_flat.append(group)
            elif stage < 3:
                total = sum(parameter.numel for parameter in members)
                part = -(-total // (2 * world_size)) * 2
                first, place = rank * part, 0
                for parameter in members:
                    begin, end = max(first, place), min(first + part, place + parameter.numel)
                    if begin < end:
                        fragments.append(fragment(parameter, begin - place, end - begin, len(flats), begin - first))
                    place += parameter.numel
                flats.append(part)
                of_flat.append(group)
            else:
                offset = 0
                for index, parameter in enumerate(members):
                    part = -(-parameter.numel // world_size)
                    count = max(0, min(part, parameter.numel - part * rank))
                    if count:
                        fragments.append(fragment(parameter, part * rank, count, len(flats), offset))
                    offset += part
                    if offset >= sub_group or index == len(members) - 1:
                        flats.append(offset)
                        of_flat.append(group)
                        offset = 0
        names = tuple(parameter.name for parameter in parameters)
        shapes.append(Shape(stage, world_size, tuple(fragments), tuple(flats), tuple(of_flat), names, "Adam", "fp32"))
    return shapes


def make_whole(parameters: list[Parameter], seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """key → name → values of the whole parameter."""
    generator = np.random.default_rng(seed)
    return {
        key: {p.name: torch.from_numpy(generator.standard_normal(p.numel).astype(np.float32)) for p in parameters}
        for key in KEYS
    }


def numbers_of(shape: Shape, keys: tuple[str, ...], steps: dict[int, float], num_groups: int) -> dict[str, Any]:
    return {
        "stage": shape.stage,
        "fragments": list(shape.fragments),
        "flats": [
            {"num_elements": size, "group": group, "tensors": list(keys)}
            for size, group in zip(shape.flats, shape.groups, strict=True)
        ],
        "scalars": {str(index): {"step": steps[group]} for index, group in enumerate(shape.groups) if len(keys) > 1},
        "groups": [{"lr": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.1 * group} for group in range(num_groups)],
        "loss_scaler": {"cur_scale": 1.0},
        "counters": {"global_steps": 3},
        "accumulation": 2,
        "guard": {"of": "rank 0"},
    }


def write_checkpoint(
    directory: Path,
    whole: dict[str, dict[str, Tensor]],
    shapes: list[Shape],
    steps: dict[int, float] | None = None,
    buffers: bool = True,
) -> Manifest:
    """Write a checkpoint whose ranks have these shapes."""
    directory.mkdir(parents=True)
    num_groups = max(shapes[0].groups) + 1
    steps = steps or {group: 3.0 + group for group in range(num_groups)}
    files = []
    for rank, shape in enumerate(shapes if shapes[0].stage else shapes[:1]):
        tensors = {
            f"flat.{index}.{key}": torch.full((size,), PADDING)
            for index, size in enumerate(shape.flats)
            for key in whole
        }
        for own in shape.fragments:
            for key, values in whole.items():
                room = tensors[f"flat.{own['flat']}.{key}"].narrow(0, own["offset"], own["num_elements"])
                room.copy_(values[own["name"]].narrow(0, own["start"], own["num_elements"]))
        if buffers:
            tensors["buffer.table"] = torch.arange(5, dtype=torch.int64)
        save_file(tensors, directory / f"rank-{rank:05d}.safetensors")
        numbers = numbers_of(shape, tuple(whole), steps, num_groups)
        (directory / f"rank-{rank:05d}.json").write_text(json.dumps(numbers))
        files += [directory / f"rank-{rank:05d}.safetensors", directory / f"rank-{rank:05d}.json"]
    manifest = Manifest(
        step=3,
        attempt=3,
        next_batch=3,
        quarantine=(),
        world_size=shapes[0].world_size,
        stage=shapes[0].stage,
        global_batch=8,
        config_fingerprint="c",
        data_fingerprint="d",
        precision="fp32",
        optimizer="Adam",
        parameters=shapes[0].parameters,
        files=tuple(map(entry_of, files)),
    )
    write_manifest(directory, manifest)
    return manifest
