"""Groups of words that may stand for each other, from a file or WordNet's folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from trainer.errors import DataError

_PARTS = ("noun", "verb", "adj", "adv")
_MARKER = re.compile(r"\((?:a|p|ip)\)$")
"""Where in a sentence WordNet's adjectives stand."""
_SEPARATOR = re.compile(r"\s*[\t,]\s*")


class Lexicon:
    """Word → its synonyms; upper and lower case are the same.

    Args:
        groups: words that may stand for each other; a word may be in several.
    """

    def __init__(self, groups: Iterable[Iterable[str]], digest: str = ""):
        self.digest = digest
        """Of the files that it was read from."""
        self.num_groups = 0
        self._synonyms: dict[str, tuple[str, ...]] = {}
        for group in groups:
            words = tuple(dict.fromkeys(group))
            self.num_groups += 1
            for word in words:
                known = self._synonyms.get(word.lower(), ())
                others = (other for other in words if other.lower() != word.lower())
                self._synonyms[word.lower()] = tuple(dict.fromkeys((*known, *others)))
        self._synonyms = {word: others for word, others in self._synonyms.items() if others}
        self.longest = max(map(len, self._synonyms), default=0)
        """Characters of the longest word."""

    def __len__(self) -> int:
        return len(self._synonyms)

    def synonyms(self, word: str) -> tuple[str, ...]:
        """In the order of the groups; empty: the word is not known."""
        return self._synonyms.get(word.lower(), ())

    @classmethod
    def read(cls, path: Path) -> Lexicon:
        """A file with a group of synonyms a line, between tabs or commas (`#` begins a comment line), or a folder with
        WordNet's `data.noun`, `data.verb`, `data.adj`, `data.adv`, or some of them.

        Raises:
            DataError: it cannot be read, or has no synonyms.
        """
        try:
            files = [file for part in _PARTS if (file := path / f"data.{part}").is_file()] if path.is_dir() else [path]
            texts = [file.read_bytes() for file in files]
            contents = [text.decode("utf-8-sig") for text in texts]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.augment.lexicon: {path} cannot be read: {error}") from error
        if not files:
            wanted = ", ".join(f"data.{part}" for part in _PARTS)
            raise DataError(f"data.augment.lexicon: the folder {path} has none of WordNet's files ({wanted})")
        groups: Iterator[list[str]]
        if path.is_dir():
            groups = (group for file, text in zip(files, contents, strict=True) for group in _wordnet(file, text))
        else:
            groups = (
                [word for word in _SEPARATOR.split(line.strip()) if word]
                for line in contents[0].splitlines()
                if line.strip() and not line.startswith("#")
            )
        lexicon = cls(groups, xxhash.xxh3_64_hexdigest(b"\0".join(texts)))
        if not len(lexicon):
            text = f"data.augment.lexicon: {path} has no group of two words: put synonyms on one line, between commas"
            raise DataError(text)
        return lexicon


def _wordnet(file: Path, text: str) -> Iterator[list[str]]:
    """The sets of synonyms of one of WordNet's files (https://wordnet.princeton.edu/documentation/wndb5wn)."""
    for number, line in enumerate(text.splitlines(), 1):
        # what begins with spaces is the licence
        if not line or line.startswith("  "):
            continue
        fields = line.split(" ")
        try:
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        except (ValueError, IndexError):
            raise DataError(f"data.augment.lexicon: {file}:{number} is no line of a WordNet data file") from None
        yield [_MARKER.sub("", word).replace("_", " ") for word in words]
