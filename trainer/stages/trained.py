"""The whole model of a run that trains some of its weights: these from a checkpoint, the others as the run began."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.config.schema import RunConfig
from trainer.data.prepared import Prepared
from trainer.engine.origin import digest_of
from trainer.errors import CheckpointError
from trainer.model.build import build_model


@torch.no_grad()
def trained_model(
    config: RunConfig, prepared: Prepared, tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype, origin: str
) -> PreTrainedModel:
    """The model on the CPU: trained weights in fp32, all others in `dtype`. It is in memory as a whole.

    Args:
        tensors: (name, whole fp32 tensor) of every trained parameter and every buffer.
        dtype: what the run computed in.
        origin: digest of the weights that it began with, from a checkpoint.

    Raises:
        ConfigError: `model.pretrained` cannot be read.
        CheckpointError: it has changed since the run began, or the tensors are of another model.
    """
    model = build_model(
        config,
        vocabulary=prepared.vocabulary,
        zero3=None,
        dtype=dtype,
        classes=prepared.classes,
        kept=prepared.kept,
    )
    if digest_of(model, everything=config.objective.l2_start > 0) != origin:
        raise CheckpointError(
            f"{config.model.pretrained or 'the model from scratch'} gives other weights than those that this run "
            "began with; restore it to export what was trained on top of them"
        )
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    missing = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for name, tensor in tensors:
        room = parameters.get(name, buffers.get(name))
        if room is None or room.shape != tensor.shape:
            raise CheckpointError(f"the checkpoint has a tensor {name}, which the model of this run has no place for")
        room.data = tensor
        missing.discard(name)
    if missing:
        raise CheckpointError(f"the checkpoint lacks the parameter {min(missing)}")
    return model
