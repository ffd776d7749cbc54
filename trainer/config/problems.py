"""What is wrong with an option, in one sentence that says what it must be and what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config.options import unknown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def describe(value: Any) -> str:
    """A value as a sentence names it."""
    match value:
        case None:
            return "empty (null)"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return _number(value)
        case str():
            return f"the text {value if len(value) <= 60 else value[:57] + '…'!r}"
        case list():
            return "a list"
        case dict():
            return "a group of options"
    return f"a {type(value).__name__}"


def _number(value: float) -> str:
    return f"{value}".replace("-", "−", 1) if value < 0 else f"{value}"


def _whole_number(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"must be a whole number, but is written as {_number(value)}; write {int(value):_}"
    return f"must be a whole number, but is {describe(value)}"


def _length(noun: str, error: ErrorDetails) -> str:
    context = error["ctx"]
    bound = "at least" if "min_length" in context else "at most"
    limit = context.get("min_length", context.get("max_length"))
    length = len(error["input"])
    return f"must have {bound} {limit} {noun}{'' if limit == 1 else 's'}, but has {length or 'none'}"


_MUST = {
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list (`[a, b]`)",
    "dict_type": "must be a group of options (`name: value`)",
    "model_type": "must be a group of options (`name: value`)",
}
_BOUND = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def sentence(error: ErrorDetails) -> str:
    """The sentence for one error of pydantic; it follows `PATH: `."""
    kind, value = error["type"], error["input"]
    if kind in _MUST:
        return f"{_MUST[kind]}, but is {describe(value)}"
    if kind in _BOUND:
        words, key = _BOUND[kind]
        return f"must be {words} {_number(error['ctx'][key]).removesuffix('.0')}, but is {_number(value)}"
    match kind:
        case "missing":
            return "is missing, and has no default"
        case "extra_forbidden":
            return unknown(".".join(map(str, error["loc"])))
        case "int_type" | "int_from_float":
            return _whole_number(value)
        case "literal_error":
            choices = str(error["ctx"]["expected"])
            return f"must be {'one of ' if ' or ' in choices else ''}{choices}, but is {describe(value)}"
        case "too_short" | "too_long":
            return _length("element", error)
        case "string_too_short" | "string_too_long":
            return _length("character", error)
    return f"is not valid: {error['msg'][:1].lower()}{error['msg'][1:]}"
