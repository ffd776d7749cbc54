"""A teacher with a tokenizer of its own reads the student's text: `distill.vocabulary=uld`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.errors import ConfigError
from trainer.knowledge import TEACHER_ATTENTION_MASK, TEACHER_INPUT_IDS, TEACHER_PLACE, TEACHER_POSITION_IDS
from trainer.records import IntArray
from trainer.teacher.align import NO_PLACE, Aligned, Side, align
from trainer.teacher.pieces import NotPiecesError, Pieces, pieces_of
from trainer.teacher.prompts import IGNORED

logger = logging.getLogger(__name__)

_MULTIPLE = 64
"""Lengths are rounded up to it, so that few shapes occur."""
_FEW = 0.5
_ENOUGH = 10_000


class Retokeniser:
    """From the student's tokens to the teacher's, in the thread that reads data."""

    def __init__(
        self,
        student: Path,
        teacher: str | Path,
        *,
        boundaries: Literal["join", "positions", "block"],
        eos_id: int,
        longest: int | None = None,
        trust_remote_code: bool = False,
    ):
        """
        Args:
            student: folder of the run's tokenizer.
            teacher: directory, hub id or .gguf file of the teacher.
            eos_id: the student's end-of-text token, which ends every document.
            longest: positions that the teacher has; what goes beyond them is not compared. None: no limit.

        Raises:
            ConfigError: the teacher's tokenizer cannot be loaded, or the tokens of one of both are no pieces of text.
        """
        self._eos_id, self._boundaries, self._longest = eos_id, boundaries, longest
        self._pieces = _pieces(Tokenizer.from_file(str(student / "tokenizer.json")), "the run's tokenizer")
        self._side = _side(_load(teacher, trust_remote_code), str(teacher))
        self._num_targets = self._num_compared = 0
        self._warned = False

    @property
    def compared(self) -> float:
        """Share of the targets so far that have a place."""
        return self._num_compared / max(1, self._num_targets)

    def annotate(self, ids: IntArray, arrays: Mapping[str, IntArray]) -> dict[str, NDArray[Any]]:  # noqa: ARG002
        """Arrays of `trainer.knowledge`, for `input_ids` and `labels`, each [n, L]."""
        input_ids = arrays["input_ids"]
        labels = arrays.get("labels")
        predicted = np.ones(input_ids.shape, dtype=np.bool_) if labels is None else labels != IGNORED
        samples = [self._align(row[: _last(targets)]) for row, targets in zip(input_ids, predicted, strict=True)]
        length = max(1, *(len(sample.ids) for sample in samples)) if samples else 1
        length = -(-length // _MULTIPLE) * _MULTIPLE
        if self._longest is not None:
            length = min(length, self._longest)
        place = np.full(input_ids.shape, NO_PLACE, dtype=np.int64)
        tokens = np.full((len(samples), length), self._side.end, dtype=np.int64)
        mask = np.zeros_like(tokens)
        positions = np.zeros_like(tokens)
        for row, sample in enumerate(samples):
            count = min(len(sample.ids), length)
            tokens[row, :count] = sample.ids[:count]
            mask[row, :count] = 1
            # padding is a document of its own
            starts = [start for start in sample.starts if start < count] + [count] * (count < length)
            positions[row] = np.arange(length) - np.repeat(starts, np.diff([*starts, length]))
            places = np.array(sample.place, dtype=np.int64)
            place[row, : len(places)] = np.where(places < count, places, NO_PLACE)
        place[~predicted] = NO_PLACE
        self._count(int(predicted.sum()), int((place >= 0).sum()))
        result = {TEACHER_INPUT_IDS: tokens, TEACHER_PLACE: place}
        if self._boundaries != "join":
            result[TEACHER_POSITION_IDS] = positions
        if self._boundaries != "block":
            result[TEACHER_ATTENTION_MASK] = mask
        return result

    def _align(self, row: IntArray) -> Aligned:
        ids = row.tolist()
        ends = [id_ == self._eos_id for id_ in ids]
        return align(self._pieces.of(ids), ends, self._side, prefix=self._pieces.prefix)

    def _count(self, num_targets: int, num_compared: int) -> None:
        self._num_targets += num_targets
        self._num_compared += num_compared
        if self._num_targets >= _ENOUGH and self.compared < _FEW and not self._warned:
            self._warned = True
            logger.warning(
                "of the student's tokens only %.0f %% end where one of the teacher's does; nothing is learned from the "
                "teacher at the others",
                100 * self.compared,
            )


def _last(targets: NDArray[np.bool_]) -> int:
    """Tokens up to the last that predicts."""
    places = np.flatnonzero(targets)
    return int(places[-1]) + 1 if len(places) else 0


def _load(reference: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    path = Path(reference)
    try:
        if path.suffix == ".gguf":
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(reference), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            [("distill.teacher.pretrained", f"the tokenizer of {reference} cannot be loaded: {reason}")]
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            [("distill.teacher.pretrained", f"the tokenizer of {reference} has no fast version (tokenizer.json)")]
        )
    return tokenizer


def _side(tokenizer: PreTrainedTokenizerFast, name: str) -> Side:
    if tokenizer.eos_token_id is None:
        raise ConfigError([("distill.teacher.pretrained", f"the tokenizer of {name} has no end-of-text token")])
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    backend = tokenizer.backend_tokenizer
    # a text that spells a special token is text
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    pieces = _pieces(backend, f"the tokenizer of {name}")

    def encode(text: str) -> list[int]:
        result: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return result

    return Side(encode, pieces.of, pieces.prefix, tokenizer.eos_token_id, tokenizer.bos_token_id if begins else None)


def _pieces(tokenizer: Tokenizer, whose: str) -> Pieces:
    try:
        return pieces_of(tokenizer)
    except NotPiecesError as error:
        raise ConfigError([("distill.vocabulary", f"uld cannot compare with {whose}: {error}")]) from error
