"""How a server spells tokens: whether it has the run's tokenizer, and which text is which id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

_TEXT = "In 1969, people walked on the Moon; def f(x): return [x, 'naïve'] # — and so on."
_SPREAD = 64
_SPACES = str.maketrans({"▁": " ", "Ġ": " "})
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


def probe_ids(tokenizer: Tokenizer, longest: int) -> list[int]:
    """At most `longest` tokens, none special, that tell tokenizers apart: of a text and of the whole vocabulary."""
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
    spread = ordinary[:: max(1, len(ordinary) // _SPREAD)]
    text = [id_ for id_ in tokenizer.encode(_TEXT, add_special_tokens=False).ids if id_ not in special]
    # both in turn, so that a short probe has some of each
    mixed = [id_ for pair in zip(spread, text, strict=False) for id_ in pair]
    return (mixed + spread[len(text) :])[:longest]


def disagreement(tokenizer: Tokenizer, ids: Sequence[int], texts: Sequence[str | None]) -> tuple[int, str | None]:
    """How many tokens could be compared, and the first that the server spells otherwise, as a sentence; None: none.

    Spaces at the ends do not count: some servers decode a token as the first of a text, others as one within it.
    """
    compared = 0
    for id_, text in zip(ids, texts, strict=True):
        if text is None or _UNDECODABLE in text:
            continue
        forms = [_decode(tokenizer, id_), tokenizer.id_to_token(id_) or ""]
        if any(_UNDECODABLE in form for form in forms):
            continue
        compared += 1
        if _bare(text) not in {_bare(form) for form in forms}:
            return compared, f"token {id_} is {forms[0]!r} here and {text!r} there"
    return compared, None


def spellings_like(tokenizer: Tokenizer, ids: Sequence[int], texts: Sequence[str | None]) -> dict[str, int]:
    """Id of each token by its text, in the form in which the server spells `ids` as `texts`.

    A text that more than one token has is left out.
    """
    forms: list[Callable[[int], str]] = [
        lambda id_: _decode(tokenizer, id_),
        lambda id_: tokenizer.id_to_token(id_) or "",
    ]
    like = max(forms, key=lambda form: sum(form(id_) == text for id_, text in zip(ids, texts, strict=True)))
    spelled = {id_: like(id_) for id_ in tokenizer.get_vocab().values()}
    count = Counter(spelled.values())
    return {text: id_ for id_, text in spelled.items() if count[text] == 1}


def _decode(tokenizer: Tokenizer, id_: int) -> str:
    return str(tokenizer.decode([id_], skip_special_tokens=False))


def _bare(text: str) -> str:
    return text.translate(_SPACES).strip()
