"""Texts with spans or with a second text as tokens: where in the tokens the spans are. Runs in worker processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data import tokenize
from trainer.data.samples import IGNORED
from trainer.data.tokenize import Vocabulary
from trainer.records import IntArray

Marks = Literal["none", "answers", "words", "question"]
"""What the spans of a text become: nothing, a flag a token, a class a token, the first and the last token."""
Places = Sequence[tuple[int, int]]
"""Of each token the first character that it stands for, and the one after the last."""


@dataclass(frozen=True)
class ExtraTask:
    """Some documents that follow each other in a file of text, and in one of what belongs to them."""

    tokenizer: Path
    """tokenizer.json"""
    text: Path
    starts: IntArray
    """[documents + 1]: byte offsets in the file."""
    extra: Path
    extra_starts: IntArray
    """[documents + 1]"""
    vocabulary: Vocabulary
    marks: Marks
    outside: int = 0
    """`words`: number of the class of words that are in no span."""


@dataclass(frozen=True)
class Encoded:
    """Tokens and what is known of them, of some documents one after the other."""

    tokens: NDArray[Any]
    lengths: IntArray
    """[documents]"""
    arrays: dict[str, NDArray[Any]]
    """`second` and `second_lengths`; `marks` [tokens]; `spans` [documents, 2]; `places` [tokens, 2]."""


def encode(task: ExtraTask) -> Encoded:
    """Tokens of the documents, without end-of-text behind them unless they spell it."""
    texts = [data.decode() for data in _slices(task.text, task.starts)]
    extras = [json.loads(data) for data in _slices(task.extra, task.extra_starts)]
    # what is rendered spells special tokens and means them
    means_special = [task.marks == "answers" and extra["spans"] is not None for extra in extras]
    encodings: list[Any] = [None] * len(texts)
    for special in set(means_special):
        rows = [row for row, own in enumerate(means_special) if own == special]
        tokenizer = tokenize.load(task.tokenizer, special=special)
        found = tokenizer.encode_batch([texts[row] for row in rows], add_special_tokens=False)
        for row, encoding in zip(rows, found, strict=True):
            encodings[row] = encoding
    ids = [list(encoding.ids) for encoding in encodings]
    arrays: dict[str, NDArray[Any]] = {}
    if task.marks == "answers":
        # plain text beside conversations ends as it does elsewhere
        for own, extra in zip(ids, extras, strict=True):
            own += [task.vocabulary.eos_id] if extra["spans"] is None else []
        arrays["marks"] = np.concatenate(
            [
                _answers(len(own), e.offsets, extra["spans"])
                for own, e, extra in zip(ids, encodings, extras, strict=True)
            ]
        )
    elif task.marks == "words":
        both = zip(encodings, extras, strict=True)
        arrays["marks"] = np.concatenate([_word_classes(e, extra, task.outside) for e, extra in both])
    elif task.marks == "question":
        both = zip(encodings, extras, strict=True)
        spans = [answer_tokens(e.offsets, *extra["spans"][0]) if extra["spans"] else (-1, -1) for e, extra in both]
        arrays["spans"] = np.array(spans, dtype=np.int64)
        places = [np.array(e.offsets, dtype=np.int64).reshape(-1, 2) for e in encodings]
        arrays["places"] = np.concatenate(places).astype(np.int32)
    if any(extra["second"] is not None for extra in extras):
        tokenizer = tokenize.load(task.tokenizer)
        seconds = tokenizer.encode_batch([extra["second"] or "" for extra in extras], add_special_tokens=False)
        arrays["second"], arrays["second_lengths"] = _joined([e.ids for e in seconds], task.vocabulary)
    tokens, lengths = _joined(ids, task.vocabulary)
    return Encoded(tokens, lengths, arrays)


def _slices(path: Path, starts: IntArray) -> list[bytes]:
    with path.open("rb") as file:
        file.seek(int(starts[0]))
        data = file.read(int(starts[-1] - starts[0]))
    return [data[begin:end] for begin, end in pairwise((starts - starts[0]).tolist())]


def _joined(ids: Sequence[Sequence[int]], vocabulary: Vocabulary) -> tuple[NDArray[Any], IntArray]:
    lengths = np.array([len(own) for own in ids], dtype=np.int64)
    tokens = np.fromiter(chain.from_iterable(ids), vocabulary.dtype, int(lengths.sum()))
    return tokens, lengths


def touched(places: Places, begin: int, end: int) -> NDArray[np.bool_]:
    """Whether each token stands for a character of begin … end − 1, [tokens]. One that stands for none counts as the
    character it is before."""
    table = np.array(places, dtype=np.int64).reshape(-1, 2)
    return (table[:, 0] < end) & (np.maximum(table[:, 1], table[:, 0] + 1) > begin)


def _answers(length: int, places: Places, spans: Sequence[Sequence[int]] | None) -> NDArray[np.uint8]:
    if spans is None:
        result = np.ones(length, dtype=np.uint8)
    else:
        result = np.zeros(length, dtype=np.uint8)
        for begin, end in spans:
            result[touched(places, begin, end)] = 1
    # nothing of its document tells what the first token is
    result[:1] = 0
    return result


def answer_tokens(places: Places, begin: int, end: int) -> tuple[int, int]:
    """First and last token of the characters begin … end − 1; (−1, −1): no token stands for them."""
    found = np.flatnonzero(touched(places, begin, end))
    return (int(found[0]), int(found[-1])) if len(found) else (-1, -1)


def _word_classes(encoding: Any, extra: dict[str, Any], outside: int) -> NDArray[np.int32]:
    if extra["words"]:
        return word_marks(encoding.offsets, extra["spans"])
    return entity_marks(encoding.offsets, encoding.word_ids, extra["spans"], outside)


def word_marks(places: Places, words: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The class of each word at its first token, −100 elsewhere, [tokens].

    Args:
        words: (first character, the one after the last, class), in ascending order.
    """
    result = np.full(len(places), IGNORED, dtype=np.int32)
    token = 0
    for begin, end, number in words:
        while token < len(places) and places[token][1] <= begin:
            token += 1
        # a word that the vocabulary leaves nothing of has no token of its own
        if token < len(places) and places[token][0] < end and result[token] == IGNORED:
            result[token] = number
    return result


def entity_marks(
    places: Places, words: Sequence[int | None], entities: Sequence[Sequence[int]], outside: int
) -> NDArray[np.int32]:
    """The class of each of the tokenizer's words at its first token, −100 elsewhere, [tokens].

    Args:
        words: number of the word that each token is of.
        entities: (first character, the one after the last, class of its first word, class of others), ascending.
        outside: class of a word that touches no entity.
    """
    result = np.full(len(places), IGNORED, dtype=np.int32)
    began: set[int] = set()
    entity, token = 0, 0
    while token < len(places):
        last = token
        while last + 1 < len(places) and words[last + 1] == words[token] and words[token] is not None:
            last += 1
        begin, end = places[token][0], max(places[last][1], places[token][0] + 1)
        while entity < len(entities) and entities[entity][1] <= begin:
            entity += 1
        if entity < len(entities) and entities[entity][0] < end:
            result[token] = entities[entity][3 if entity in began else 2]
            began.add(entity)
        else:
            result[token] = outside
        token = last + 1
    return result
