"""The classes of labelled documents: met while reading, numbered once all are known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import numpy as np

from trainer.data.corpus import Source
from trainer.errors import DataError
from trainer.records import IntArray

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NAMED = 5
OUTSIDE = "O"
"""Tag of a word that is in no entity."""


class Met:
    """Classes in the order in which documents bring them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._numbers)

    def number(self, label: str | None) -> int:
        """Of a class, from 0 in the order of meeting; −1 for a document without one."""
        return -1 if label is None else self._numbers.setdefault(label, len(self._numbers))


def are_labelled(sources: Sequence[Source]) -> bool:
    """Whether the documents have classes.

    Raises:
        DataError: those of some sources only.
    """
    without = [source.name for source in sources if not source.is_labelled]
    if without and len(without) < len(sources):
        raise DataError(f"{_list(without)}: no `label`, which other sources have; give all of them one, or none")
    return not without


def check_chosen(source: Source, seen: Iterable[str]) -> None:
    """Refuse `classes` that no record of the source is of.

    Raises:
        DataError: names them.
    """
    known = sorted(seen)
    for name in source.config.classes:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"there are {_list(known)}"
            raise DataError(f"source {source.name}: no record is of the class {name!r} (`classes`); {remedy}")


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """By number where all are whole numbers, else by name: the same whatever the order of the documents."""
    names = list(names)
    if all(_WHOLE.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def settle(
    met: Sequence[str], train: IntArray, held_out: IntArray, *, least: int = 2
) -> tuple[tuple[str, ...], IntArray]:
    """The classes in their final order, and the final number of each as it was met, [met]; −1: no document is of it.

    Args:
        train, held_out: documents of each met class in that split, [met].
        least: classes that there must be.

    Raises:
        DataError: fewer than `least` classes, or some that only held-out documents are of.
    """
    unknown = [name for name, learned, asked in zip(met, train, held_out, strict=True) if asked and not learned]
    if unknown:
        raise DataError(
            f"held-out documents are of {_list(unknown)}, and no training document is: add some, or leave these out"
        )
    classes = sorted_classes(name for name, learned in zip(met, train, strict=True) if learned)
    if len(classes) < least:
        found = f"all documents are of the class {classes[0]!r}" if classes else "no training document has a class"
        raise DataError(f"{found}: classification needs at least {'two classes' if least == 2 else 'one'}")
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers.get(name, -1) for name in met], dtype=np.int64)


def class_entropy(train: IntArray, held_out: IntArray) -> float | None:
    """Nats per held-out document under the train split's class frequencies: the loss of who knows nothing else.

    Args:
        train, held_out: documents of each class, [classes].
    """
    if not held_out.sum():
        return None
    log_probabilities = np.log(train / train.sum())
    return float(-(held_out * log_probabilities).sum() / held_out.sum())


def labels_entropy(train: IntArray, held_out: IntArray, num_train: int, num_held_out: int) -> float | None:
    """Nats per held-out document of several labels under the train split's frequencies (add-one smoothing): the mean
    over the classes of the cross-entropy of whether a document is of it.

    Args:
        train, held_out: documents of each class, [classes].
    """
    if not num_held_out:
        return None
    yes = (train + 1) / (num_train + 2)
    total = held_out * np.log(yes) + (num_held_out - held_out) * np.log(1 - yes)
    return float(-total.mean() / num_held_out)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
