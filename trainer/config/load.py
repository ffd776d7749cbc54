"""From YAML and `a.b=c` overrides to a `RunConfig`, and back. Everything that is wrong is said at once, with its path.

Paths in the file are relative to the file; paths in overrides are relative to the working directory, as a shell
completes them. The loaded config holds absolute paths only, those of `package:` references too, so its dump runs the
same from anywhere.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config import packages, yamltext
from trainer.config.distill import CacheConfig
from trainer.config.options import element_of, is_open, section_of, unknown
from trainer.config.problems import describe, sentence
from trainer.config.schema import DataConfig, RunConfig
from trainer.config.section import Section
from trainer.errors import ConfigError, RunDirectoryError

CONFIG_FILE = "config.yaml"
"""The resolved config in a run directory."""

Problem = tuple[str, str]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the file with `overrides` (`a.b=c`, later ones win) on top.

    The value of an override is YAML: `optim.lr=1e-3`, `data.sources.0.files=[a.txt, b.txt]`; nothing after `=` is null.
    An element of a list is named by its index; the index after the last appends.

    Raises:
        ConfigError: with every problem of the file and of the overrides.
    """
    data = read_mapping(path)
    _make_paths_absolute(data, path.absolute().parent)
    problems: list[Problem] = []
    for override in overrides:
        try:
            data = _overridden(data, override)
        except _OverrideError as error:
            problems.append(error.problem)
    _make_paths_absolute(data, Path.cwd())
    _make_folders_absolute(data)
    problems += packages.resolve_all(data)
    return _validated(data, str(path), problems)


def read_run_config(run: Path) -> RunConfig:
    """The resolved config of a run directory, exactly as it was written.

    Raises:
        RunDirectoryError: `run` holds no config.
        ConfigError: the config in it is damaged.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise RunDirectoryError(f"{run} is not a run directory: it holds no {CONFIG_FILE}")
    return _validated(read_mapping(path), str(path), [])


def dump_config(config: RunConfig) -> str:
    """YAML with every option, in the order of the schema; loading it gives an equal config."""
    return yamltext.dump(config.model_dump())


def read_mapping(path: Path, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The options in a YAML file, unchecked.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """

    def refuse(text: str) -> ConfigError:
        return ConfigError([("", text)], str(path))

    try:
        data = yamltext.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise refuse(f"there is no such file{hint}") from None
    except IsADirectoryError:
        raise refuse("it is a directory; name the YAML file in it") from None
    except OSError as error:
        raise refuse(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise refuse(f"it is not text in UTF-8 (byte {error.start})") from None
    except yamltext.YamlError as error:
        raise refuse(str(error)) from None
    if data is None and may_be_empty:
        return {}
    if not isinstance(data, dict):
        raise refuse(f"it must be a mapping of options (`name: value`), but is {describe(data)}")
    return data


def _validated(data: dict[str, Any], source: str, problems: list[Problem]) -> RunConfig:
    config = None
    try:
        # JSON is where pydantic's strict mode takes a list for a tuple.
        config = RunConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = problems + [(".".join(map(str, item["loc"])), sentence(item)) for item in error.errors()]
    if config is None or problems:
        raise ConfigError(problems, source)
    return config


class _OverrideError(Exception):
    def __init__(self, path: str, text: str):
        self.problem: Problem = (path, text)


def _overridden(data: dict[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise _OverrideError("", f"the override {override!r} must have the form option=value, as in optim.lr=1e-3")
    try:
        value = yamltext.parse(text)
    except yamltext.YamlError as error:
        raise _OverrideError(path, f"the value {text!r} is not YAML ({error}); quote it") from None
    result: dict[str, Any] = _with(data, RunConfig, path.split("."), 0, value)
    return result


def _with(old: Any, annotation: Any, parts: list[str], depth: int, value: Any) -> Any:
    """`old`, which `parts[:depth]` leads to, with `value` at `parts[depth:]`."""
    if depth == len(parts):
        return value
    name = parts[depth]
    here, path = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
    is_list = element_of(annotation) is not None or (is_open(annotation) and isinstance(old, list))
    if is_list:
        elements = [] if old is None else old
        if not isinstance(elements, list):
            raise _OverrideError(here, f"must be a list, but is {describe(old)}")
        if not (name.isascii() and name.isdigit() and int(name) <= len(elements)):
            raise _OverrideError(path, f"is not an element; `{here}` takes an index from 0 to {len(elements)}")
        index = int(name)
        below = Any if is_open(annotation) else element_of(annotation)
        element = elements[index] if index < len(elements) else None
        return [*elements[:index], _with(element, below, parts, depth + 1, value), *elements[index + 1 :]]
    section = section_of(annotation)
    if section is not None and name not in section.model_fields:
        raise _OverrideError(path, unknown(path))
    if section is None and not is_open(annotation):
        raise _OverrideError(path, f"is not an option; `{here}` is a single value")
    mapping = {} if old is None else old
    if not isinstance(mapping, dict):
        raise _OverrideError(here, f"is {describe(old)}, so `{path}` cannot be set in it")
    if section is None:
        return {**mapping, name: _with(mapping.get(name), Any, parts, depth + 1, value)}
    field = section.model_fields[name]
    # An element of a list that the file leaves at its default: the other elements keep theirs.
    default = list(field.default) if isinstance(field.default, tuple) else None
    return {**mapping, name: _with(mapping.get(name, default), field.annotation, parts, depth + 1, value)}


def _make_paths_absolute(data: dict[str, Any], folder: Path) -> None:
    """Make relative paths of text, tokenizers and models absolute, in place. What has a wrong type is left alone."""

    def group(parent: Any, name: str) -> Any:
        return parent.get(name) if isinstance(parent, dict) else None

    sources = group(group(data, "data"), "sources")
    for source in sources if isinstance(sources, list) else []:
        files = group(source, "files")
        if isinstance(files, list):
            source["files"] = [
                _absolute(file, folder) if isinstance(file, str) and not packages.is_reference(file) else file
                for file in files
            ]
        _make_reference_absolute(source, "hub", folder)
    _make_reference_absolute(group(group(data, "data"), "tokenizer"), "path", folder)
    _make_reference_absolute(group(group(data, "data"), "augment"), "lexicon", folder)
    _make_reference_absolute(group(data, "model"), "pretrained", folder)
    _make_reference_absolute(group(group(data, "distill"), "teacher"), "pretrained", folder)


def _make_reference_absolute(group: Any, name: str, folder: Path) -> None:
    """A path where there is one, or where it is written like one (`./x`, `~/x`); else a hub id, left alone."""
    value = group.get(name) if isinstance(group, dict) else None
    if not isinstance(value, str) or not value or packages.is_reference(value):
        return
    if value.startswith(("./", "../", "~")) or value.endswith((".gguf", ".json")) or (folder / value).exists():
        group[name] = _absolute(value, folder)


def _make_folders_absolute(data: dict[str, Any]) -> None:
    """Folders that are written to are relative to the working directory, in the file and by default too."""
    if isinstance(distill := data.get("distill"), dict):
        distill.setdefault("cache", {})
    folders: list[tuple[Any, type[Section], str]] = [
        (data, RunConfig, "runs"),
        (data.get("data"), DataConfig, "prepared"),
    ]
    folders += [(distill["cache"], CacheConfig, "folder")] if isinstance(distill, dict) else []
    for group, section, name in folders:
        if isinstance(group, dict) and isinstance(value := group.get(name, section.model_fields[name].default), str):
            group[name] = _absolute(value, Path.cwd())


def _absolute(path: str, folder: Path) -> str:
    # normpath: a config in `configs/` may say `../text`; a glob is kept as it is
    return os.path.normpath(folder / Path(path).expanduser())
