"""`package:NAME/PATH`: files that came with an installed Python package. It is found, never imported."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.config.problems import describe

PREFIX = "package:"

Problem = tuple[str, str]

_FORM = "`package:NAME/PATH`, the name under which Python imports the package and a path below it"


class PackageError(ValueError):
    """A reference leads nowhere; the text is the sentence that follows the option."""


def is_reference(value: object) -> bool:
    """Whether it names a file of a package."""
    return isinstance(value, str) and value.startswith(PREFIX)


def resolve(reference: str, *, pattern: bool = False) -> str:
    """The absolute path of `package:NAME/PATH`; of a glob an absolute glob.

    Args:
        pattern: whether PATH may hold `*`, `?`, `[…]` and `**`, and what comes back is read as a glob.

    Raises:
        PackageError: no such package, nothing there, or something outside of the package.
    """
    name, slash, path = reference.removeprefix(PREFIX).partition("/")
    folders = _folders(name, reference)
    parts = PurePosixPath(path).parts
    if not slash or not parts or path.startswith("/") or ".." in parts:
        raise PackageError(f"is {describe(reference)}, but must be {_FORM}, without `..`")
    # a namespace package may lie in several folders, each with a part of it
    for folder in folders:
        if pattern and glob.has_magic(path):
            result = os.path.join(glob.escape(str(folder)), *parts)  # noqa: PTH118 (a glob, not a path)
            found = [Path(each) for each in glob.iglob(result, recursive=True)]  # noqa: PTH207 (`**` as files are read)
        else:
            here = folder.joinpath(*parts)
            result = glob.escape(str(here)) if pattern else str(here)
            found = [here] if here.exists() else []
        if outside := [each for part in found for each in (part, *_files(part)) if not _is_within(each, folder)]:
            raise PackageError(f"leads out of the package {name}: {outside[0]} is a link to {outside[0].resolve()}")
        if found:
            return result
    raise PackageError(_nothing_there(name, parts, folders))


def _folders(name: str, reference: str) -> list[Path]:
    if not name.isidentifier():
        raise PackageError(f"is {describe(reference)}, but must be {_FORM}")
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise PackageError(
            f"the package {name} is not installed in this environment: `pip install` the distribution that brings it, "
            f"which may have another name (often {name.replace('_', '-')})"
        )
    if not spec.submodule_search_locations:
        raise PackageError(f"{name} is a single module, not a package: nothing lies below it")
    return [Path(folder).absolute() for folder in spec.submodule_search_locations]


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _nothing_there(name: str, parts: tuple[str, ...], folders: list[Path]) -> str:
    wanted = "/".join(parts)
    if glob.has_magic(wanted):
        return f"no file of the package {name} matches {wanted} (it is in {folders[0]})"
    names = [each.relative_to(folder).as_posix() for folder in folders for each in _files(folder)]
    # the file may lie in another folder of the package
    same = [each for each in names if PurePosixPath(each).name == parts[-1]]
    close = same or difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"; did you mean {PREFIX}{name}/{close[0]}?" if close else f" (it is in {folders[0]})"
    return f"the package {name} holds no {wanted}{hint}"


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        yield from (Path(root, each) for each in sorted([*files, *folders]))


def resolve_all(data: dict[str, Any]) -> list[Problem]:
    """Replace every reference in the options of a run by its path, in place; what is wrong, with the option's path.

    What has a wrong type is left alone, as a reference that leads nowhere is.
    """
    problems: list[Problem] = []

    def found(value: Any, path: str, *, pattern: bool = False) -> Any:
        try:
            return resolve(value, pattern=pattern) if is_reference(value) else value
        except PackageError as error:
            problems.append((path, str(error)))
            return value

    def below(group: Any, name: str) -> Any:
        return group.get(name) if isinstance(group, dict) else None

    def replace(group: Any, name: str, path: str) -> None:
        if name in (group if isinstance(group, dict) else ()):
            group[name] = found(group[name], path)

    sources = below(below(data, "data"), "sources")
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        files = below(source, "files")
        if isinstance(files, list):
            where = f"data.sources.{index}.files"
            source["files"] = [found(file, f"{where}.{place}", pattern=True) for place, file in enumerate(files)]
    replace(below(below(data, "data"), "tokenizer"), "path", "data.tokenizer.path")
    replace(below(data, "model"), "pretrained", "model.pretrained")
    replace(below(below(data, "distill"), "teacher"), "pretrained", "distill.teacher.pretrained")
    return problems
