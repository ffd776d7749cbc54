"""Labelled texts from a file, for a model that may come from anywhere: checked against it, and tokenised as it asks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.objective import Kind
from trainer.data.chat import Chat
from trainer.data.formats import read_records
from trainer.data.samples import IGNORED
from trainer.errors import DataError
from trainer.records import IntArray
from trainer.stages.scoring import EMPTY

Change = Callable[[str, int], str]
"""(text, its number) → the text with noise in it."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a record has what."""

    text: str = "text"
    label: str | None = None
    """Class, number, list of classes or tags, the answers, or the text to be written."""
    second: str | None = None
    """A second text, or the question."""


@dataclass(frozen=True, slots=True)
class Example:
    """One text to predict for."""

    text: Any
    """Of token classification a list of words."""
    truth: Any
    second: str | None
    where: str
    """File and record."""


@dataclass
class Examples:
    """Texts of one file.

    Attributes:
        counts: of what was met and dealt with, by what was done.
        chat: of a causal model that is asked for answers: puts both together as it learned them.
    """

    kind: Kind
    names: tuple[str, ...]
    examples: list[Example]
    counts: Counter[str] = field(default_factory=Counter)
    chat: Chat | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def text(self, number: int) -> str:
        """What a person reads."""
        one = self.examples[number]
        text = " ".join(one.text) if isinstance(one.text, list) else str(one.text)
        return text if one.second is None else f"{one.second} ‖ {text}"

    def where(self, ids: IntArray) -> list[str]:
        return [self.examples[number].where for number in ids.tolist()]

    def batches(
        self, batches: Iterator[IntArray], tokenizer: Any, length: int, change: Change | None = None
    ) -> Iterator[tuple[IntArray, dict[str, NDArray[Any]]]]:
        """Arrays of each batch of ids, as the kind's objective takes them; an empty place repeats the last text."""
        for ids in batches:
            rows = [self.examples[number if number != EMPTY else -1] for number in ids.tolist()]
            texts = [
                one.text if change is None else change(one.text, number)
                for one, number in zip(rows, ids.tolist(), strict=True)
            ]
            seconds = [one.second for one in rows] if rows[0].second is not None else None
            yield ids, self._arrays(texts, seconds, rows, ids, tokenizer, length, count=change is None)

    def asked(self, number: int) -> str:
        """What a model is given to go on from."""
        one = self.examples[number]
        return one.text if self.chat is None else self.chat.question(one.text, one.where)

    def _answers(self, rows: Sequence[Example], tokenizer: Any, length: int) -> dict[str, NDArray[Any]]:
        """Questions with their answers, which alone are targets: the label of a place is the token that follows it."""
        assert self.chat is not None
        ids, labels = [], []
        for one in rows:
            text, ((begin, end, _),) = self.chat.turn(one.text, one.truth, one.where)
            found = tokenizer(
                text, add_special_tokens=False, truncation=True, max_length=length, return_offsets_mapping=True
            )
            ids.append(found["input_ids"])
            places = zip(found["input_ids"], found["offset_mapping"], strict=True)
            own = [token if begin <= first < end else IGNORED for token, (first, _) in places]
            labels.append([*own[1:], IGNORED])
        mask = _padded([[1] * len(row) for row in ids], 0)
        padded = _padded(ids, tokenizer.pad_token_id or 0)
        return {"input_ids": padded, "attention_mask": mask, "labels": _padded(labels, IGNORED)}

    def _arrays(
        self,
        texts: list[Any],
        seconds: list[Any] | None,
        rows: Sequence[Example],
        ids: IntArray,
        tokenizer: Any,
        length: int,
        *,
        count: bool,
    ) -> dict[str, NDArray[Any]]:
        if self.chat is not None:
            return self._answers(rows, tokenizer, length)
        words = self.kind == "token_classification"
        options = {"truncation": True, "max_length": length, "is_split_into_words": words}
        found = tokenizer(texts, seconds, return_overflowing_tokens=False, **options)
        if count:
            whole = tokenizer(texts, seconds, is_split_into_words=words, verbose=False)["input_ids"]
            self.counts["longer than the model takes, and cut"] += sum(
                len(ids) > length for ids, number in zip(whole, ids.tolist(), strict=True) if number != EMPTY
            )
        padded = _padded(found["input_ids"], tokenizer.pad_token_id or 0)
        arrays = {"input_ids": padded, "attention_mask": _padded([[1] * len(row) for row in found["input_ids"]], 0)}
        if "token_type_ids" in found:
            arrays["token_type_ids"] = _padded(found["token_type_ids"], 0)
        arrays["labels"] = self._labels([one.truth for one in rows], found, padded, arrays["attention_mask"])
        if self.kind == "causal":
            # the label of a place is the token that follows it
            arrays = {
                name: np.ascontiguousarray(array[:, : max(1, padded.shape[1] - 1)]) for name, array in arrays.items()
            }
        return arrays

    def _labels(self, truths: list[Any], found: Any, padded: IntArray, mask: IntArray) -> NDArray[Any]:
        match self.kind:
            case "classification":
                return np.array(truths, dtype=np.int64)
            case "multi_label":
                return np.array([[number in true for number in range(len(self.names))] for true in truths], np.float32)
            case "regression":
                return np.array(truths, dtype=np.float32)
            case "token_classification":
                labels = np.full(padded.shape, IGNORED, dtype=np.int64)
                for row, true in enumerate(truths):
                    before = None
                    for place, word in enumerate(found.word_ids(row)):
                        if word is not None and word != before:
                            labels[row, place] = true[word]
                        before = word
                return labels
            case _:
                shifted = np.full(padded.shape, IGNORED, dtype=np.int64)
                shifted[:, :-1] = np.where(mask[:, 1:] > 0, padded[:, 1:], IGNORED)
                return shifted


def read_examples(path: Path, kind: Kind, columns: Columns, names: Sequence[str]) -> Examples:
    """The records of a csv, tsv, jsonl, json or parquet file.

    Args:
        names: of the model's classes, in their order; labels are matched to them by name, or by number.

    Raises:
        DataError: an unreadable file; a missing column; a label that the model does not know or that is out of range;
            an empty text; no record.
    """
    found = Examples(kind, tuple(names), [])
    for number, record in read_records(path, path.name, None):
        where = f"{path.name}: record {number}"
        text = _value(record, columns.text, where, "text")
        if kind == "token_classification":
            text = _listed(text, where, columns.text)
        if not text or (isinstance(text, str) and not text.strip()):
            raise DataError(
                f"{where}: the text in column {columns.text!r} is empty; fill it in or leave the record out"
            )
        truth = None
        if columns.label is not None:
            truth = _truth(kind, _value(record, columns.label, where, "label"), found, where, columns.label)
            if kind == "token_classification" and len(truth) != len(text):
                raise DataError(f"{where}: {len(text)} words and {len(truth)} tags; there must be one tag a word")
        second = None if columns.second is None else str(_value(record, columns.second, where, "second"))
        found.examples.append(Example(text, truth, second, where))
    if not found.examples:
        raise DataError(f"{path} holds no record")
    return found


def _value(record: dict[str, Any], column: str, where: str, option: str) -> Any:
    if column not in record:
        raise DataError(
            f"{where} has no column {column!r}, only {', '.join(map(repr, record))}: name it with --{option}"
        )
    return record[column]


def _listed(value: Any, where: str, column: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: column {column!r} begins with [ and is no list in JSON") from None
    elif isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    return list(value)


def _truth(kind: Kind, value: Any, found: Examples, where: str, column: str) -> Any:
    match kind:
        case "classification":
            return _class(value, found, where, column)
        case "multi_label" | "token_classification":
            return [_class(one, found, where, column) for one in _listed(value, where, column)]
        case "regression":
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise DataError(f"{where}: column {column!r} holds {value!r}, not a number")
            return number
        case "question_answering":
            return _answers(value, where, column)
    return "" if value is None else str(value)


def _class(value: Any, found: Examples, where: str, column: str) -> int:
    names, name = found.names, str(value).strip()
    if name in names:
        return names.index(name)
    try:
        number = int(name)
    except ValueError:
        raise DataError(
            f"{where}: column {column!r} holds {name!r}, which is no label of the model; it knows {_few(names)}"
        ) from None
    if not 0 <= number < len(names):
        raise DataError(
            f"{where}: column {column!r} holds the label {number}, and the model has {len(names)}: 0 … {len(names) - 1}"
        )
    found.counts["labels given as numbers, taken as places among the model's"] += 1
    return number


def _answers(value: Any, where: str, column: str) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: column {column!r} begins with {{ and is no object in JSON") from None
    if isinstance(value, dict):
        value = value.get("text", [])
    if value is None or value == "":
        return []
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def _few(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _padded(rows: Sequence[Sequence[int]], fill: int) -> IntArray:
    result = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, values in enumerate(rows):
        result[row, : len(values)] = values
    return result
