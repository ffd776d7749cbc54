"""Which layers of a model are kept, from the text of an option."""

from __future__ import annotations

import itertools
import re

_RULES = ("first", "last", "every", "spread")
FORMS = 'numbers from 0 ("0, 5, 11"), first:N, last:N, every:K or spread:N'


def chosen_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `text` names of a model with `num_layers`, from 0, in their order.

    `first:N` and `last:N`: so many at that end; `every:K`: the first and each K-th after it; `spread:N`: N of them
    evenly, the first and the last among them.

    Raises:
        ValueError: it names none, or some that are not there; a sentence for the user without the option's name.
    """
    rule, parameter = parse_layers(text)
    if rule == "numbers":
        if parameter[-1] >= num_layers:
            raise ValueError(f"names layer {parameter[-1]}, but the model has layers 0 to {num_layers - 1}")
        return parameter
    (number,) = parameter
    if rule == "every":
        return tuple(range(0, num_layers, number))
    if number > num_layers:
        raise ValueError(f"asks for {number} layers of a model that has {num_layers}")
    if rule == "first":
        return tuple(range(number))
    if rule == "last":
        return tuple(range(num_layers - number, num_layers))
    steps = number - 1
    # half of a step rounds up, so that no layer comes twice
    return tuple((2 * index * (num_layers - 1) + steps) // (2 * steps) for index in range(number))


def parse_layers(text: str) -> tuple[str, tuple[int, ...]]:
    """(`numbers` and the numbers, or the name of a rule and its one parameter), whatever model it is for.

    Raises:
        ValueError: as :func:`chosen_layers`.
    """
    if match := re.fullmatch(rf"\s*({'|'.join(_RULES)})\s*:\s*(\d+)\s*", text, re.ASCII):
        rule, number = match[1], int(match[2])
        least = 2 if rule == "spread" else 1
        if number < least:
            raise ValueError(f"is {text.strip()!r}; {rule} needs at least {least}")
        return rule, (number,)
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part, re.ASCII) for part in parts):
        raise ValueError(f"is {text!r}; give {FORMS}")
    numbers = tuple(int(part) for part in parts)
    for before, after in itertools.pairwise(numbers):
        if before >= after:
            raise ValueError(f"names layer {after} after {before}; give each once, in their order")
    return "numbers", numbers
