"""A teacher that reads the student's text with a tokenizer of its own: `distill.vocabulary=uld`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from trainer.knowledge import (
    TEACHER_ATTENTION_MASK,
    TEACHER_INPUT_IDS,
    TEACHER_PLACE,
    TEACHER_POSITION_IDS,
    DenseTargets,
    Knowledge,
)
from trainer.records import IntArray
from trainer.teacher.align import gather_places
from trainer.teacher.model import TeacherModel
from trainer.teacher.retokenise import Retokeniser

_INPUTS = {
    "input_ids": TEACHER_INPUT_IDS,
    "attention_mask": TEACHER_ATTENTION_MASK,
    "position_ids": TEACHER_POSITION_IDS,
}


class AcrossTokenizers:
    """Implements :class:`trainer.knowledge.Teacher` by a model and what spells text in its tokens."""

    def __init__(self, model: TeacherModel, retokeniser: Retokeniser):
        self.model = model
        self._retokeniser = retokeniser

    def annotate(self, ids: IntArray, arrays: Mapping[str, IntArray]) -> dict[str, NDArray[Any]]:
        return self._retokeniser.annotate(ids, arrays)

    def knowledge(self, tensors: Mapping[str, Tensor]) -> Knowledge:
        """Predictions where both have read the same text, [B, T, H] by the student's places; unknown elsewhere."""
        inputs = {name: tensors[given] for name, given in _INPUTS.items() if given in tensors}
        targets, place = self.model.knowledge(inputs).targets, tensors[TEACHER_PLACE]
        assert isinstance(targets, DenseTargets)
        hidden = gather_places(targets.hidden, place)
        return Knowledge(DenseTargets(hidden, targets.head, targets.whole, known=place >= 0))

    def mend(self) -> str | None:
        return self.model.mend()

    def close(self) -> None:
        self.model.close()
