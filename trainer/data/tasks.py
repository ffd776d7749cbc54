"""Records of labelled sources as documents: what each kind of task needs, found, and named where it is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from trainer.config.schema import SourceConfig
from trainer.data.chat import ANSWER, Chat
from trainer.data.corpus import FOLDER, Document, Make, Source, Span, plain, value_of
from trainer.data.formats import Record
from trainer.errors import DataError

_Columns = Sequence[str] | None
_Text = Callable[[], Any]


def maker(source: Source, chat: Chat | None) -> Make | None:
    """What makes the documents of a source for its kind; None: they are texts without more.

    Args:
        chat: of the tokenizer; needed where answers are learned.

    Raises:
        DataError: the source lacks an option that the kind needs.
    """
    kind, config = source.kind, source.config
    if kind in {"multi_label", "regression", "token_classification"} and not source.is_labelled:
        raise DataError(f"source {source.name}: no `label`, which objective.kind {kind} needs")
    if kind == "question_answering" and not (config.prompt and config.answer):
        raise DataError(f"source {source.name}: answering questions needs `prompt` and `answer`")
    if kind == "seq2seq" and not (config.prompt and config.answer):
        raise DataError(f"source {source.name}: objective.kind seq2seq needs `prompt` and `answer`")
    match kind:
        case "multi_label":
            return partial(_multi_label, config)
        case "regression":
            return partial(_regression, config)
        case "token_classification":
            return partial(_words, config)
        case "question_answering":
            return partial(_question, config)
        case "seq2seq":
            return partial(_translation, config)
        case _ if source.is_labelled:
            return partial(_classification, config)
        case _ if chat is not None:
            return partial(_conversation if source.has_answers else _whole, config, chat)
    return None


def _label(config: SourceConfig, record: Record, where: str, columns: _Columns) -> tuple[Any, str]:
    """The value, and what it is called in messages."""
    if config.label is None:
        return record[FOLDER], "the folder's name"
    return value_of(record, config.label, where, columns), f"column {config.label!r}"


def _pair(config: SourceConfig, record: Record, where: str, columns: _Columns) -> str | None:
    return plain(value_of(record, config.pair, where, columns), config.pair, where) if config.pair else None


def _own(config: SourceConfig, text: _Text, where: str) -> str:
    return plain(text(), config.column or "text", where)


def _name(value: Any) -> str:
    # a name goes into the model's configuration: one line, in characters that UTF-8 has
    return " ".join(str(value).encode("utf-8", "replace").decode().split())


def _classification(config: SourceConfig, record: Record, where: str, columns: _Columns, text: _Text) -> Document:
    value, place = _label(config, record, where, columns)
    if not isinstance(value, str | int | None):
        raise DataError(f"{where}: {place} holds {type(value).__name__}, not a name or a whole number")
    name = "" if value is None else _name(value)
    if not name:
        raise DataError(f"{where} has no class: {place} is empty; fill it in, or leave it out")
    own = _own(config, text, where)
    return Document(where, own, name, _pair(config, record, where, columns))


def _multi_label(config: SourceConfig, record: Record, where: str, columns: _Columns, text: _Text) -> Document:
    value, place = _label(config, record, where, columns)
    value = _parsed(value, "[")
    if isinstance(value, str):
        value = [name for name in value.split(",") if name.strip()]
    elif value is None:
        value = []
    elif isinstance(value, int):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, str | int) and _name(each) for each in value):
        raise DataError(f"{where}: {place} is not a list of names, nor names between commas")
    # in one order and each once: equal sets are equal labels
    labels = tuple(sorted({_name(each) for each in value}))
    own = _own(config, text, where)
    return Document(where, own, second=_pair(config, record, where, columns), labels=labels)


def _regression(config: SourceConfig, record: Record, where: str, columns: _Columns, text: _Text) -> Document:
    value, place = _label(config, record, where, columns)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # labels are float32
    if not abs(number) < 3.4e38:
        raise DataError(f"{where}: {place} holds {value!r}, not a finite number, which regression needs")
    own = _own(config, text, where)
    return Document(where, own, second=_pair(config, record, where, columns), number=number)


def _words(config: SourceConfig, record: Record, where: str, columns: _Columns, text: _Text) -> Document:
    value, place = _label(config, record, where, columns)
    tags, words = _parsed(value, "[", "{"), _parsed(text(), "[")
    column = config.column or "text"
    if isinstance(words, list):
        if not isinstance(tags, list) or len(tags) != len(words):
            found = f"{len(tags)} tags" if isinstance(tags, list) else f"{type(tags).__name__}, no list of tags"
            raise DataError(f"{where}: column {column!r} holds {len(words)} words, and {place} {found}")
        return _tagged(words, tags, column, place, where)
    own = plain(words, column, where)
    return Document(where, own, spans=_entities(own, tags, place, where))


def _tagged(words: list[Any], tags: list[Any], column: str, place: str, where: str) -> Document:
    """The words with a space between each two; a word is where its tag is."""
    spans, begin = [], 0
    for word, tag in zip(words, tags, strict=True):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: column {column!r} holds {word!r} among its words")
        if not isinstance(tag, str | int) or not _name(tag):
            raise DataError(f"{where}: {place} holds {tag!r} among its tags")
        spans.append((begin, begin + len(word), _name(tag)))
        begin += len(word) + 1
    return Document(where, " ".join(words), spans=tuple(spans), is_words=True)


def _entities(text: str, value: Any, place: str, where: str) -> tuple[Span, ...]:
    if isinstance(value, dict) and all(isinstance(each, list) for each in value.values()):
        # the hub stores a list of records as a record of lists
        value = [dict(zip(value, each, strict=False)) for each in zip(*value.values(), strict=False)]
    spans = []
    for each in value or []:
        if not isinstance(each, dict) or not {"start", "end", "label"} <= each.keys():
            raise DataError(f"{where}: {place} is neither a list of tags beside a list of words nor one of spans "
                            "{start, end, label}")  # fmt: skip
        begin, end, label = each["start"], each["end"], each["label"]
        if not isinstance(begin, int) or not isinstance(end, int) or not 0 <= begin < end <= len(text):
            raise DataError(f"{where}: {place} holds the span {begin}…{end} of a text of {len(text)} characters")
        if not isinstance(label, str | int) or not _name(label):
            raise DataError(f"{where}: {place} holds a span without a label")
        spans.append((begin, end, _name(label)))
    spans.sort()
    for one, other in pairwise(spans):
        if other[0] < one[1]:
            raise DataError(f"{where}: {place} holds the spans {one[0]}…{one[1]} and {other[0]}…{other[1]}, which "
                            "overlap: a word has one tag")  # fmt: skip
    return tuple(spans)


def _question(config: SourceConfig, record: Record, where: str, columns: _Columns, text: _Text) -> Document:
    assert config.prompt is not None
    assert config.answer is not None
    question = plain(value_of(record, config.prompt, where, columns), config.prompt, where)
    if not question.strip():
        raise DataError(f"{where}: column {config.prompt!r} is empty, and holds the question")
    own = _own(config, text, where)
    value = _parsed(value_of(record, config.answer, where, columns), "{")
    if value is None or value == "":
        return Document(where, own, second=question, spans=())
    if isinstance(value, str):
        found = [(own.find(value), value)]
    elif isinstance(value, dict) and {"text", "answer_start"} <= value.keys():
        texts, starts = (_many(value[name]) for name in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise DataError(f"{where}: column {config.answer!r} holds {len(texts)} answers and {len(starts)} places")
        found = list(zip(starts, texts, strict=True))
    else:
        raise DataError(f"{where}: column {config.answer!r} holds neither {{text, answer_start}} nor a passage")
    spans = []
    for begin, answer in found:
        if not isinstance(answer, str) or not isinstance(begin, int) or not answer:
            raise DataError(f"{where}: column {config.answer!r} holds no text and place of an answer")
        if begin < 0 or own[begin : begin + len(answer)] != answer:
            raise DataError(f"{where}: the answer {answer[:60]!r} does not stand in the text where it is said to")
        spans.append((begin, begin + len(answer), ANSWER))
    # the first that is given is learned, all are right
    return Document(where, own, second=question, spans=tuple(spans))


def _translation(config: SourceConfig, record: Record, where: str, columns: _Columns, _: _Text) -> Document:
    assert config.prompt is not None
    assert config.answer is not None
    asked, answer = (
        plain(value_of(record, column, where, columns), column, where) for column in (config.prompt, config.answer)
    )
    return Document(where, asked, second=answer)


def _conversation(
    config: SourceConfig, chat: Chat, record: Record, where: str, columns: _Columns, _: _Text
) -> Document:
    if config.messages is not None:
        text, spans = chat.conversation(_parsed(value_of(record, config.messages, where, columns), "["), where)
        return Document(where, text, spans=spans)
    assert config.prompt is not None
    assert config.answer is not None
    asked, answer = (
        plain(value_of(record, column, where, columns), column, where) for column in (config.prompt, config.answer)
    )
    if not answer.strip():
        raise DataError(f"{where}: column {config.answer!r} is empty, and holds the answer to learn")
    text, spans = chat.turn(asked, answer, where)
    return Document(where, text, spans=spans)


def _whole(config: SourceConfig, _chat: Chat, _record: Record, where: str, _: _Columns, text: _Text) -> Document:
    """Text beside conversations: all of it is learned."""
    own = _own(config, text, where)
    return Document(where, own)


def _parsed(value: Any, *begins: str) -> Any:
    """What a cell of a table spells in JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(begins):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
