"""A checkpoint written by other ranks, or in another ZeRO stage, as this rank needs it.

Every element of a parameter, of its fp32 master weight and of its moments lies in some flat tensor of some shard; the
shards' JSON says where. What a rank needs is copied run by run: nothing is held but its own part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint.layout import Flat, Layout, Number, Piece, covers, read_layout
from trainer.checkpoint.manifest import Manifest, shard_files
from trainer.checkpoint.slices import OpenFiles
from trainer.errors import CheckpointError

State = tuple[dict[str, Tensor], dict[str, Any]]
BUFFER = "buffer."


@dataclass(frozen=True, slots=True)
class Shape:
    """What a rank's part of the state must look like: `Shape(**trainer.engine.state.read_shape(engine))`."""

    stage: int
    world_size: int
    fragments: tuple[dict[str, Any], ...]
    """As in the JSON of a rank."""
    flats: tuple[int, ...]
    """Elements of each flat tensor, padding included."""
    groups: tuple[int, ...] = ()
    """Optimizer group of each flat tensor."""
    parameters: tuple[str, ...] = ()
    """All trainable parameters of the model. Empty: not compared."""
    optimizer: str = ""
    precision: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """Elements to copy from a shard's flat tensor into one of this rank's."""

    shard: int
    from_flat: int
    from_offset: int
    to_flat: int
    to_offset: int
    num_elements: int


@dataclass(slots=True)
class Plan:
    """All that a rank copies, and what it sets beside it."""

    runs: list[Run] = field(default_factory=list)
    tensors: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Names of the flat tensors, by optimizer group."""
    scalars: dict[int, dict[str, Number]] = field(default_factory=dict)
    """Scalar optimizer state, by optimizer group."""


def refuse_unconvertible(manifest: Manifest, shape: Shape) -> None:
    """Compare what the manifest says with what this start needs; reads nothing.

    Raises:
        CheckpointError: another model, optimizer or precision.
    """
    name = f"the checkpoint of step {manifest.step}"
    if shape.parameters and shape.parameters != manifest.parameters:
        theirs, ours = set(manifest.parameters), set(shape.parameters)
        odd = sorted(theirs ^ ours) or ["the order of the parameters"]
        whose = "the checkpoint" if odd[0] in theirs else "this config's model"
        raise CheckpointError(
            f"{name} is of another model ({odd[0]} is only in {whose}); go on with the model it was trained with"
        )
    for what, theirs_, ours_ in (
        ("optimizer", manifest.optimizer, shape.optimizer),
        ("precision", manifest.precision, shape.precision),
    ):
        if theirs_ and ours_ and theirs_ != ours_:
            raise CheckpointError(
                f"{name} was written with {what} {theirs_} and this start has {ours_}, which cannot be converted; "
                f"go on with {theirs_}, or use another name"
            )


def plan_copies(layouts: Iterable[Layout], shape: Shape) -> Plan:
    """Which runs of which shards make up this rank's part.

    Args:
        layouts: of the shards, in order; each is looked at once and let go.

    Raises:
        CheckpointError: the shards contradict each other, are of another model, or do not hold every element of this
            rank's part exactly once.
    """
    if len(shape.groups) != len(shape.flats):
        raise ValueError("a shape needs the optimizer group of every flat tensor")
    wanted: dict[str, list[Piece]] = {}
    for fragment in shape.fragments:
        piece = Piece.model_validate(fragment)
        wanted.setdefault(piece.name, []).append(piece)
    plan = Plan()
    received: dict[tuple[int, int], list[tuple[int, int]]] = {}
    first: Layout | None = None
    for shard, layout in enumerate(layouts):
        first = first or layout
        for what in ("stage", "groups", "loss_scaler", "counters"):
            if getattr(layout, what) != getattr(first, what):
                raise CheckpointError(f"{what} of rank {shard} and of rank 0 differ in the checkpoint; use another one")
        for index, flat in enumerate(layout.flats):
            _note_group(plan, shard, index, flat, layout.scalars.get(str(index), {}))
        for source in layout.fragments:
            for own in wanted.get(source.name, ()):
                _compare(source, layout.flats[source.flat].group, own, shape.groups[own.flat])
                if run := _common(shard, source, own):
                    plan.runs.append(run)
                    received.setdefault((own.flat, own.offset), []).append((run.to_offset, run.num_elements))
    for pieces in wanted.values():
        for own in pieces:
            if wrong := covers(received.get((own.flat, own.offset), ()), own.offset, own.num_elements):
                raise CheckpointError(
                    f"the checkpoint does not hold {own.name} whole and once (elements {own.start} to "
                    f"{own.start + own.num_elements - 1}, here at {own.offset}: {wrong}); use another checkpoint"
                )
    for index, group in enumerate(shape.groups):
        if group not in plan.tensors:
            raise CheckpointError(
                f"the checkpoint has no optimizer group {group}, to which flat.{index} of this start belongs; "
                "go on with the optimizer groups it was trained with"
            )
    return plan


def _note_group(plan: Plan, shard: int, index: int, flat: Flat, scalars: dict[str, Number]) -> None:
    if not flat.num_elements:
        return
    tensors = tuple(sorted(flat.tensors))
    if (
        plan.tensors.setdefault(flat.group, tensors) != tensors
        or plan.scalars.setdefault(flat.group, scalars) != scalars
    ):
        raise CheckpointError(
            f"the optimizer's state of flat.{index} of rank {shard} is not that of the rest of its group in the "
            "checkpoint; use another one"
        )


def _compare(source: Piece, group: int, own: Piece, own_group: int) -> None:
    if source.shape != own.shape:
        raise CheckpointError(
            f"{own.name} is {list(source.shape)} in the checkpoint and {list(own.shape)} in this config's model; "
            "go on with the model it was trained with"
        )
    if group != own_group:
        raise CheckpointError(
            f"{own.name} is in optimizer group {group} in the checkpoint and in group {own_group} in this start; "
            "go on with the groups it was trained with"
        )


def _common(shard: int, source: Piece, own: Piece) -> Run | None:
    """The elements of the parameter that both hold."""
    begin = max(source.start, own.start)
    end = min(source.start + source.num_elements, own.start + own.num_elements)
    if begin >= end:
        return None
    return Run(
        shard=shard,
        from_flat=source.flat,
        from_offset=source.offset + begin - source.start,
        to_flat=own.flat,
        to_offset=own.offset + begin - own.start,
        num_elements=end - begin,
    )


def reshard(directory: Path, manifest: Manifest, shape: Shape) -> State:
    """This rank's part of a checkpoint that was written in another shape. Not a collective.

    Reads the bytes that this rank needs, into the tensors that it returns: memory is that of its own part. Padding is
    zero. Files are taken for whole: hashes are compared elsewhere.

    Raises:
        CheckpointError: it cannot be converted; no tensor has been read then, or a file is not what the JSON says.
    """
    refuse_unconvertible(manifest, shape)
    files = shard_files(directory, manifest)
    first, numbers = read_layout(files[0][1])
    plan = plan_copies((first if not rank else read_layout(path)[0] for rank, (_, path) in enumerate(files)), shape)
    tensors = {
        f"flat.{index}.{key}": torch.zeros(num_elements, dtype=torch.float32)
        for index, (num_elements, group) in enumerate(zip(shape.flats, shape.groups, strict=True))
        for key in plan.tensors[group]
    }
    with OpenFiles([path for path, _ in files], limit=1) as opened:
        for run in plan.runs:
            for key in plan.tensors[shape.groups[run.to_flat]]:
                room = tensors[f"flat.{run.to_flat}.{key}"].narrow(0, run.to_offset, run.num_elements)
                opened[run.shard].read(f"flat.{run.from_flat}.{key}", run.from_offset, room)
    tensors |= read_buffers(files[0][0])
    flats = [
        {"num_elements": num_elements, "group": group, "tensors": list(plan.tensors[group])}
        for num_elements, group in zip(shape.flats, shape.groups, strict=True)
    ]
    scalars = {str(index): plan.scalars[group] for index, group in enumerate(shape.groups) if plan.scalars[group]}
    own = {"stage": shape.stage, "fragments": list(shape.fragments), "flats": flats, "scalars": scalars}
    return tensors, numbers | own


def read_buffers(path: Path) -> dict[str, Tensor]:
    """The model's persistent buffers as `buffer.NAME`: every rank holds the same.

    Raises:
        CheckpointError: the file is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys() if name.startswith(BUFFER)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from None
