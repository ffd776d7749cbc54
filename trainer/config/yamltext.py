"""YAML as configs use it, read and written: the YAML 1.2 core types, plain data only.

PyYAML follows YAML 1.1, in which `1e-3` is a text, `no` is false, `010` is 8 and a key may come twice. Here `1e-3` is a
number, only `true` and `false` are booleans, `010` is 10, and a key that comes twice is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"


class YamlError(ValueError):
    """The text is not such YAML; the message is one sentence that names the line."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the type that PyYAML declares)


_TYPES = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]
for _name, _pattern, _first in _TYPES:
    _Loader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def parse(text: str) -> Any:
    """The plain data that `text` says: dict with text keys, list, str, int, float, bool, None.

    Raises:
        YamlError: not YAML, a key twice, a tag, or an alias inside what it stands for.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            f"line {line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{place}{error.problem or error.context}") from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None


def _value(node: yaml.Node, inside: tuple[yaml.Node, ...]) -> Any:
    line = node.start_mark.line + 1
    if any(node is outer for outer in inside):
        raise YamlError(f"line {line}: this contains an alias of itself")
    inside = (*inside, node)
    kind = node.tag.removeprefix(TAG)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(element, inside) for element in node.value]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            here = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"line {here}: a name must be text, not a list or a mapping")
            if key.value in result:
                raise YamlError(f"`{key.value}` is given twice, on lines {lines[key.value]} and {here}")
            result[key.value], lines[key.value] = _value(value, inside), here
        return result
    if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
        try:
            return _SCALARS[kind](node.value)
        except ValueError:
            raise YamlError(f"line {line}: {node.value[:40]!r} cannot be read as {kind}") from None
    raise YamlError(f"line {line}: the tag {node.tag.replace(TAG, '!!')} is not allowed; only plain data is")


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    return int(digits, {"0x": 16, "0o": 8}.get(digits[:2], 10))


def _float(text: str) -> float:
    digits = text.replace("_", "").lower()
    return float(digits.replace(".inf", "inf").replace(".nan", "nan"))


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": _bool,
    "int": _integer,
    "float": _float,
    "str": str,
}


class _Dumper(yaml.SafeDumper):
    # A text that either YAML 1.1 or `parse` would read as something else is quoted.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, indentless=False)


def _is_short(sequence: Any) -> bool:
    return all(
        _is_short(element) if isinstance(element, list | tuple) else not isinstance(element, dict)
        for element in sequence
    )


def _represent_sequence(dumper: yaml.SafeDumper, sequence: Any) -> yaml.Node:
    return dumper.represent_sequence(TAG + "seq", sequence, flow_style=_is_short(sequence))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML writes U+0085, U+2028 and U+2029 between single quotes, where they read as other line ends.
    is_plain = all(character.isprintable() or character == "\n" for character in text)
    # A literal block keeps a template readable; where it cannot say the text, the emitter falls back to quotes.
    style = '"' if not is_plain else "|" if "\n" in text.rstrip("\n") else None
    return dumper.represent_scalar(TAG + "str", text, style=style)


_Dumper.add_representer(list, _represent_sequence)
_Dumper.add_representer(tuple, _represent_sequence)
_Dumper.add_representer(str, _represent_text)


def dump(data: dict[str, Any]) -> str:
    """`data` as YAML that `parse` reads back equal, in the given order; a blank line around every top-level mapping."""
    parts: list[str] = []
    after_mapping = False
    for key, value in data.items():
        is_mapping = isinstance(value, dict) and bool(value)
        if parts and (is_mapping or after_mapping):
            parts.append("\n")
        parts.append(yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf))
        after_mapping = is_mapping
    return "".join(parts)
