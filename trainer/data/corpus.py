"""Sources of text as documents, in an order that depends on nothing but the sources."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any

from trainer.config.schema import SourceConfig
from trainer.data.formats import Record, kind_of, read_records, read_text
from trainer.errors import DataError

Document = tuple[str, str]
"""(name, text); the text may hold lone surrogates where bytes could not be decoded."""
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
            DataError: a file is unreadable or binary, or a record lacks a column.
        """
        if self.dataset is not None:
            yield from self._texts(self.name, self._rows(), self.dataset.column_names)
            return
        for name, path in self.files:
            if kind_of(path) == "text":
                if self.config.column or self.config.template:
                    raise DataError(
                        f"source {self.name}: {name} is plain text without columns: "
                        "leave out `column` and `template`, or put it into a source of its own"
                    )
                yield name, read_text(path, name)
            else:
                columns = None if self.config.template else [self._column]
                yield from self._texts(name, read_records(path, name, columns))

    @property
    def _column(self) -> str:
        return self.config.column or "text"

    def _rows(self) -> Iterator[tuple[int, Record]]:
        dataset = self.dataset
        if not self.config.template and self._column in dataset.column_names:
            dataset = dataset.select_columns([self._column])
        number = 0
        for batch in dataset.iter(batch_size=_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, dict(zip(batch, values, strict=True))

    def _texts(
        self, name: str, records: Iterable[tuple[int, Record]], columns: Sequence[str] | None = None
    ) -> Iterator[Document]:
        render = _renderer(self.config.template, self.name) if self.config.template else None
        for number, record in records:
            where = f"{name}:{number}"
            if render:
                yield where, render(record, where)
                continue
            if self._column not in record:
                raise DataError(f"{where} has no column {self._column!r}: {_nearest(self._column, columns or record)}")
            text = record[self._column]
            if not isinstance(text, str | None):
                raise DataError(f"{where}: column {self._column!r} holds {type(text).__name__}, not text")
            yield where, text or ""


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
    if config.template is None and (config.column or "text") not in dataset.column_names:
        wanted = config.column or "text"
        raise DataError(
            f"hub dataset {identifier!r} has no column {wanted!r}: {_nearest(wanted, dataset.column_names)}"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if is_folder else []
    return Source(name, config, tuple((str(path.relative_to(folder)), path) for path in files), dataset)
