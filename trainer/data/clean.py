"""Repairs of a document, and the rules by which one is left out. Runs in worker processes, a document at a time."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import ftfy
import ftfy.badness
import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.config.schema import CleanConfig
from trainer.data import duplicates
from trainer.data.corpus import Document, Span

UNDECODABLE, UNICODE = "undecodable bytes replaced", "unicode repaired"
"""Repairs, by the name they are counted under."""
TOO_SHORT, TOO_LONG = "shorter than min_characters", "longer than max_characters"
FEW_LETTERS, REPETITION = "fewer letters than min_letters", "more repetition than max_repetition"
EXACT, NEAR = "exact duplicate", "near duplicate"
OTHER_CLASS, CONFLICT = "not of the chosen classes", "conflicting labels"
"""`CONFLICT`: equal to an earlier document that has another label."""
EMPTY, LEAKED = "empty", "also in the held-out split"
"""`EMPTY`: one of its texts is. `LEAKED`: equal, or nearly, to a document of a source that is only held out."""
RULES = (OTHER_CLASS, EMPTY, TOO_SHORT, TOO_LONG, FEW_LETTERS, REPETITION, LEAKED, EXACT, CONFLICT, NEAR)
"""Reasons for leaving a document out, in the order in which they are tried."""

_CONTROLS = bytes(code for code in (*range(32), 127) if chr(code) not in "\t\n")
_NON_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_SPACES = b" \t\n"
_ASCII, _BEYOND_ASCII = bytes(range(128)), bytes(range(128, 256))
# C0 and C1 controls but tab and newline, the byte-order mark, and code points that are no characters
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
# what bytes become when a single-byte encoding is assumed for them: nothing of CJK
_SUSPECT = re.compile("[\x80-\u2fff\uf8ff\ufb01\ufb02\ufffd]")
_MIN_LINES = 10


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of one document."""

    document: Document
    """Repaired; its texts are empty where a rule leaves it out."""
    text: bytes
    """UTF-8."""
    num_characters: int
    repairs: tuple[str, ...]
    rule: str | None
    """The rule that leaves it out."""
    digest: int
    """128-bit hash of the text."""
    whole: int
    """The same of the text and the second one: what is told apart from other documents."""

    @property
    def name(self) -> str:
        return self.document.name


def clean(
    documents: Sequence[Document], config: CleanConfig, classes: Sequence[str] = ()
) -> tuple[list[Cleaned], NDArray[np.uint32] | None]:
    """The documents, repaired and judged one by one, and the MinHash signatures of those that stay.

    Args:
        classes: documents of others are left out. Empty: none are.

    Returns:
        One record a document; signatures [documents that stay, permutations], None where nobody asks for them.
    """
    results, kept = [], []
    for raw in documents:
        document, repairs = _repair_document(raw, config)
        text, second = document.text, document.second
        data = text.encode()
        digest = whole = xxhash.xxh3_128_intdigest(data)
        if second is not None:
            whole = xxhash.xxh3_128_intdigest(data + b"\0" + second.encode())
        if classes and document.label not in classes:
            rule: str | None = OTHER_CLASS
        elif second is not None and not (text.strip() and second.strip()):
            rule = EMPTY
        else:
            rule = judge(text, data, config)
        if rule:
            document = document._replace(text="", second=None, spans=None)
        else:
            kept.append(text if second is None else f"{text}\n{second}")
            # the bytes are all that is needed of it
            document = document._replace(text="")
        results.append(Cleaned(document, b"" if rule else data, len(text), repairs, rule, digest, whole))
    return results, duplicates.signatures(kept) if config.near_duplicates is not None else None


def _repair_document(document: Document, config: CleanConfig) -> tuple[Document, tuple[str, ...]]:
    text, repairs = repair(document.text, config)
    spans = document.spans
    if spans and repairs:
        text, spans = _repair_between(document.text, spans, config)
    if document.second is None:
        return document._replace(text=text, spans=spans), repairs
    second, more = repair(document.second, config)
    return document._replace(text=text, spans=spans, second=second), (*repairs, *more)


def _repair_between(text: str, spans: Sequence[Span], config: CleanConfig) -> tuple[str, tuple[Span, ...]]:
    """The text repaired piece by piece, so that every span keeps its place in it."""
    ends = sorted({0, len(text), *(end for span in spans for end in span[:2])})
    pieces = [repair(text[begin:end], config)[0] for begin, end in pairwise(ends)]
    places = dict(zip(ends, accumulate(map(len, pieces), initial=0), strict=True))
    moved = ((places[begin], places[end], label) for begin, end, label in spans)
    # nothing may be left of a span of control characters
    return "".join(pieces), tuple(span for span in moved if span[0] < span[1])


def repair(text: str, config: CleanConfig) -> tuple[str, tuple[str, ...]]:
    """The text as it can be encoded, and repaired where the config asks for it; with the names of the repairs."""
    repairs = []
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            # joins surrogates that belong together; what is left over cannot be encoded
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            repairs.append(UNDECODABLE)
    if config.unicode:
        repaired = _repair_ascii(text) if text.isascii() else _repair_unicode(text)
        if repaired != text.replace("\r\n", "\n"):
            repairs.append(UNICODE)
        text = repaired
    return text, tuple(repairs)


def _unify_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _repair_ascii(text: str) -> str:
    # no mojibake and nothing to normalise in ASCII; bytes are an order of magnitude faster than a regular expression
    return _unify_newlines(text).encode("ascii").translate(None, _CONTROLS).decode("ascii")


def _repair_unicode(text: str) -> str:
    text = _unify_newlines(text)
    if _SUSPECT.search(text):
        # mis-decoding is a matter of lines, and ftfy's look at one costs far more than finding it innocent
        lines = text.split("\n")
        for index, line in enumerate(lines):
            if not line.isascii() and _SUSPECT.search(line) and ftfy.badness.is_bad(line):
                lines[index] = ftfy.fix_encoding(line)
        text = "\n".join(lines)
    text = _UNWANTED.sub("", text)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def judge(text: str, data: bytes, config: CleanConfig) -> str | None:
    """The rule that leaves the text out, None where it stays. `data` is the text in UTF-8."""
    if not data or len(text) < config.min_characters:
        return TOO_SHORT
    if config.max_characters is not None and len(text) > config.max_characters:
        return TOO_LONG
    if config.min_letters and fraction_of_letters(data) < config.min_letters:
        return FEW_LETTERS
    if config.max_repetition < 1 and fraction_of_repeats(text) > config.max_repetition:
        return REPETITION
    return None


def fraction_of_letters(data: bytes) -> float:
    """Letters of any script over characters that are not space; 0 for nothing but space."""
    ascii_part = data.translate(None, _BEYOND_ASCII)
    letters, visible = len(ascii_part.translate(None, _NON_LETTERS)), len(ascii_part.translate(None, _SPACES))
    if len(ascii_part) < len(data):
        beyond = data.translate(None, _ASCII).decode()
        letters += sum(map(str.isalpha, beyond))
        visible += len(beyond)
    return letters / visible if visible else 0.0


def fraction_of_repeats(text: str) -> float:
    """Lines that repeat another line over lines, blank ones aside; 0 for a text of fewer than ten lines."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    return 1 - len(set(lines)) / len(lines) if len(lines) >= _MIN_LINES else 0.0
