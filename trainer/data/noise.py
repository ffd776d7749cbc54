"""Changes of a text by words and characters: left out, swapped, mistyped, replaced. Pure functions of (text, key).

A word is a run of characters without white space; where a script is written without spaces (Chinese, Japanese, Thai,
Lao, Khmer, Burmese), each character is one. A character is what a reader sees as one: marks that combine with the one
before stay with it. Digits and addresses are words like any others.

A rate is the probability of each word or character, drawn for each by itself: over many texts that fraction is changed,
and a short text is not always spared.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data import keyed
from trainer.data.lexicon import Lexicon

KINDS = ("synonyms", "delete", "swap", "typos")
"""In the order in which they are carried out."""

_ALONE = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U0001aff0-\U0001b16f\U00020000-\U000323af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
"""Han, kana, Thai, Lao, Burmese, Khmer: written without spaces."""
_LAST_MARK = 0x1E950
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_DROP, _DOUBLE, _REPLACE, _SWAP = range(4)


class Piece(NamedTuple):
    """A word and the white space before it."""

    gap: str
    word: str


@dataclass(frozen=True)
class Noise:
    """How much of a text is changed."""

    synonyms: float = 0.0
    """Of the words that the lexicon knows."""
    delete: float = 0.0
    """Of the words."""
    swap: float = 0.0
    """Of the words but the last: change places with the next one; at most 0.5."""
    typos: float = 0.0
    """Of the characters that are no white space."""
    lexicon: Lexicon | None = None

    def __call__(self, text: str, key: int) -> str:
        """The text changed; never empty unless it was.

        Args:
            key: of 64 bits; another one gives another change.
        """
        own = [keyed.mix(np.array([key], dtype=np.uint64) + np.uint64(number + 1))[0] for number in range(len(KINDS))]
        if self.synonyms and self.lexicon is not None:
            text = replace_words(text, self.synonyms, self.lexicon, own[0])
        if self.delete:
            text = delete_words(text, self.delete, own[1])
        if self.swap:
            text = swap_words(text, self.swap, own[2])
        if self.typos:
            text = mistype(text, self.typos, own[3])
        return text


def pieces(text: str) -> tuple[list[Piece], str]:
    """The words of a text, each with the white space before it, and the white space at the end."""
    words, _ = _patterns()
    result, end = [], 0
    for match in words.finditer(text):
        result.append(Piece(text[end : match.start()], match.group()))
        end = match.end()
    return result, text[end:]


def characters(text: str) -> list[str]:
    """What a reader sees as one character each, white space included."""
    return _patterns()[1].findall(text)


def delete_words(text: str, rate: float, key: np.uint64) -> str:
    """Words left out, with the white space before them; one always stays."""
    found, tail = pieces(text)
    dice = _dice(key, len(found))
    stays = dice >= rate
    if not found or stays.all():
        return text
    stays[int(dice.argmax())] = True
    kept = [piece for piece, here in zip(found, stays.tolist(), strict=True) if here]
    # a text begins as it began
    return found[0].gap + kept[0].word + "".join(gap + word for gap, word in kept[1:]) + tail


def swap_words(text: str, rate: float, key: np.uint64) -> str:
    """Words changed places with the next one; white space stays where it is.

    The scan from left to right goes on behind a pair. So that each word but the last begins one with probability
    `rate`, a word that is free does with rate / (1 − rate), and the first is free with probability 1 − rate.
    """
    assert rate <= 0.5
    found, tail = pieces(text)
    words = [word for _, word in found]
    dice = _dice(key, len(words) + 1).tolist()
    place = int(dice[-1] < rate)
    while place < len(words) - 1:
        if dice[place] * (1 - rate) < rate:
            words[place], words[place + 1] = words[place + 1], words[place]
            place += 1
        place += 1
    return "".join(gap + word for (gap, _), word in zip(found, words, strict=True)) + tail


def mistype(text: str, rate: float, key: np.uint64) -> str:
    """Characters dropped, doubled, replaced by a neighbour on the keyboard, or swapped with the next one.

    Where there is no keyboard for a script, another character of the text stands for the neighbour. A swap that is not
    possible doubles: at the end of a word, or where the next one is changed itself.
    """
    found = characters(text)
    places = [place for place, character in enumerate(found) if not character.isspace()]
    dice = _dice(key, len(places))
    chosen = [places[n] for n in np.flatnonzero(dice < rate).tolist()]
    if not chosen:
        return text
    own = keyed.derive(key, np.array(chosen, dtype=np.int64))
    changed, left = set(chosen), len(places)
    visible = [found[place] for place in places]
    result = list(found)
    for place, number in zip(chosen, own.tolist(), strict=True):
        kind, pick = number % 4, number // 4
        after = place + 1
        if kind == _SWAP and (after == len(found) or found[after].isspace() or after in changed):
            kind = _DOUBLE
        if kind == _DROP and left == 1:
            kind = _DOUBLE
        if kind == _DROP:
            result[place] = ""
            left -= 1
        elif kind == _SWAP:
            result[place], result[after] = found[after], found[place]
        else:
            other = _neighbour(found[place], visible, pick) if kind == _REPLACE else None
            result[place] = found[place] * 2 if other is None else other
    return "".join(result)


def replace_words(text: str, rate: float, lexicon: Lexicon, key: np.uint64) -> str:
    """Words replaced by one of their synonyms, written as they are (Capital, CAPITALS) with the punctuation around.

    Where a script has no spaces, the longest entry that begins at a character is the word.
    """
    found, tail = pieces(text)
    numbers = keyed.derive(key, np.arange(len(found)))
    dice, picks = _fractions(numbers), keyed.mix(numbers).tolist()
    result, place = [], 0
    while place < len(found):
        length, synonyms = _look_up(found, place, lexicon)
        word = "".join(piece.word for piece in found[place : place + length])
        if synonyms and dice[place] < rate:
            before, core, after = _stripped(word)
            word = before + _written_as(core, synonyms[picks[place] % len(synonyms)]) + after
        result.append(found[place].gap + word)
        place += length
    return "".join(result) + tail


def _look_up(found: Sequence[Piece], place: int, lexicon: Lexicon) -> tuple[int, tuple[str, ...]]:
    """How many pieces from `place` on are one word, and its synonyms."""
    if _is_alone(found[place].word):
        most = 1
        while most < lexicon.longest and place + most < len(found):
            following = found[place + most]
            if following.gap or not _is_alone(following.word):
                break
            most += 1
        for length in range(most, 0, -1):
            if synonyms := lexicon.synonyms("".join(piece.word for piece in found[place : place + length])):
                return length, synonyms
        return 1, ()
    return 1, lexicon.synonyms(_stripped(found[place].word)[1])


def _is_alone(word: str) -> bool:
    return bool(word) and _alone().match(word[0]) is not None


def _stripped(word: str) -> tuple[str, str, str]:
    """Punctuation before a word, the word, punctuation behind it."""
    begin, end = 0, len(word)
    while begin < end and not word[begin].isalnum():
        begin += 1
    while end > begin and not word[end - 1].isalnum():
        end -= 1
    return word[:begin], word[begin:end], word[end:]


def _written_as(word: str, synonym: str) -> str:
    if len(word) > 1 and word.isupper():
        return synonym.upper()
    return synonym[:1].upper() + synonym[1:] if word[:1].isupper() else synonym


def _neighbour(character: str, visible: Sequence[str], pick: int) -> str | None:
    """Another character in place of this one; None: there is none."""
    near = _neighbours().get(character.lower())
    if near is None:
        near = "0123456789".replace(character, "") if character.isascii() and character.isdigit() else None
    if near is not None:
        other = near[pick % len(near)]
        return other.upper() if character.isupper() else other
    for offset in range(len(visible)):
        other = visible[(pick + offset) % len(visible)]
        if other != character:
            return other
    return None


@cache
def _neighbours() -> dict[str, str]:
    """Latin letter → letters beside it on a keyboard."""
    near: dict[str, str] = {}
    for row in _KEYBOARD:
        for left, right in pairwise(row):
            near[left] = near.get(left, "") + right
            near[right] = near.get(right, "") + left
    for upper, lower in pairwise(_KEYBOARD):
        for one, other in zip(upper, lower, strict=False):
            near[one] += other
            near[other] += one
    return near


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Words; characters."""
    marks = [code for code in range(0x300, _LAST_MARK) if unicodedata.category(chr(code))[0] == "M"]
    # joiners hold pictures together
    combining = "".join(map(chr, [*marks, 0x200C, *range(0x1F3FB, 0x1F400), *range(0xE0100, 0xE01F0)]))
    cluster = f"(?:[{combining}]|\u200d.)*"
    words = re.compile(f"[{_ALONE}]{cluster}|[^\\s{_ALONE}]+", re.DOTALL)
    return words, re.compile(f".{cluster}", re.DOTALL)


@cache
def _alone() -> re.Pattern[str]:
    return re.compile(f"[{_ALONE}]")


def _dice(key: np.uint64, count: int) -> NDArray[np.float64]:
    return _fractions(keyed.derive(key, np.arange(count)))


def _fractions(numbers: keyed.Words) -> NDArray[np.float64]:
    """Of 64-bit words, in [0, 1)."""
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
