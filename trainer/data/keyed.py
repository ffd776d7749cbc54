"""Keyed pseudo-random numbers and permutations: pure functions of a key, vectorised, the same on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.records import IntArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8
_SMALL = 256
"""Domains up to this size are permuted by sorting: a Feistel network on so few bits mixes poorly."""


def key(seed: int, purpose: int) -> np.uint64:
    """A 64-bit key for one purpose of a seed of any size.

    By numpy's SeedSequence, whose output is the same in all versions.
    """
    return np.random.SeedSequence((seed, purpose)).generate_state(1, np.uint64)[0]  # type: ignore[no-any-return]


def mix(words: Words) -> Words:
    """A bijection of 64-bit words in which each input bit flips half of the output.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014, https://doi.org/10.1145/2714064.2660195).
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive(keys: np.uint64 | Words, numbers: IntArray) -> Words:
    """One key for each pair of a key and a non-negative number (broadcast)."""
    return mix(np.atleast_1d(keys) + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def permute(indices: IntArray, size: int, keys: Words) -> IntArray:
    """The images of `indices` under the permutation of 0 … size − 1 that belongs to each one's key.

    A Feistel network (Luby & Rackoff 1988) over the smallest power of two that holds `size`, walked along its cycles
    back into range (Black & Rogaway 2002): constant memory, fewer than two walks an index on average.

    Args:
        indices: [n], each in 0 … size − 1.
        keys: [n], one for each index.
    """
    if size <= _SMALL:
        unique, which = np.unique(keys, return_inverse=True)
        tables = np.argsort(derive(unique[:, None], np.arange(size)), axis=1, kind="stable")
        return tables[which, indices].astype(np.int64)
    result = indices.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _feistel(result[outside], size, keys[outside])
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)


def _feistel(words: Words, size: int, keys: Words) -> Words:
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (np.uint64(bits) - low_bits)) - np.uint64(1)
    low, high = words & low_mask, words >> low_bits
    for turn in range(_ROUNDS):
        round_keys = mix(keys + np.uint64(turn))
        if turn % 2:
            high = high ^ (mix(low ^ round_keys) & high_mask)
        else:
            low = low ^ (mix(high ^ round_keys) & low_mask)
    return high << low_bits | low
