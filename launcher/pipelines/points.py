"""The points of a sweep: every combination of the values that options take, and a directory name for each. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from trainer.config import yamltext
from trainer.config.section import Section
from trainer.errors import ConfigError

Problem = tuple[str, str]

MAX_POINTS = 1000
MAX_NAME = 80
"""Characters of a point's name."""

_PLAIN = re.compile(r"[A-Za-z0-9._+-]+")
_OTHERS = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True, slots=True)
class Axis:
    """An option and the values that it takes."""

    option: str
    """Dotted."""
    values: tuple[Any, ...]
    """Plain data, at least one."""


class Point(Section):
    """One run of a sweep."""

    name: str
    """Of its directory."""
    overrides: tuple[str, ...]
    """What sets it apart, as on the command line."""


def read_axis(text: str) -> Axis:
    """`optim.lr=1e-3,3e-4` → the option and its values, which are YAML: a comma inside brackets, braces or quotes
    belongs to a value.

    Raises:
        ConfigError: it has another form.
    """
    option, equals, values = text.partition("=")
    option = option.strip()
    if not equals or not option:
        raise refused("", f"the sweep {text!r} must have the form option=value,value, as in optim.lr=1e-3,3e-4")
    try:
        parsed = yamltext.parse(f"[{values}]")
    except yamltext.YamlError as error:
        raise refused(option, f"the values {values!r} are not YAML ({error}); quote them") from None
    if not isinstance(parsed, list) or not parsed:
        raise refused(option, "has no values; give them with commas between, as in seed=1,2,3")
    return Axis(option, tuple(parsed))


def read_axes(texts: Iterable[str]) -> list[Axis]:
    """See `read_axis`.

    Raises:
        ConfigError: with all that is wrong.
    """
    axes, problems = [], []
    for text in texts:
        try:
            axes.append(read_axis(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems, "the sweep")
    return axes


def refused(option: str, text: str) -> ConfigError:
    return ConfigError([(option, text)], "the sweep")


def as_yaml(value: Any) -> str:
    """Plain data on one line, which `yamltext.parse` reads back equal: JSON, with what YAML does not allow in a text
    escaped.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def points_of(axes: Sequence[Axis]) -> list[Point]:
    """Every combination, the last axis changing fastest, with names that are safe, bounded and unique.

    Raises:
        ConfigError: the axes contradict each other, or there are too many points.
    """
    if problems := list(dict.fromkeys(_contradictions(axes))):
        raise ConfigError(problems, "the sweep")
    labels = _labels([axis.option for axis in axes])
    combinations = product(*(axis.values for axis in axes))
    return [_point([axis.option for axis in axes], labels, values) for values in combinations]


def _contradictions(axes: Sequence[Axis]) -> Iterable[Problem]:
    options = [axis.option for axis in axes]
    for axis in axes:
        others = [option for option in options if axis.option.startswith(f"{option}.")]
        if options.count(axis.option) > 1:
            yield axis.option, "is swept twice; give all its values at once"
        elif others:
            yield axis.option, f"is swept, and `{others[0]}`, of which it is a part, too; sweep one of them"
        if axis.option in ("name", "runs"):
            yield axis.option, "cannot be swept: each point of a sweep is named by what sets it apart"
        if not axis.values:
            yield axis.option, "has no values; give some, or leave it out"
        seen: set[str] = set()
        for value in axis.values:
            try:
                text = as_yaml(value)
            except ValueError:
                yield axis.option, "has a value that is not finite; leave it out"
                continue
            if text in seen:
                yield axis.option, f"has the value {text} twice; leave one out"
            seen.add(text)
    if (number := prod(len(axis.values) for axis in axes)) > MAX_POINTS:
        yield "", f"it has {number} points, and {MAX_POINTS} is the most; split it, each with its own name"


def _labels(options: Sequence[str]) -> list[str]:
    """The shortest ends of the options that tell them apart and do not begin with an index: `lr` for `optim.lr`."""
    found = []
    for option in options:
        parts = option.split(".")
        ends = [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]
        clear = (
            end
            for end in ends
            if not end[:1].isdigit() and sum(f".{other}".endswith(f".{end}") for other in options) == 1
        )
        found.append(next(clear, option))
    return found


def _point(options: Sequence[str], labels: Sequence[str], values: Sequence[Any]) -> Point:
    overrides = tuple(f"{option}={as_yaml(value)}" for option, value in zip(options, values, strict=True))
    texts = [_label(value) for value in values]
    name = ",".join(f"{_safe(label)}={_safe(text)}" for label, text in zip(labels, texts, strict=True))
    exact = all(map(_is_exact, values)) and all(_safe(label) == label for label in labels)
    name = name.lstrip("._-=+") or "point"
    if not exact or len(name) > MAX_NAME:
        # two points that read the same differ in this
        digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:10]
        name = f"{name[: MAX_NAME - 11].rstrip(',.-=')}-{digest}"
    return Point(name=name, overrides=overrides)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else as_yaml(value)


def _safe(text: str) -> str:
    return _OTHERS.sub("-", text).strip("-") if _OTHERS.search(text) else text


def _is_exact(value: Any) -> bool:
    """Whether the value can be told from its name."""
    if isinstance(value, list | dict):
        return False
    return not isinstance(value, str) or (_PLAIN.fullmatch(value) is not None and yamltext.parse(value) == value)
