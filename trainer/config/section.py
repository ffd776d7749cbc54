"""What every group of options is made of."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of options: unknown names are refused, values never change, types are not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def is_set(section: Section, path: str) -> bool:
    """Whether the option at `path` (`checkpoint.every`) differs from its default."""
    *parents, name = path.split(".")
    parent: Any = reduce(getattr, parents, section)
    return bool(getattr(parent, name) != type(parent).model_fields[name].get_default(call_default_factory=True))
