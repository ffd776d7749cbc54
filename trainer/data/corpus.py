"""Sources of text as documents, in an order that depends on nothing but the sources."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.objective import Kind
from trainer.config.schema import SourceConfig
from trainer.data.formats import Record, kind_of, read_records, read_text
from trainer.errors import DataError

Span = tuple[int, int, str]
"""(first character, the one after the last, label)"""


class Document(NamedTuple):
    """One text of a source."""

    name: str
    text: str
    """May hold lone surrogates where bytes could not be decoded."""
    label: str | None = None
    """Name of its class, where the source has one."""
    second: str | None = None
    """A text that belongs to it: the other of a pair, a question about it, what it is to become."""
    labels: tuple[str, ...] | None = None
    """Names of its classes, where it may be of several."""
    number: float | None = None
    """What is to be predicted of it."""
    spans: tuple[Span, ...] | None = None
    """In ascending order: tagged words or entities; the answers of a question or a conversation."""
    is_words: bool = False
    """Whether the spans are all words of the text."""


Make = Callable[[Record, str, "Sequence[str] | None", Callable[[], Any]], Document]
"""(record, place, columns of the source where known, what the text column or the template gives) → document"""


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
    kind: Kind | None = None
    """What the texts are for; None: predicting tokens, or the class where they have a label."""

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

    @property
    def is_labelled(self) -> bool:
        """Whether its documents bring something to be predicted of them."""
        return self.config.label is not None or self.config.label_from_folder

    @property
    def has_answers(self) -> bool:
        """Whether its documents are made of what is asked and answered."""
        return self.config.messages is not None or (self.config.prompt is not None and self.config.answer is not None)

    def documents(self, make: Make | None = None) -> Iterator[Document]:
        """Each document of the source.

        Args:
            make: makes a document of a record, or of a file of plain text (as a record without columns). By default a
                document is its text.

        Raises:
            DataError: a file is unreadable or binary, or a record lacks a column or its class.
        """
        if self.dataset is not None:
            yield from self._texts(self.name, self._rows(), self.dataset.column_names, make)
            return
        for name, path in self.files:
            if kind_of(path) == "text":
                if self.config.template or any(getattr(self.config, column) for column in _COLUMNS):
                    raise DataError(
                        f"source {self.name}: {name} is plain text without columns: "
                        "leave out `column`, `template` and `label`, or put it into a source of its own"
                    )
                text = read_text(path, name)
                yield make(_in_folder({}, path), name, None, partial(str, text)) if make else Document(name, text)
            else:
                records = read_records(path, name, self._columns)
                if self.config.label_from_folder:
                    records = ((number, _in_folder(record, path)) for number, record in records)
                yield from self._texts(name, records, make=make)

    @property
    def _column(self) -> str:
        return self.config.column or "text"

    @property
    def _columns(self) -> list[str] | None:
        """Columns that are read; None: a template may ask for any."""
        if self.config.template:
            return None
        return self.needed

    @property
    def needed(self) -> list[str]:
        """Columns that records must have; those that a template asks for aside."""
        config = self.config
        has_text = self.kind == "question_answering" or not self.has_answers
        text = [self._column] if config.template is None and has_text else []
        return [*text, *filter(None, (config.label, config.pair, config.messages, config.prompt, config.answer))]

    def _rows(self) -> Iterator[tuple[int, Record]]:
        dataset = self.dataset
        names = _class_names(dataset.features.get(self.config.label))
        if self._columns and set(self._columns) <= set(dataset.column_names):
            dataset = dataset.select_columns(self._columns)
        number = 0
        for batch in dataset.iter(batch_size=_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                record = dict(zip(batch, values, strict=True))
                if names and self.config.label:
                    record[self.config.label] = _named(record.get(self.config.label), names)
                yield number, record

    def _texts(
        self,
        name: str,
        records: Iterable[tuple[int, Record]],
        columns: Sequence[str] | None = None,
        make: Make | None = None,
    ) -> Iterator[Document]:
        render = _renderer(self.config.template, self.name) if self.config.template else None
        for number, record in records:
            where = f"{name}:{number}"
            if make:
                yield make(record, where, columns, partial(self._text, render, record, where, columns))
            else:
                yield Document(where, plain(self._text(render, record, where, columns), self._column, where))

    def _text(
        self,
        render: Callable[[Record, str], str] | None,
        record: Record,
        where: str,
        columns: Sequence[str] | None,
    ) -> Any:
        return render(record, where) if render else value_of(record, self._column, where, columns)


_COLUMNS = ("column", "label", "pair", "messages", "prompt", "answer")
FOLDER = "\0folder"
"""Column of a record that holds the name of its file's folder; no file has one of this name."""


def _in_folder(record: Record, path: Path) -> Record:
    return {**record, FOLDER: path.parent.name}


def _class_names(feature: Any) -> list[str] | None:
    """Names of the classes of a hub dataset's column, or of each element of it."""
    names: list[str] | None = getattr(feature, "names", None) or getattr(
        getattr(feature, "feature", None), "names", None
    )
    return names


def _named(value: Any, names: Sequence[str]) -> Any:
    """The hub stores the number of a class beside a list of names; −1: not told."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def plain(value: Any, column: str, where: str) -> str:
    """The text of a column; empty where the record has none.

    Raises:
        DataError: it holds something else.
    """
    if not isinstance(value, str | None):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value or ""


def value_of(record: Record, column: str, where: str, columns: Sequence[str] | None) -> Any:
    """What a record has in a column.

    Raises:
        DataError: it has no such column; names one that is spelled alike.
    """
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


def resolve(configs: Sequence[SourceConfig], base: Path, kind: Kind | None = None) -> list[Source]:
    """The sources with their files found.

    Args:
        base: folder that relative paths begin in.

    Raises:
        DataError: a pattern matches nothing, or a hub dataset cannot be loaded.
    """
    sources: list[Source] = []
    for config in configs:
        if config.stdlib:
            source = Source(config.name or "stdlib", config, standard_library(), kind=kind)
        elif config.files:
            more = f" and {len(config.files) - 1} more" if len(config.files) > 1 else ""
            source = Source(config.name or config.files[0] + more, config, _matches(config.files, base), kind=kind)
        elif config.hub:
            source = _hub(config, config.hub, base, kind)
        else:
            raise DataError("a source names neither `stdlib` nor `files` nor `hub`")
        taken = sum(other.name.split(" #")[0] == source.name for other in sources)
        if taken:
            source = replace(source, name=f"{source.name} #{taken + 1}")
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


def _hub(config: SourceConfig, identifier: str, base: Path, kind: Kind | None) -> Source:
    import datasets

    folder = base / Path(identifier).expanduser()
    is_folder = folder.is_dir()
    name = config.name or (f"{identifier}/{config.hub_config}" if config.hub_config else identifier)
    try:
        dataset = datasets.load_dataset(str(folder) if is_folder else identifier, config.hub_config, split=config.split)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"hub dataset {identifier!r} cannot be loaded: {reason}") from error
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if is_folder else []
    source = Source(name, config, tuple((str(path.relative_to(folder)), path) for path in files), dataset, kind)
    for wanted in source.needed:
        if wanted not in dataset.column_names:
            raise DataError(
                f"hub dataset {identifier!r} has no column {wanted!r}: {_nearest(wanted, dataset.column_names)}"
            )
    return source
