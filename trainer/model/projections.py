"""Linear maps from the student's hidden states to the teacher's width: trained with the student, not exported."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.config.schema import RunConfig
from trainer.model.initialise import gathered, seed_of
from trainer.model.inner import hidden_pairs, shape_of, teacher_shape

NAME = "trimtab_projections"
"""Of the submodule of a student that holds them."""


def attach_projections(
    model: PreTrainedModel, config: RunConfig, *, zero3: dict[str, Any] | None = None, dtype: torch.dtype
) -> None:
    """Give the student of a distillation a linear map without bias for each pair of hidden states, where its width is
    not the teacher's. Nothing is done for other runs, and on the meta device no values are drawn.

    Values are a pure function of (`config.seed`, name), with a standard deviation of 1/√width that keeps the size of a
    state.

    Args:
        zero3: the DeepSpeed configuration when parameters are sharded: a collective then.

    Raises:
        ConfigError: the teacher's configuration cannot be read, or one of both has no such layer.
    """
    if config.stage != "distill" or config.distill is None or config.distill.hidden is None:
        return
    student, teacher = shape_of(model.config), teacher_shape(config)
    pairs = hidden_pairs(config.distill, student.layers, teacher.layers)
    if student.width == teacher.width:
        return
    with ExitStack() as stack:
        if zero3 is not None:
            import deepspeed

            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=zero3, dtype=dtype))
        maps = {
            f"student_{ours}_teacher_{theirs}": nn.Linear(
                student.width, teacher.width, bias=False, dtype=dtype, device=model.device
            )
            for ours, theirs in pairs
        }
    model.add_module(NAME, nn.ModuleDict(maps))
    for name, each in maps.items():
        if not each.weight.is_meta:
            _draw(each, seed_of(config.seed, f"{NAME}.{name}"), 1 / math.sqrt(student.width))


def projector(model: nn.Module) -> Callable[[int, Tensor], Tensor] | None:
    """(place of the pair, the student's state [B, T, H]) → [B, T, H of the teacher]; None: the widths are equal."""
    maps = getattr(model, NAME, None)
    if maps is None:
        return None
    in_order = list(maps.values())

    def project(place: int, state: Tensor) -> Tensor:
        # called as a module: under ZeRO-3 its weight is gathered by hooks
        result: Tensor = in_order[place](state.to(in_order[place].weight.dtype))
        return result

    return project


def is_projection(name: str) -> bool:
    """Whether a parameter of this name is one of them."""
    return name.startswith(f"{NAME}.")


@torch.no_grad()
def _draw(linear: nn.Linear, seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with gathered(list(linear.parameters())):
        drawn = torch.randn(linear.weight.shape, generator=generator, dtype=torch.float32)
        linear.weight.copy_(drawn.mul_(std))
