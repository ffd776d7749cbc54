"""Sentences of faults from a config or a command line. Names and numbers only: nothing in them is ever evaluated."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence

from trainer.errors import ConfigError
from trainer.faults.sentence import Fault, Kind, Moment, all_of, at, batches, from_batch

_BEGINNINGS: dict[str, Callable[..., Fault | Moment]] = {
    function.__name__: function for function in (at, batches, from_batch, all_of)
}
_EXAMPLE = "at(step=40, rank=1).gradient_is_nan() or batches(50, 57).random_tokens()"


def parse_fault(sentence: str) -> Fault:
    """The fault that a sentence describes.

    Raises:
        ValueError: what is wrong with it, in one sentence.
    """
    try:
        tree = ast.parse(sentence.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{sentence!r} is no sentence such as {_EXAMPLE}") from None
    try:
        found = _evaluate(tree.body)
    except ValueError as error:
        raise ValueError(f"{sentence!r}: {error}") from None
    if not isinstance(found, Fault):
        raise ValueError(f"{sentence!r} says when and not what: go on with .{Kind.GRADIENT_IS_NAN.value}() or another")
    return found


def parse_faults(sentences: Iterable[str], source: str = "the config") -> tuple[Fault, ...]:
    """The faults of the option `faults`.

    Raises:
        ConfigError: with every sentence that is none.
    """
    faults, problems = [], []
    for index, sentence in enumerate(sentences):
        try:
            faults.append(parse_fault(sentence))
        except ValueError as error:
            problems.append((f"faults.{index}", str(error)))
    if problems:
        raise ConfigError(problems, source)
    return tuple(faults)


def _evaluate(node: ast.expr) -> Fault | Moment:
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)!r} is no part of a sentence such as {_EXAMPLE}")
    if isinstance(node.func, ast.Name):
        name, known = node.func.id, _BEGINNINGS
    elif isinstance(node.func, ast.Attribute):
        subject, name = _evaluate(node.func.value), node.func.attr
        words = [Fault.every_time.__name__] if isinstance(subject, Fault) else [kind.value for kind in Kind]
        known = {word: getattr(subject, word) for word in words}
    else:
        raise ValueError(f"{ast.unparse(node.func)!r} is no word of it")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it may be {_one_of(list(known))}"
        raise ValueError(f"{name!r} is not known here; {hint}")
    function = known[name]
    arguments = [_evaluate(value) if function is all_of else _number(value) for value in node.args]
    options: dict[str, int | float] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"{name} takes its arguments one by one")
        options[keyword.arg] = _number(keyword.value)
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    if function is all_of and not all(isinstance(fault, Fault) for fault in arguments):
        raise ValueError("every part of all_of(…) says what goes wrong")
    return function(*arguments, **options)


def _number(node: ast.expr) -> int | float:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    value = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not isinstance(value, ast.Constant) or type(value.value) not in (int, float):
        raise ValueError(f"{ast.unparse(node)!r} must be a number")
    number = value.value
    assert isinstance(number, int | float)
    return -number if negative else number


def _one_of(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
