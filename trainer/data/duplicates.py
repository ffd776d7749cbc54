"""Documents that equal, or nearly equal, an earlier one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from trainer.data.keyed import Words

PERMUTATIONS = 128
_SHINGLE = 5
_SEED = 1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CHARACTERS_PER_WORD = 16
"""Text beyond ASCII with longer words than this on average is written without spaces: its characters are the words."""
_RECALL = 0.99

Signatures = NDArray[np.uint32]


def signatures(texts: Sequence[str]) -> Signatures:
    """MinHash signatures over word 5-grams, [texts, permutations] (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900)."""
    if not texts:
        return np.empty((0, PERMUTATIONS), dtype=np.uint32)
    shingles = [_shingles(words) for words in _word_hashes(texts)]
    ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), ends, PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _word_hashes(texts: Sequence[str]) -> list[Words]:
    words = [text.split() for text in texts]
    spaceless = [
        not text.isascii() and len(text) > _CHARACTERS_PER_WORD * len(split)
        for text, split in zip(texts, words, strict=True)
    ]
    hashes = RMinHash.hash_token_sets(
        [list("".join(split)) if each else split for split, each in zip(words, spaceless, strict=True)]
    )
    return [np.array(row, dtype=np.uint64) for row in hashes]


def _shingles(words: Words) -> Words:
    """A hash of each run of five words; of all words where there are fewer."""
    length = min(_SHINGLE, len(words))
    result = np.zeros(len(words) - max(length, 1) + 1, dtype=np.uint64)
    for offset in range(length):
        result = result * _MULTIPLIER + words[offset : offset + len(result)]
    return result


class NearDuplicates:
    """Signatures of the documents that stay, found again by locality-sensitive hashing (Leskovec et al., MMDS, ch. 3).

    Takes about 2 kB of memory a document.
    """

    def __init__(self, threshold: float):
        """
        Args:
            threshold: estimated Jaccard similarity from which on two documents are near-duplicates.
        """
        self._threshold = threshold
        # the longest bands that still show a pair at the threshold with this probability
        self._rows = max(
            (
                rows
                for rows in (1, 2, 4, 8, 16, 32, 64)
                if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= _RECALL
            ),
            default=1,
        )
        self._buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._signatures = np.empty((1024, PERMUTATIONS), dtype=np.uint32)
        self._size = 0

    def find(self, signature: NDArray[np.uint32]) -> int | None:
        """The number of the first document of those added that the signature is near to."""
        candidates = sorted({number for band in self._bands(signature) for number in self._buckets.get(band, ())})
        if not candidates:
            return None
        similar = (self._signatures[candidates] == signature).mean(axis=1) >= self._threshold
        return candidates[int(np.argmax(similar))] if similar.any() else None

    def add(self, signature: NDArray[np.uint32]) -> None:
        """Remember the next document."""
        if self._size == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[self._size] = signature
        for band in self._bands(signature):
            self._buckets[band].append(self._size)
        self._size += 1

    def _bands(self, signature: NDArray[np.uint32]) -> list[tuple[int, bytes]]:
        data, width = signature.tobytes(), 4 * self._rows
        return [(start, data[start : start + width]) for start in range(0, len(data), width)]
