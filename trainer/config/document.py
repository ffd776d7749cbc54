"""`docs/config.md`, made from the schema: `python -m trainer.config.document > docs/config.md`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trainer.config.options import Option, element_of, options
from trainer.config.schema import RunConfig

HEAD = """\
# Options of a run

One YAML file is one run. `trimtab run CONFIG a.b=c` overrides options: the value is YAML (`optim.lr=1e-3`,
`data.sources.0.files=[a.txt, b.txt]`), an element of a list is named by its index (the index after the last appends),
later overrides win, and nothing after `=` is null. YAML is read by version 1.2: `1e-3` is a number, and only `true` and
`false` are booleans. Every problem of a config is reported at once, with its path.

{about}

This page is made from `trainer/config/schema.py` by `python -m trainer.config.document > docs/config.md`.
"""


def document() -> str:
    """The page, as Markdown."""
    about = inspect.cleandoc(RunConfig.__doc__ or "").partition("\n\n")[2]
    return page(HEAD.format(about=about), "The run", options())


def page(head: str, title: str, every: Sequence[Option]) -> str:
    """A page of all options of a schema: those at the top under `title`, then each section, in their order."""
    top = [option for option in every if not option.parent and option.section is None]
    parts = [head, f"## {title}\n", _table(top).rstrip()]
    for section in every:
        if section.section is None:
            continue
        fields = [option for option in every if option.parent == _prefix(section) and option.section is None]
        text = " ".join(inspect.cleandoc(section.section.__doc__ or "").split())
        parts += [f"\n## `{section.path}`\n", f"{text}{_presence(section.field)}\n"]
        if fields:
            parts.append(_table(fields).rstrip())
    return "\n".join(parts) + "\n"


def _prefix(section: Option) -> str:
    return f"{section.path}.0" if element_of(section.field.annotation) else section.path


def _presence(field: FieldInfo) -> str:
    if field.default is None:
        return " Left out by default."
    return " Required." if field.is_required() else ""


def _table(fields: list[Option]) -> str:
    rows = ["| option | values | default | |", "| --- | --- | --- | --- |"]
    for option in fields:
        description = _escape(_as_yaml(" ".join((option.field.description or "").split())))
        rows.append(
            f"| `{option.name}` | {_escape(_values(option.field))} | {_default(option.field)} | {description} |"
        )
    return "\n".join(rows) + "\n"


def _as_yaml(text: str) -> str:
    """Python's names of values as a config writes them."""
    return text.replace("None:", "null:").replace("False:", "false:").replace("True:", "true:")


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def _values(field: FieldInfo) -> str:
    bounds = [bound for item in field.metadata if (bound := _bound(item))]
    return " ".join(filter(None, [_type(field.annotation), ", ".join(bounds)]))


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [bound for item in _metadata(arguments[1:]) if (bound := _bound(item))]
        return " ".join(filter(None, [_type(arguments[0]), ", ".join(bounds)]))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if argument is types.NoneType else _type(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return "[" + ", ".join(map(_type, arguments)) + "]"
    if origin is dict:
        return "mapping"
    return _NAMES[annotation]


def _metadata(items: tuple[Any, ...]) -> list[Any]:
    """The bounds inside `Field(…)` as well as those beside it."""
    return [bound for item in items for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bound(item: Any) -> str | None:
    for key, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if (limit := getattr(item, key, None)) is not None:
            return f"{sign} {limit}"
    return None


if __name__ == "__main__":
    print(document(), end="")
