"""Texts that are longer than a sample: cut, cut into windows, or left out. Pure arithmetic on lengths in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.config.schema import DataConfig
from trainer.errors import DataError
from trainer.records import IntArray


@dataclass(frozen=True)
class Reading:
    """How labelled texts are read: options that the prepared files do not depend on."""

    too_long: Literal["cut", "window", "leave_out"] = "cut"
    stride: int = 0
    """Tokens that neighbouring windows share."""
    balance: Literal["none", "classes"] = "none"

    @classmethod
    def of(cls, config: DataConfig) -> Reading:
        return cls(config.too_long, config.stride, config.balance)

    def counts(self, lengths: IntArray, rooms: IntArray) -> IntArray:
        """Samples of each text, [n].

        Args:
            lengths: tokens of each, [n].
            rooms: tokens that a sample holds of it, [n].

        Raises:
            DataError: windows that do not move on.
        """
        if self.too_long == "cut":
            return np.ones(len(lengths), dtype=np.int64)
        if self.too_long == "leave_out":
            return (lengths <= rooms).astype(np.int64)
        if len(rooms) and self.stride >= int(rooms.min()):
            raise DataError(
                f"data.stride is {self.stride}, and a sample holds {int(rooms.min())} tokens of a text: lower it, or "
                "raise data.sequence_length"
            )
        beyond: IntArray = np.maximum(0, lengths - rooms)
        return 1 + -(-beyond // (rooms - self.stride))

    def place(self, length: int, room: int, window: int) -> tuple[int, int]:
        """First token of a window of a text, and the one after its last."""
        begin = window * (room - self.stride) if self.too_long == "window" else 0
        return begin, min(length, begin + room)


def cut_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that are kept of two texts: the longer one is cut, once they are equal both are.

    As transformers' `longest_first` (https://huggingface.co/docs/transformers/pad_truncation).
    """
    if first + second <= room:
        return first, second
    short, rest = min(first, second), room // 2
    # of two that are cut alike, the longer one, or else the second, has the odd token
    kept = (short, room - short) if short <= rest else (rest, room - rest)
    return (kept[1], kept[0]) if first > second else kept
