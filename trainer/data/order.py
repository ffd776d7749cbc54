"""Which samples a batch holds: arithmetic on (seed, epoch, batch index, quarantine).

Nothing here knows ranks, micro-batches or workers, so no order depends on them, and any position is found in O(1).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trainer.data import keyed
from trainer.records import IntArray

_EPOCH, _SOURCE = 1, 2


@dataclass(frozen=True, init=False)
class Quarantine:
    """Batch indices that are left out: inclusive ranges, sorted and merged."""

    ranges: tuple[tuple[int, int], ...]

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()):
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if not 0 <= first <= last:
                raise ValueError(f"[{first}, {last}] is no range of batch indices")
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        object.__setattr__(self, "ranges", tuple(merged))

    def with_range(self, first: int, last: int) -> Quarantine:
        """This quarantine and the batches first … last."""
        return Quarantine((*self.ranges, (first, last)))

    def excluded(self, batch_index: int) -> bool:
        return self.next_allowed(batch_index) != batch_index

    def next_allowed(self, batch_index: int) -> int:
        """The smallest allowed index that is not below `batch_index`."""
        nearest = bisect_right(self.ranges, batch_index, key=lambda span: span[0]) - 1
        if nearest >= 0 and batch_index <= self.ranges[nearest][1]:
            return self.ranges[nearest][1] + 1
        return batch_index

    def nth(self, count: int) -> int:
        """The allowed index that has `count` allowed ones before it."""
        index = count
        for first, last in self.ranges:
            if index < first:
                break
            index += last - first + 1
        return index


@dataclass(frozen=True)
class Order:
    """The endless sequence of sample ids of a run.

    An epoch is a permutation of its positions; position → source and count within the source → sample. Source i fills
    max(1, round(weight · size)) positions of every epoch and goes through its samples pass by pass, each pass a
    permutation of its own; so weight 2 sees each sample twice an epoch, and weight ½ one half, then the other.
    """

    seed: int
    sizes: tuple[int, ...]
    """Samples of each source; at least one sample in all."""
    weights: tuple[float, ...]
    """Passes over each source in an epoch."""
    shuffle: bool = True

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights) or min(self.sizes, default=0) < 0 or not sum(self.sizes):
            raise ValueError(f"no order over sources of {self.sizes} samples with weights {self.weights}")

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Positions of each source in one epoch."""
        return tuple(
            max(1, round(weight * size)) if size else 0 for size, weight in zip(self.sizes, self.weights, strict=True)
        )

    @cached_property
    def epoch_length(self) -> int:
        """Positions in one epoch."""
        return sum(self.counts)

    def epoch_of(self, position: int) -> int:
        return position // self.epoch_length

    def batch(self, batch_index: int, global_batch: int) -> IntArray:
        """Sample ids of a global batch, [global_batch]; it may straddle two epochs."""
        return self.samples(batch_index * global_batch, global_batch)

    def samples(self, first_position: int, count: int) -> IntArray:
        """Sample ids at `count` positions from `first_position` on, [count].

        Ids number the samples of all sources, in the order of the sources.
        """
        positions = np.arange(first_position, first_position + count, dtype=np.int64)
        epochs, places = np.divmod(positions, self.epoch_length)
        if self.shuffle:
            places = keyed.permute(places, self.epoch_length, keyed.derive(keyed.key(self.seed, _EPOCH), epochs))
        ends = np.cumsum(self.counts)
        sources = np.searchsorted(ends, places, side="right")
        result = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            mine = sources == source
            size, quota = self.sizes[source], self.counts[source]
            passes, local = np.divmod(epochs[mine] * quota + places[mine] - (ends[source] - quota), size)
            if self.shuffle:
                own_key = keyed.derive(keyed.key(self.seed, _SOURCE), np.array([source]))
                local = keyed.permute(local, size, keyed.derive(own_key, passes))
            result[mine] = local + sum(self.sizes[:source])
        return result
