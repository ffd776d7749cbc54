"""Files as documents and records: plain text, JSON, CSV and Parquet, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from trainer.errors import DataError

Kind = Literal["text", "json", "csv", "parquet"]
Record = dict[str, Any]

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_KINDS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".parquet": "parquet",
}
_ROLES = {"", "class", "meta", "ignore", "c", "m", "i"}
"""In the third row of Orange's tables (.tab), under the names and the types of the columns."""
_DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_MAX_STRANGE = 0.1
"""A file that is not UTF-8 and has more than this fraction of undecodable or control characters is no text."""


def kind_of(path: Path) -> Kind:
    """How the file is read; what is not known to hold records is one document of plain text."""
    return _KINDS.get(_plain_suffix(path), "text")


def _plain_suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower()


def open_bytes(path: Path) -> BinaryIO:
    """The decompressed content."""
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".bz2":
            return cast(BinaryIO, bz2.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case ".zst":
            import pyarrow as pa

            # unlike zstandard's reader it goes on to further frames and refuses a truncated one
            return cast(BinaryIO, pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
        case _:
            return path.open("rb")


def read_text(path: Path, name: str) -> str:
    """The file as one text. Undecodable bytes arrive as lone surrogates (`surrogateescape`), to be repaired later.

    Raises:
        DataError: the file cannot be read or is binary.
    """
    try:
        with open_bytes(path) as file:
            data = file.read()
    except (OSError, *_DECOMPRESSION_ERRORS) as error:
        raise _unreadable(name, error) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    text = data.decode("utf-8-sig", "surrogateescape")
    if b"\0" in data or not (text.isascii() or _is_utf8(text)):
        strange = sum(character < " " and character not in "\t\n\r\f" for character in text)
        strange += sum("\ud800" <= character <= "\udfff" for character in text)
        if b"\0" in data or strange > _MAX_STRANGE * len(text):
            raise DataError(f"{name} is binary or not in UTF-8: convert it to UTF-8 text, or leave it out of `files`")
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(name: str, error: BaseException) -> DataError:
    return DataError(f"{name} cannot be read: {str(error) or type(error).__name__}")


def read_records(path: Path, name: str, columns: list[str] | None) -> Iterator[tuple[int, Record]]:
    """(number from 1, record) of each record of the file.

    Args:
        columns: where only these are needed, a columnar format reads no others.

    Raises:
        DataError: the file cannot be read or is not in the format of its suffix.
    """
    try:
        match kind_of(path):
            case "parquet":
                yield from enumerate(_parquet(path, columns), start=1)
            case "csv":
                yield from _csv(path, name)
            case _:
                yield from _json(path, name)
    except (OSError, *_DECOMPRESSION_ERRORS) as error:
        raise _unreadable(name, error) from error


def _parquet(path: Path, columns: list[str] | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_bytes(path) as file:
        try:
            table = pq.ParquetFile(pa.BufferReader(file.read()) if path.suffix.lower() in _COMPRESSED else path)
            # a missing column is named by the caller, who sees all the columns there are
            known = columns if columns and set(columns) <= set(table.schema_arrow.names) else None
            for batch in table.iter_batches(batch_size=1024, columns=known):
                yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise OSError(f"not Parquet ({error})") from error


def _csv(path: Path, name: str) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        suffix = _plain_suffix(path)
        rows = csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t", strict=True)
        try:
            records: Iterator[Record] = _without_head(rows) if suffix == ".tab" else rows
            for number, row in enumerate(records, start=1):
                if None in row:
                    raise DataError(
                        f"{name}: the row that ends in line {rows.line_num} has more fields than the header"
                    )
                yield number, row
        except csv.Error as error:
            raise DataError(f"{name}: after line {rows.line_num} it is not CSV: {error}") from error


def _without_head(rows: Iterator[Record]) -> Iterator[Record]:
    first = list(islice(rows, 2))
    if len(first) < 2 or not set(first[1].values()) <= _ROLES:
        yield from first
    yield from rows


def _json(path: Path, name: str) -> Iterator[tuple[int, Record]]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape") as file:
        start = file.readline()
        while start and not start.strip():
            start = file.readline()
        is_lines = not start.lstrip().startswith("[")
        if is_lines and _plain_suffix(path) == ".json":
            try:
                json.loads(start or "{}")
            except ValueError:
                is_lines = False
        if is_lines:
            values = _json_lines(start, file, name)
        else:
            try:
                whole = json.loads(start + file.read())
            except ValueError as error:
                raise DataError(f"{name} is not JSON: {error}") from error
            values = enumerate(whole if isinstance(whole, list) else [whole], start=1)
        for number, value in values:
            if not isinstance(value, dict):
                raise DataError(f"{name}: record {number} is a {type(value).__name__}, not an object with columns")
            yield number, value


def _json_lines(start: str, rest: io.TextIOWrapper, name: str) -> Iterator[tuple[int, Any]]:
    line, number = start, 0
    while line:
        if line.strip():
            number += 1
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{name}: record {number} is not JSON: {error}") from error
        line = rest.readline()
