"""What the JSON of a rank says of its tensors: which run of which parameter lies where. Read as data, checked first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from trainer.errors import CheckpointError

MASTER = "master"
AVERAGE = "ema"
"""The moving average of the weights, where a run keeps one."""
Count = Annotated[int, Field(strict=True, ge=0)]
Number = bool | int | float


class Piece(BaseModel):
    """A run of one parameter's elements in a flat tensor, as `trainer.engine.gradients.Fragment`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[Count, ...]
    """Of the whole parameter."""
    start: Count
    """First element, in the flattened parameter."""
    num_elements: Count
    flat: Count
    offset: Count
    """First element, in the flat tensor."""


class Flat(BaseModel):
    """The tensors `flat.INDEX.*` of a rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_elements: Count
    group: Count
    """Of the optimizer."""
    tensors: tuple[str, ...]
    """`master`, and the optimizer's state: nothing of it before the first step."""


class Layout(BaseModel):
    """The JSON of a rank; what else is in it is for others to judge."""

    model_config = ConfigDict(frozen=True, extra="allow")

    stage: Count
    fragments: tuple[Piece, ...]
    flats: tuple[Flat, ...]
    scalars: dict[str, dict[str, Number]]
    """Scalar optimizer state by index of the flat tensor."""
    groups: list[dict[str, JsonValue]]
    """Hyperparameters."""
    loss_scaler: dict[str, Number]
    counters: dict[str, Count]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for piece in self.fragments:
            if piece.flat >= len(self.flats):
                raise ValueError(f"{piece.name} lies in the tensor flat.{piece.flat}, which there is not")
            if piece.offset + piece.num_elements > self.flats[piece.flat].num_elements:
                raise ValueError(f"{piece.name} reaches over the end of flat.{piece.flat}")
            if piece.start + piece.num_elements > math.prod(piece.shape):
                raise ValueError(f"{piece.name} has more elements than its shape {list(piece.shape)}")
        for index, flat in enumerate(self.flats):
            if flat.group >= len(self.groups):
                raise ValueError(f"flat.{index} belongs to group {flat.group}, which there is not")
            if MASTER not in flat.tensors:
                raise ValueError(f"flat.{index} has no {MASTER}")
        return self


def read_layout(path: Path) -> tuple[Layout, dict[str, Any]]:
    """The layout, and all of the JSON as it stands.

    Raises:
        CheckpointError: it cannot be read, or is not the JSON of a rank.
    """
    try:
        text = path.read_bytes()
        return Layout.model_validate_json(text), json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); use another checkpoint") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is not what a rank writes ({where}: {first['msg']}); use another one") from None


def covers(runs: Iterable[tuple[int, int]], first: int, num_elements: int) -> str | None:
    """What is wrong where (start, count) runs do not cover `num_elements` from `first` on, each once; None: they do."""
    reached = first
    for start, count in sorted(runs):
        if count == 0:
            continue
        if start > reached:
            return f"elements {reached} to {start - 1} are missing"
        if start < reached:
            return f"elements {start} to {min(reached, start + count) - 1} are there twice"
        reached = start + count
    if reached != first + num_elements:
        return f"elements {reached} to {first + num_elements - 1} are missing"
    return None
