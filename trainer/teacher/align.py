"""One text, two tokenizers: where both have a boundary, their predictions of what follows can be compared.

A student that has read its tokens 0 … t and a teacher that has read its tokens 0 … s have read the same text exactly if
both end at the same byte; then place[t] = s. Between such boundaries nothing can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_PLACE = -1

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Side:
    """How the teacher reads."""

    encode: Encode
    """Text to tokens, without special tokens."""
    spell: Callable[[Sequence[int]], list[bytes | None]]
    """Bytes of each token; None: it spells none."""
    prefix: bytes
    """What its tokens spell before each text."""
    end: int
    """Its end-of-text token."""
    begin: int | None
    """Put before each document; None: nothing."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """One sample."""

    ids: list[int]
    """Of the teacher, [Lt]."""
    starts: list[int]
    """Where in them a document begins; the first is 0."""
    place: list[int]
    """[L]: index into `ids` for each token of the student; −1: none."""


def align(tokens: Sequence[bytes | None], ends: Sequence[bool], teacher: Side, *, prefix: bytes = b"") -> Aligned:
    """The teacher's tokens for the student's.

    Bytes that are no UTF-8, such as a letter cut in two at the end of a sample, and special tokens other than
    end-of-text are not shown to the teacher.

    Args:
        tokens: bytes of each token of the student, [L]; None: it spells none.
        ends: whether it is end-of-text, [L].
        teacher: how the teacher reads.
        prefix: what the student's tokens spell before each text.
    """
    ids: list[int] = [] if teacher.begin is None else [teacher.begin]
    starts, place = [0], [NO_PLACE] * len(tokens)
    first = 0
    # a sample begins anywhere, and so does what is between two special tokens
    fresh = False
    for index in range(len(tokens) + 1):
        if index < len(tokens) and tokens[index] is not None and not ends[index]:
            continue
        run = [piece or b"" for piece in tokens[first:index]]
        skip = len(prefix) if fresh and b"".join(run).startswith(prefix) else 0
        _align_text(run, first, fresh, skip, teacher, ids, place)
        fresh = False
        if index < len(tokens) and ends[index]:
            ids.append(teacher.end)
            starts.append(len(ids))
            if teacher.begin is not None:
                ids.append(teacher.begin)
            # what follows is predicted by the last token before it
            place[index] = len(ids) - 1
            fresh = True
        first = index + 1
    return Aligned(ids, [start for start in starts if start < len(ids) or start == 0], place)


def _align_text(
    pieces: Sequence[bytes], first: int, fresh: bool, skip: int, teacher: Side, ids: list[int], place: list[int]
) -> None:
    """Append the teacher's tokens of a run of text, and the places of the student's tokens `first` … in it.

    Args:
        fresh: a document begins here, rather than a piece of one.
        skip: bytes at the beginning that are no text.
    """
    data = b"".join(pieces)
    # byte in the run → the teacher's token that has read up to it
    read = {skip: len(ids) - 1} if fresh else {}
    for begin, end in _valid(data, skip):
        text = data[begin:end].decode()
        given, spelled = text, text.encode()
        if teacher.prefix and not fresh and text.startswith(" ") and len(text) > 1:
            # the space that the tokenizer puts first is the one of the text
            given = text[1:]
        elif teacher.prefix:
            spelled = teacher.prefix + spelled
        own = teacher.encode(given)
        parts = teacher.spell(own)
        offset = len(ids)
        ids.extend(own)
        if None in parts or b"".join(part or b"" for part in parts) != spelled:
            # its tokenizer reads another text (normalised, or with unknown letters): ends alone are the same
            if own:
                read[end] = len(ids) - 1
            continue
        position = begin + len(text.encode()) - len(spelled)
        for index, part in enumerate(parts):
            position += len(part or b"")
            # of several tokens that end at one byte the last has read all
            read[position] = offset + index
    position = 0
    for index, piece in enumerate(pieces, start=first):
        position += len(piece)
        # a token without bytes repeats the place of the one before it, which is right
        place[index] = read.get(position, NO_PLACE)


def _valid(data: bytes, begin: int) -> list[tuple[int, int]]:
    """The longest stretches of valid UTF-8 from `begin` on."""
    result = []
    while begin < len(data):
        try:
            data[begin:].decode()
            end = skip = len(data)
        except UnicodeDecodeError as error:
            end, skip = begin + error.start, begin + error.end
        if end > begin:
            result.append((begin, end))
        begin = skip
    return result


def gather_places(hidden: Tensor, place: Tensor) -> Tensor:
    """The teacher's states where the student's predictions are compared.

    Args:
        hidden: [n, Lt, H].
        place: [n, L] int64, index into Lt; −1: none.

    Returns:
        [n, L, H]; zero where there is no place.
    """
    index = place.clamp_min(0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return torch.where((place >= 0).unsqueeze(-1), hidden.gather(1, index), hidden.new_zeros(()))
