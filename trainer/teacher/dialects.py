"""How servers in the OpenAI format are asked for the log-probabilities of a prompt, and how they answer.

`vllm` asks for `prompt_logprobs`, an extension of vLLM: entry t of the answer is about token t of the prompt, given the
tokens before it, and the first is null. `openai` asks for `echo` with `logprobs`: the prompt comes back before what was
generated, entry t about token t. In both, what is known of the token behind the prompt comes with the one token that
the server generates. The prediction *at* position t is therefore entry t + 1, and that at the last position comes from
the generated token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.records import IntArray

_UNKNOWN = -1
_TOKEN_ID = "token_id:"  # noqa: S105
_NEVER = -9999.0
"""Stands for −∞ in vLLM's answers, because JSON has no infinity."""


class AnswerError(Exception):
    """An answer that is not what was asked for; the text says how it differs."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a server says of one prompt of L tokens."""

    ids: IntArray
    """[L, K]: the most probable tokens at each position, most probable first; −1 where fewer came."""
    log_probabilities: NDArray[np.float32]
    """[L, K]; −inf where fewer came."""
    offered: int
    """Tokens that the server gives at a position, before any was left out."""
    texts: list[str | None]
    """Text of each token of the prompt as the server spells it, [L]; None: it does not tell."""


class Dialect(Protocol):
    def body(self, prompt: Sequence[int], top: int) -> dict[str, Any]:
        """The request for one prompt, but for the model's name."""
        ...

    def read(self, answer: Any, prompt: Sequence[int], top: int, vocabulary: int) -> Predictions:
        """
        Args:
            vocabulary: tokens from this one on are left out: rows that only fill up the teacher's head.

        Raises:
            AnswerError: it is no answer to this prompt.
        """
        ...


@dataclass(frozen=True, slots=True)
class VllmDialect:
    """Tokens of the prompt come as ids."""

    def body(self, prompt: Sequence[int], top: int) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "max_tokens": 1,
            "prompt_logprobs": top,
            "logprobs": top,
            "return_tokens_as_token_ids": True,
            # a server started with --logprobs-mode=processed_logprobs changes what it tells by all of these
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }

    def read(self, answer: Any, prompt: Sequence[int], top: int, vocabulary: int) -> Predictions:
        choice = _choice(answer)
        said = choice.get("prompt_logprobs")
        if not isinstance(said, list):
            raise AnswerError("it has no `prompt_logprobs`: is this vLLM? Others need dialect=openai")
        _check_length(len(said), len(prompt), "`prompt_logprobs` has", "entries")
        rows: list[list[tuple[int, float]]] = []
        texts: list[str | None] = [None] * len(prompt)
        for place, entries in enumerate(said[1:], start=1):
            if not isinstance(entries, dict):
                raise AnswerError(f"`prompt_logprobs` has no tokens at position {place}")
            try:
                rows.append([(int(token), float(entry["logprob"])) for token, entry in entries.items()])
                own = entries.get(str(prompt[place]))
                text = own.get("decoded_token") if own is not None else None
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise AnswerError(f"`prompt_logprobs` is of another form at position {place}") from error
            if own is None:
                raise AnswerError(f"token {place} of the prompt, {prompt[place]}, is not what the server read there")
            texts[place] = text if isinstance(text, str) else None
        generated = _top_logprobs(choice)
        _check_length(len(generated), 1, "`logprobs.top_logprobs` has", "entries for the generated token")
        rows.append(_by_id(generated[0], {}))
        return _predictions(rows, top, vocabulary, texts, _offered(rows, prompt))


@dataclass(frozen=True, slots=True)
class OpenAiDialect:
    """The prompt is echoed; tokens come as `token_id:N` where the server can (vLLM), else as text (SGLang)."""

    spellings: Mapping[str, int] = field(default_factory=dict)
    """Id of each token by its text; a text that several tokens have is not in it."""
    as_ids: bool = True
    """Ask for `token_id:N`."""

    def body(self, prompt: Sequence[int], top: int) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "max_tokens": 1,
            "echo": True,
            "logprobs": top,
            "temperature": 1.0,
            "top_p": 1.0,
            **({"return_tokens_as_token_ids": True} if self.as_ids else {}),
        }

    def read(self, answer: Any, prompt: Sequence[int], top: int, vocabulary: int) -> Predictions:
        choice = _choice(answer)
        said = _top_logprobs(choice)
        tokens = choice["logprobs"].get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise AnswerError("`logprobs` has no `tokens`")
        expected = len(prompt) + 1
        if len(said) == 1 < expected:
            raise AnswerError("it tells of the generated token only: the server does not `echo` with `logprobs`")
        _check_length(len(said), expected, "`logprobs.top_logprobs` has", "entries for the prompt and one token more")
        _check_length(len(tokens), expected, "`logprobs.tokens` has", "entries for the prompt and one token more")
        for place, (token, id_) in enumerate(zip(tokens, prompt, strict=False)):
            if token.startswith(_TOKEN_ID) and token != f"{_TOKEN_ID}{id_}":
                raise AnswerError(f"token {place} of the prompt, {id_}, is not what the server read there: {token}")
            if self.spellings.get(token, id_) != id_:
                raise AnswerError(f"token {place} of the prompt, {id_}, is not what the server read there: {token!r}")
        texts = [None if token.startswith(_TOKEN_ID) else token for token in tokens[: len(prompt)]]
        rows = [_by_id(entries, self.spellings) for entries in said[1:]]
        return _predictions(rows, top, vocabulary, texts, _offered(rows, prompt))


def _choice(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (TypeError, KeyError, IndexError) as error:
        raise AnswerError("it has no `choices`") from error
    if not isinstance(choice, dict):
        raise AnswerError("its `choices` are of another form")
    return choice


def _top_logprobs(choice: dict[str, Any]) -> list[Any]:
    logprobs = choice.get("logprobs")
    said = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(said, list):
        raise AnswerError("it has no `logprobs.top_logprobs`: the server gives no log-probabilities")
    return said


def _check_length(found: int, expected: int, what: str, of: str) -> None:
    if found != expected:
        raise AnswerError(f"{what} {found} {of}, not {expected}: the server changed or cut the prompt")


def _by_id(entries: Any, spellings: Mapping[str, int]) -> list[tuple[int, float]]:
    if not isinstance(entries, dict):
        raise AnswerError("`logprobs.top_logprobs` has no tokens at a position")
    result = []
    for token, value in entries.items():
        if token.startswith(_TOKEN_ID) and token.removeprefix(_TOKEN_ID).isdigit():
            id_ = int(token.removeprefix(_TOKEN_ID))
        else:
            id_ = spellings.get(token, _UNKNOWN)
        if not isinstance(value, int | float):
            raise AnswerError(f"the log-probability of {token!r} is no number: {value!r}")
        result.append((id_, float(value)))
    return result


def _offered(rows: Sequence[Sequence[tuple[int, float]]], prompt: Sequence[int]) -> int:
    """Most probable tokens that a server gives. The prompt's own token may come beside them: then it is the last."""
    counts = []
    for entries, following in zip(rows, prompt[1:], strict=False):
        beside = bool(entries) and min(entries, key=lambda entry: entry[1])[0] == following
        counts.append(len(entries) - beside)
    return max(counts, default=len(rows[0]))


def _predictions(
    rows: Sequence[Sequence[tuple[int, float]]], top: int, vocabulary: int, texts: list[str | None], offered: int
) -> Predictions:
    """The `top` most probable of each row; equal ones by id, so that the order of an answer does not matter."""
    flat = [(row, id_, value) for row, entries in enumerate(rows) for id_, value in entries]
    ids = np.full((len(rows), top), -1, dtype=np.int64)
    log_probabilities = np.full((len(rows), top), -math.inf, dtype=np.float32)
    if flat:
        row, id_, value = (np.array(column) for column in zip(*flat, strict=True))
        if np.isnan(value).any():
            raise AnswerError("it holds log-probabilities that are no numbers (NaN): the server's model is broken")
        order = np.lexsort((id_, -value, row))
        row, id_, value = row[order], id_[order], value[order]
        # first the most probable ones, then those of use: the prompt's own token, which may come beside them, stays out
        kept = (_columns(row) < top) & (value > _NEVER) & (id_ >= 0) & (id_ < vocabulary)
        row, id_, value = row[kept], id_[kept], value[kept]
        ids[row, _columns(row)] = id_
        log_probabilities[row, _columns(row)] = value
        mass = np.exp(log_probabilities.astype(np.float64)).sum(axis=1)
        # fp16 and bf16 servers round log-probabilities; logits miss by far more
        if (mass > 1.05).any() or (value > 0.05).any():
            raise AnswerError(
                f"the probabilities of a position add up to {mass.max():.3g}: these are no log-probabilities"
            )
    return Predictions(ids, log_probabilities, offered, texts)


def _columns(rows: IntArray) -> IntArray:
    """How many equal ones stand before each of sorted numbers."""
    result: IntArray = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return result
