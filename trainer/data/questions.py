"""Questions about texts as samples: a question and a window of its text; labels are the answer's first and last token.

Devlin et al. 2018, section 4.3, https://arxiv.org/abs/1810.04805: what is not answered in a window points at its first
token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.labelled import LabelledSamples, Labels, Place
from trainer.data.samples import SourceTokens
from trainer.records import IntArray


@dataclass(frozen=True)
class Written:
    """The texts of one source as they are written, and where their answers are."""

    texts: Path
    """UTF-8, one after the other."""
    offsets: IntArray
    """[documents + 1], in bytes."""
    answers: Path
    """A line a document: JSON list of [first character, the one after the last]."""

    def text(self, document: int) -> str:
        with self.texts.open("rb") as file:
            file.seek(int(self.offsets[document]))
            return file.read(int(self.offsets[document + 1] - self.offsets[document])).decode()

    @cached_property
    def _lines(self) -> list[str]:
        return self.answers.read_text(encoding="utf-8").splitlines()

    def given(self, document: int) -> tuple[str, ...]:
        text = self.text(document)
        return tuple(text[begin:end] for begin, end in json.loads(self._lines[document]))


class QuestionSamples(LabelledSamples):
    """The questions of one split."""

    second_first = True

    def __init__(self, *args: Any, written: Sequence[Written], **options: Any):
        """
        Args:
            written: of each source.
        """
        self._written = tuple(written)
        super().__init__(*args, **options)

    def _rooms(self, source: SourceTokens, own: Labels) -> IntArray:
        """Of a question at most one half is kept: without its text it cannot be answered."""
        return self._room - np.minimum(own.second_lengths(len(source.offsets) - 1), self._room // 2)

    def _lengths(self, source: SourceTokens, own: Labels) -> IntArray:
        lengths: IntArray = np.diff(source.offsets)
        if self.reading.too_long == "leave_out":
            lengths = lengths + np.maximum(0, own.second_lengths(len(lengths)) - self._room // 2)
        return lengths

    def _cut(self, length: int, second: int, window: int) -> tuple[int, int, int]:
        second = min(second, self._room // 2)
        return *self.reading.place(length, self._room - second, window), second

    def _answer(self, place: Place) -> tuple[int, int] | None:
        """First and last token of the answer, counted from the text's first in the sample; None: it holds none."""
        spans = self._of[place.source].spans
        assert spans is not None
        first, last = spans[place.document].tolist()
        return (first - place.begin, last - place.begin) if place.begin <= first and last < place.end else None

    def fetch(self, ids: IntArray) -> dict[str, NDArray[Any]]:
        """`input_ids`, `attention_mask`, where the model is told `token_type_ids`, each [n, L]; `labels` [n, 2]."""
        places = self.places(ids)
        arrays, begins = self._fill(places)
        labels = np.zeros((len(places), 2), dtype=np.int64)
        for row, place in enumerate(places):
            if (answer := self._answer(place)) is not None:
                labels[row] = begins[row] + np.array(answer)
        return {**arrays, "labels": labels}

    def columns(self, ids: IntArray) -> IntArray:
        """Where an answer may be, [n, 2]: the column of the first token that is text, and the one after the last."""
        first = len(self._prefix) + len(self._middle)
        places = self.places(ids)
        begins = np.array([first + place.second_end for place in places], dtype=np.int64)
        return np.stack([begins, begins + [place.end - place.begin for place in places]], axis=1)

    def passage(self, sample: int, first: int, last: int) -> str:
        """The text that stands in the columns first … last of a sample, as it is written; empty where they hold
        something else than text."""
        ids = np.array([sample])
        (place,) = self.places(ids)
        begin, end = self.columns(ids)[0].tolist()
        if not begin <= first <= last < end:
            return ""
        own = self._of[place.source]
        assert own.places is not None
        at = place.start + place.begin - begin
        text = self._written[place.source].text(place.document)
        return text[int(own.places[at + first, 0]) : int(own.places[at + last, 1])]

    def answers_of(self, sample: int) -> tuple[str, ...]:
        """All right answers to the question of a sample, whichever window it is; none: it has no answer."""
        (place,) = self.places(np.array([sample]))
        return self._written[place.source].given(place.document)

    @property
    def num_unreached(self) -> int:
        """Questions that have an answer, and no sample that holds it."""
        reached, answered = set(), 0
        for own in self._of:
            if own.spans is not None:
                answered += int((own.spans[:, 0] >= 0).sum())
        for place in self.places(np.arange(len(self))):
            if self._answer(place) is not None:
                reached.add((place.source, place.document))
        return answered - len(reached)

    @property
    def num_cut(self) -> int:
        return sum(
            int((np.diff(source.offsets) + own.second_lengths(len(source.offsets) - 1) > self._room).sum())
            for source, own in zip(self.sources, self._of, strict=True)
        )

    def _shown(self, place: Place) -> str:
        given = self._written[place.source].given(place.document)
        return f"answer {given[0]!r}" if given else "no answer"
