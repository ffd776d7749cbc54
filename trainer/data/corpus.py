"""Sources of text as documents, in an order that depends on nothing but the sources."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.schema import SourceConfig
from trainer.data.formats import Record, kind_of, read_records, read_text
from trainer.errors import DataError


class Document(NamedTuple):
    """One text of a source."""

    name: str
    text: str
    """May hold lone surrogates where bytes could not be decoded."""
    label: str | None = None
    """Name of its class, where the source has one."""


_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """One source with its files found; nothing is read yet."""

    name: str
    config: SourceConfig
    files: tuple[tuple[str, Path], ...]
    """(name in reports, path), in the order of reading."""
    dataset: Any = None
    """The `datasets.Dataset` of a hub source."""

    @property
    def num_documents(self) -> int | None:
        """How many there will be, where it is known without reading."""
        if self.dataset is not None:
            return len(self.dataset)
        return len(self.files) if all(kind_of(path) == "text" for _, path in self.files) else None

    @property
    def num_bytes(self) -> int:
        """Size of the source as it is stored."""
        if self.dataset is not None:
            return int(self.dataset.data.nbytes)
        return sum(path.stat().st_size for _, path in self.files)

    def documents(self) -> Iterator[Document]:
        """Each document of the source.

        Raises:
            DataError: a file is unreadable or binary, or a record lacks a column or its class.
        """
        if self.dataset is not None:
            yield from self._texts(self.name, self._rows(), self.dataset.column_names)
            return
        for name, path in self.files:
            if kind_of(path) == "text":
                if self.config.column or self.config.template or self.config.label:
                    raise DataError(
                        f"source {self.name}: {name} is plain text without columns: "
                        "leave out `column`, `template` and `label`, or put it into a source of its own"
                    )
                yield Document(name, read_text(path, name))
            else:
                yield from self._texts(name, read_records(path, name, self._columns))

    @property
    def _column(self) -> str:
        return self.config.column or "text"

    @property
    def _columns(self) -> list[str] | None:
        """Columns that are read; None: a template may ask for any."""
        if self.config.template:
            return None
        return [self._column, *([self.config.label] if self.config.label else [])]

    def _rows(self) -> Iterator[tuple[int, Record]]:
        dataset = self.dataset
        names = getattr(dataset.features.get(self.config.label), "names", None)
        if self._columns and set(self._columns) <= set(dataset.column_names):
            dataset = dataset.select_columns(self._columns)
        number = 0
        for batch in dataset.iter(batch_size=_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                record = dict(zip(batch, values, strict=True))
                if names and self.config.label and isinstance(place := record.get(self.config.label), int):
                    # the hub stores the number of a class beside a list of names; −1: not told
                    record[self.config.label] = names[place] if 0 <= place < len(names) else None
                yield number, record

    def _texts(
        self, name: str, records: Iterable[tuple[int, Record]], columns: Sequence[str] | None = None
    ) -> Iterator[Document]:
        render = _renderer(self.config.template, self.name) if self.config.template else None
        for number, record in records:
            where = f"{name}:{number}"
            label = self._label(record, where, columns) if self.config.label else None
            if render:
                yield Document(where, render(record, where), label)
                continue
            text = _value(record, self._column, where, columns)
            if not isinstance(text, str | None):
                raise DataError(f"{where}: column {self._column!r} holds {type(text).__name__}, not text")
            yield Document(where, text or "", label)

    def _label(self, record: Record, where: str, columns: Sequence[str] | None) -> str:
        assert self.config.label is not None
        value = _value(record, self.config.label, where, columns)
        if not isinstance(value, str | int | None):
            found = type(value).__name__
            raise DataError(f"{where}: column {self.config.label!r} holds {found}, not a name or a whole number")
        # a name goes into the model's configuration: one line, in characters that UTF-8 has
        name = "" if value is None else " ".join(str(value).encode("utf-8", "replace").decode().split())
        if not name:
            raise DataError(f"{where} has no class: column {self.config.label!r} is empty; fill it in, or leave it out")
        return name


def _value(record: Record, column: str, where: str, columns: Sequence[str] | None) -> Any:
    if column not in record:
        raise DataError(f"{where} has no column {column!r}: {_nearest(column, columns or record)}")
    return record[column]


def _nearest(wanted: str, columns: Iterable[str]) -> str:
    known = [str(column) for column in columns]
    close = get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {', '.join(map(repr, known))}"


def _renderer(template: str, source: str) -> Callable[[Record, str], str]:
    """A function (record, place) → text. The template is sandboxed, and a name that a record lacks is an error."""
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
    from jinja2.sandbox import SandboxedEnvironment

    # the result is text, never HTML
    environment = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    try:
        compiled = environment.from_string(template)
    except TemplateSyntaxError as error:
        raise DataError(f"source {source}: the template is wrong in line {error.lineno}: {error.message}") from error

    def render(record: Record, where: str) -> str:
        try:
            return compiled.render(record)
        except UndefinedError as error:
            raise DataError(
                f"{where}: the template asks for more than the record has: {error.message}; "
                f"it has {', '.join(map(repr, record))}"
            ) from error
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise DataError(f"{where}: the template fails: {error}") from error

    return render


def resolve(configs: Sequence[SourceConfig], base: Path) -> list[Source]:
    """The sources with their files found.

    Args:
        base: folder that relative paths begin in.

    Raises:
        DataError: a pattern matches nothing, or a hub dataset cannot be loaded.
    """
    sources: list[Source] = []
    for config in configs:
        if config.stdlib:
            source = Source(config.name or "stdlib", config, standard_library())
        elif config.files:
            more = f" and {len(config.files) - 1} more" if len(config.files) > 1 else ""
            source = Source(config.name or config.files[0] + more, config, _matches(config.files, base))
        elif config.hub:
            source = _hub(config, config.hub, base)
        else:
            raise DataError("a source names neither `stdlib` nor `files` nor `hub`")
        taken = sum(other.name.split(" #")[0] == source.name for other in sources)
        if taken:
            source = Source(f"{source.name} #{taken + 1}", config, source.files, source.dataset)
        sources.append(source)
    return sources


def standard_library() -> tuple[tuple[str, Path], ...]:
    """The Python files of the standard library but its tests: some distributions leave those out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and name != "__pycache__"]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return tuple(sorted((path.relative_to(root).as_posix(), path) for path in found))


def _matches(patterns: Sequence[str], base: Path) -> tuple[tuple[str, Path], ...]:
    found: dict[Path, str] = {}
    for pattern in patterns:
        absolute = Path(os.path.abspath(base / Path(pattern).expanduser()))  # noqa: PTH100 - keeps symbolic links
        # Path.glob follows other rules for hidden files and `**`, and cannot take an absolute pattern
        found_names = glob(str(absolute), recursive=True)  # noqa: PTH207
        hits = [absolute] if absolute.exists() else [Path(hit) for hit in found_names]
        files = [hit for hit in hits if hit.is_file()]
        if not files:
            folder = next((hit for hit in hits if hit.is_dir()), None)
            advice = f"{folder} is a folder; write {pattern.rstrip('/')}/**/*.txt" if folder else f"looked in {base}"
            raise DataError(f"no file matches {pattern!r} ({advice})")
        for path in sorted(files, key=str):
            found.setdefault(path, str(path.relative_to(base)) if path.is_relative_to(base) else str(path))
    return tuple((name, path) for path, name in found.items())


def _hub(config: SourceConfig, identifier: str, base: Path) -> Source:
    import datasets

    folder = base / Path(identifier).expanduser()
    is_folder = folder.is_dir()
    name = config.name or (f"{identifier}/{config.hub_config}" if config.hub_config else identifier)
    try:
        dataset = datasets.load_dataset(str(folder) if is_folder else identifier, config.hub_config, split=config.split)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"hub dataset {identifier!r} cannot be loaded: {reason}") from error
    needed = [config.column or "text"] if config.template is None else []
    for wanted in needed + ([config.label] if config.label else []):
        if wanted not in dataset.column_names:
            raise DataError(
                f"hub dataset {identifier!r} has no column {wanted!r}: {_nearest(wanted, dataset.column_names)}"
            )
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if is_folder else []
    return Source(name, config, tuple((str(path.relative_to(folder)), path) for path in files), dataset)
