"""Tokens as the bytes that they spell: what two tokenizers of one text have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SPACE = "▁"


class NotPiecesError(Exception):
    """A tokenizer whose tokens are not pieces of the text; the sentence says what they are."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The vocabulary of a tokenizer."""

    spelled: dict[int, bytes]
    """Bytes of each token; special tokens spell nothing and are not in it."""
    prefix: bytes
    """What the tokenizer puts before each text: a space, or nothing."""

    def of(self, ids: Sequence[int]) -> list[bytes | None]:
        """Bytes of each token; None: special or unknown."""
        return [self.spelled.get(id_) for id_ in ids]


def pieces_of(tokenizer: Tokenizer) -> Pieces:
    """How the tokens of a byte-level BPE or SentencePiece tokenizer are spelled.

    Raises:
        NotPiecesError: its tokens cannot be joined to the text, as those of WordPiece, which drop spaces.
    """
    kinds = set(_kinds(json.loads(tokenizer.to_str()).get("decoder")))
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = {id_: text for text, id_ in tokenizer.get_vocab().items() if id_ not in added}
    if "ByteLevel" in kinds:
        to_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
        spelled = {id_: _byte_level(text, to_byte) for id_, text in vocabulary.items()}
    elif kinds & {"Metaspace", "ByteFallback"}:
        spelled = {id_: _sentencepiece(text) for id_, text in vocabulary.items()}
    else:
        raise NotPiecesError(
            "its tokens are those of neither byte-level BPE nor SentencePiece, and do not join to a text"
        )
    # added tokens stand for themselves; special ones are no text
    spelled |= {id_: token.content.encode() for id_, token in added.items() if not token.special}
    known = Pieces(spelled, b"")
    probe = b"".join(piece or b"" for piece in known.of(tokenizer.encode("a", add_special_tokens=False).ids))
    return Pieces(spelled, b" " if probe == b" a" else b"")


def _kinds(decoder: Any) -> list[str]:
    """Types of a decoder and of those within it."""
    if not isinstance(decoder, dict):
        return []
    return [str(decoder.get("type")), *(kind for part in decoder.get("decoders", []) for kind in _kinds(part))]


def _byte_level(text: str, to_byte: dict[str, int]) -> bytes:
    try:
        return bytes(to_byte[letter] for letter in text)
    except KeyError:
        # an entry that no text leads to, such as an unused placeholder
        return text.encode()


def _sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE, " ").encode()
