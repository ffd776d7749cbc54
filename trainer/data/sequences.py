"""Texts that become other texts as samples, of encoder–decoder models: translation, summaries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.labelled import LabelledSamples, Labels, Place
from trainer.data.samples import IGNORED, SourceTokens
from trainer.errors import DataError
from trainer.records import IntArray


class SequenceSamples(LabelledSamples):
    """The pairs of one split. Each side holds at most L tokens."""

    def __init__(self, *args: Any, decoder_start: int | None = None, **options: Any):
        """
        Args:
            decoder_start: token that the decoder begins with, of the model's configuration; None: padding, as T5.
        """
        suffix, end = options["frame"].suffix, options["eos_id"]
        # who writes must be able to end
        self._target_suffix = np.array(suffix if suffix[-1:] == (end,) else (*suffix, end), dtype=np.int64)
        self._added = len(self._target_suffix) - len(suffix)
        super().__init__(*args, **options)
        self._start = self._pad_id if decoder_start is None else decoder_start

    def _plan(self, source: SourceTokens, own: Labels) -> IntArray | None:
        if self.reading.too_long == "window":
            raise DataError("data.too_long: windows are not for objective.kind seq2seq; use cut or leave_out")
        return super()._plan(source, own)

    def _lengths(self, source: SourceTokens, own: Labels) -> IntArray:
        # the longer side decides; one token may be added behind a target
        return np.maximum(np.diff(source.offsets), own.second_lengths(len(source.offsets) - 1) + self._added)

    def _target(self, place: Place) -> IntArray:
        text = self._of[place.source].second_of(place.document)
        suffix = self._target_suffix
        room = self.sequence_length - len(self._prefix) - len(suffix)
        return np.concatenate([self._prefix, text[:room], suffix]).astype(np.int64)

    def fetch(self, ids: IntArray) -> dict[str, NDArray[Any]]:
        """`input_ids`, `attention_mask`, `decoder_input_ids` and `labels`, each [n, L] int64; labels are −100 behind
        the target."""
        places = self.places(ids)
        arrays, _ = self._fill(places)
        labels = np.full(arrays["input_ids"].shape, IGNORED, dtype=np.int64)
        for row, place in enumerate(places):
            target = self._target(place)
            labels[row, : len(target)] = target
        inputs = np.concatenate([np.full((len(places), 1), self._start), labels[:, :-1]], axis=1)
        return {**arrays, "decoder_input_ids": np.where(inputs == IGNORED, self._pad_id, inputs), "labels": labels}

    def num_targets(self, ids: IntArray) -> int:
        """Tokens of the targets, the special ones included; found without reading a token."""
        added = len(self._prefix) + len(self._target_suffix)
        total = 0
        for index, _, documents, _ in self._documents_of(ids):
            offsets = self._of[index].second_offsets
            assert offsets is not None
            lengths = offsets[documents + 1] - offsets[documents]
            total += int(np.minimum(lengths + added, self.sequence_length).sum())
        return total

    @property
    def num_cut(self) -> int:
        """Pairs of which a side is longer than a sample."""
        pairs = zip(self.sources, self._of, strict=True)
        return sum(int((self._lengths(source, own) > self._room).sum()) for source, own in pairs)

    def target_text(self, sample: int) -> str:
        """What a sample is to become, as far as it holds it."""
        (place,) = self.places(np.array([sample]))
        return self._decode(self._of[place.source].second_of(place.document)[: self.sequence_length].tolist())

    def _shown(self, place: Place) -> str:
        text = self._decode(self._of[place.source].second_of(place.document)[: self.sequence_length].tolist())
        return f"becomes {text!r}"
