"""The schema as a table of options: their dotted paths, their texts, and the nearest one to a name that is none."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from trainer.config.schema import RunConfig
from trainer.config.section import Section


@dataclass(frozen=True, slots=True)
class Option:
    """One option, or one section of them."""

    path: str
    """Dotted, as on the command line; elements of a list by `0`."""
    field: FieldInfo
    section: type[Section] | None
    """What lies below it."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


def without_none(annotation: Any) -> Any:
    """`X` from `X | None` and `Annotated[X, …]`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            [annotation] = [argument for argument in get_args(annotation) if argument is not types.NoneType]
        else:
            return annotation


def element_of(annotation: Any) -> Any | None:
    """`X` from `tuple[X, …]`, also where it may be None; None for anything else."""
    annotation = without_none(annotation)
    return get_args(annotation)[0] if get_origin(annotation) is tuple else None


def section_of(annotation: Any) -> type[Section] | None:
    """The section that the annotation holds: itself, or one of it in a list."""
    found = without_none(element_of(annotation) or annotation)
    return found if isinstance(found, type) and issubclass(found, Section) else None


def is_open(annotation: Any) -> bool:
    """Whether any name may follow below: `dict[str, Any]` and `Any`."""
    annotation = without_none(annotation)
    return annotation is Any or get_origin(annotation) is dict


def walk(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[Option]:
    """Every option of the schema in its order, each section before its options."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        below = section_of(field.annotation)
        yield Option(path, field, below)
        if below is not None:
            yield from walk(below, f"{path}.0." if element_of(field.annotation) else f"{path}.")


@cache
def options() -> tuple[Option, ...]:
    return tuple(walk())


def nearest(path: str) -> str | None:
    """The option that was probably meant by `path`, which is none.

    A similar name in the same section comes first, then the same or a similar name anywhere, then a similar path.
    """
    parts = path.split(".")
    generic = ".".join("0" if part.isdigit() else part for part in parts)
    parent, _, name = generic.rpartition(".")
    siblings = {option.name: option for option in options() if option.parent == parent}
    # two letters the wrong way round: `rl` is closer to `lr` than to `url`, which difflib does not see
    swapped = [sibling for sibling in siblings if sorted(sibling) == sorted(name)]
    if close := swapped or difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return ".".join([*parts[:-1], close[0]])
    by_name: dict[str, str] = {}
    for option in options():
        by_name.setdefault(option.name, option.path)
    if close := difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
        return by_name[close[0]]
    close = difflib.get_close_matches(generic, [option.path for option in options()], n=1, cutoff=0.75)
    return close[0] if close else None


def unknown(path: str) -> str:
    """What is said about a path that is no option."""
    if meant := nearest(path):
        return f"is not an option; did you mean `{meant}`?"
    parent = ".".join("0" if part.isdigit() else part for part in path.split(".")[:-1])
    names = [option.name for option in options() if option.parent == parent]
    return f"is not an option; {'here are ' + ', '.join(names) if names else f'`{parent}` has no parts'}"
