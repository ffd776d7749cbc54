"""Texts whose words have classes as samples: the label of a word stands at its first token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.labelled import LabelledSamples, Place
from trainer.data.samples import IGNORED
from trainer.records import IntArray


class TaggedSamples(LabelledSamples):
    """The tagged documents of one split."""

    def _marks(self, place: Place) -> NDArray[Any]:
        """Class of a word at its first token, −100 elsewhere, [tokens of the sample that are text].

        Of the tokens that two windows share each has the labels of the half that lies nearer to its middle: every word
        is predicted once.
        """
        own, source = self._of[place.source], self.sources[place.source]
        assert own.marks is not None
        marks = own.marks[place.start + place.begin : place.start + place.end]
        before = self.reading.stride // 2 if place.begin else 0
        is_last = place.start + place.end == source.offsets[place.document + 1] or self.reading.too_long != "window"
        behind = 0 if is_last else self.reading.stride - self.reading.stride // 2
        if not before and not behind:
            return marks
        marks = marks.copy()
        marks[:before] = marks[len(marks) - behind :] = IGNORED
        return marks

    def fetch(self, ids: IntArray) -> dict[str, NDArray[Any]]:
        """`input_ids`, `attention_mask` and `labels`, each [n, L] int64."""
        places = self.places(ids)
        arrays, begins = self._fill(places)
        labels = np.full(arrays["input_ids"].shape, IGNORED, dtype=np.int64)
        for row, (place, begin) in enumerate(zip(places, begins.tolist(), strict=True)):
            marks = self._marks(place)
            labels[row, begin : begin + len(marks)] = marks
        return {**arrays, "labels": labels}

    def num_targets(self, ids: IntArray) -> int:
        """Words that begin in the samples."""
        return sum(int((self._marks(place) >= 0).sum()) for place in self.places(ids))

    def class_counts(self) -> IntArray:
        """Words of each class, [classes]."""
        total = np.zeros(len(self.classes), dtype=np.int64)
        for own in self._of:
            if own.marks is not None:
                total += np.bincount(own.marks[own.marks >= 0], minlength=len(self.classes))
        return total

    def _shown(self, place: Place) -> str:
        marks = self._marks(place)
        tokens = self.text_tokens(place)
        begins = np.flatnonzero(marks >= 0).tolist()
        words = [self._decode(tokens[a:b].tolist()) for a, b in zip(begins, [*begins[1:], len(tokens)], strict=True)]
        named = [f"{word.strip()}/{self.classes[marks[at]]}" for at, word in zip(begins, words, strict=True)]
        return " ".join(named) or "no word"
