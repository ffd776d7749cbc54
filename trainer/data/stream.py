"""This rank's part of each global batch, read ahead in a thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.objective import EACH_ALONE, ObjectiveConfig
from trainer.data.alike import alike_together
from trainer.data.augment import Augmentation
from trainer.data.labelled import LabelledSamples, trimmed
from trainer.data.masking import Masking
from trainer.data.on_policy import OnPolicy
from trainer.data.order import Order, Quarantine
from trainer.data.partners import Partners, draw_keys, trimmed_together
from trainer.data.samples import IGNORED, Samples
from trainer.errors import ConfigError, DataError, WorkerDiedError
from trainer.records import DRAWS, PARTNER, Batch, IntArray

_SECONDS_BETWEEN_LOOKS = 1.0

Annotate = Callable[[IntArray, dict[str, IntArray]], dict[str, NDArray[Any]]]
"""From ids [n] and arrays [n, …] of samples to further arrays [n, …] of them."""


class Reader:
    """Samples as inputs and labels of an objective."""

    def __init__(self, samples: Samples, objective: ObjectiveConfig, seed: int):
        """
        Raises:
            ConfigError: the masked objective is asked to keep attention inside documents.
            DataError: the masked objective without a mask token; data that was prepared for another kind.
        """
        self._kind = samples.kind if isinstance(samples, LabelledSamples) else None
        if self._kind != (objective.kind if objective.kind in EACH_ALONE else None):
            found = f"was prepared for {self._kind}" if self._kind else "has no labels"
            raise DataError(f"the data {found}, and objective.kind is {objective.kind}: see data.sources.0.label")
        if objective.kind == "masked" and samples.boundaries == "block":
            problem = (
                "`block` needs a causal model: transformers derives no block-diagonal mask for the masked objective"
            )
            raise ConfigError([("data.boundaries", problem + "; use `positions` or `join`")])
        self.samples = samples
        self._masking = Masking(samples, objective.mask_fraction, seed) if objective.kind == "masked" else None

    def fetch(self, ids: IntArray, visits: IntArray) -> dict[str, IntArray]:
        """Arrays [n, …] of the samples `ids`; `visits` [n] tells masks of the same sample apart."""
        return self._masking.fetch(ids, visits) if self._masking else self.samples.fetch(ids)

    def num_targets(self, ids: IntArray) -> int:
        """Targets of `fetch(ids, …)`: one a text, or labels that are no −100."""
        return self._masking.num_targets(ids) if self._masking else self.samples.num_targets(ids)

    def lengths(self, ids: IntArray) -> IntArray | None:
        """Tokens of each text, [n]; None: all samples are equally long."""
        return None if self._kind is None else self.samples.num_ordinary(ids)

    def micro_batch(self, arrays: dict[str, NDArray[Any]], rows: slice) -> dict[str, NDArray[Any]]:
        """The rows of the arrays that are computed together, without columns that hold nothing but padding."""
        chosen = {name: array[rows] for name, array in arrays.items()}
        if self._kind is None:
            return chosen
        trim = partial(trimmed, kind=self._kind)
        return trimmed_together(chosen, trim) if any(name.startswith(PARTNER) for name in chosen) else trim(chosen)


class Stream:
    """Batches for ever. Micro-step k of rank r takes the in-batch places (k·ranks + r)·micro … +micro."""

    def __init__(
        self,
        samples: Samples,
        order: Order,
        *,
        batch: int,
        micro: int,
        rank: int,
        ranks: int,
        objective: ObjectiveConfig,
        seed: int,
        next_batch: int = 0,
        quarantine: Quarantine | None = None,
        prefetch: int = 2,
        reading: Callable[[int], None] = lambda _: None,
        annotate: Annotate | None = None,
        on_policy: OnPolicy | None = None,
        augment: Augmentation | None = None,
        alike: bool = True,
    ):
        """
        Args:
            batch: samples in a global batch; a multiple of micro · ranks.
            next_batch: index of the first batch; where it is in quarantine, the next allowed one.
            prefetch: batches read ahead. 0: each is read when it is asked for.
            reading: called with the index of a batch in the thread that is about to read it; what it raises ends it.
            annotate: called in that thread with what the objective's arrays are, before they are cut into
                micro-batches; what it returns is put beside them.
            on_policy: samples whose end the model is to write itself; None: none.
            augment: changes the samples; None: they stay as they are.
            alike: compute texts that are alike in length together; samples of one length stay in their order.
        """
        assert batch % (micro * ranks) == 0
        assert order.sizes == samples.sizes
        self._reader = Reader(samples, objective, seed)
        self._order = order
        self._batch, self._micro, self._rank, self._ranks = batch, micro, rank, ranks
        self._quarantine = quarantine or Quarantine()
        self._prefetch, self._reading, self._annotate = prefetch, reading, annotate
        self._on_policy, self._augment, self._alike = on_policy, augment, alike
        self._partners = Partners(seed, batch, objective.mixup) if objective.mixup else None
        # an adversarial step from a random place begins where the sample says
        self._draws = objective.adversarial is not None and objective.adversarial.kind == "freelb"
        self._seed = seed
        self._ahead: _Ahead | None = None
        self.seek(next_batch)

    @property
    def next_batch(self) -> int:
        """Index after the last batch that was handed out."""
        return self._next

    @property
    def quarantine(self) -> Quarantine:
        """Batches that are left out."""
        return self._quarantine

    def leave_out(self, first: int, last: int) -> None:
        """Put batches into quarantine that were handed out already; for others, :meth:`seek` follows."""
        self._quarantine = self._quarantine.with_range(first, last)

    def seek(self, next_batch: int) -> None:
        """Go on from another place; where it is in quarantine, from the next allowed one."""
        self.close()
        self._next = next_batch
        self._source = self._batches(next_batch)
        name = f"data-rank-{self._rank}"
        self._ahead = _Ahead(self._source, self._prefetch, name) if self._prefetch else None

    def read(self, batch_index: int) -> Batch:
        """One batch by its index, in quarantine or not; the place in the stream stays."""
        return self._read(batch_index)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            WorkerDiedError: the reading thread has ended; its exception is the cause.
        """
        started = time.perf_counter()
        result = self._ahead.take() if self._ahead else next(self._source)
        self._next = result.batch_index + 1
        return replace(result, seconds_waiting=time.perf_counter() - started)

    def close(self) -> None:
        """End the reading thread and wait for it."""
        if self._ahead:
            self._ahead.close()

    def _batches(self, index: int) -> Iterator[Batch]:
        while True:
            index = self._quarantine.next_allowed(index)
            self._reading(index)
            yield self._read(index)
            index += 1

    def _read(self, index: int) -> Batch:
        ids = self._order.batch(index, self._batch)
        positions = np.arange(index * self._batch, (index + 1) * self._batch)
        computed = self._computed(index, ids)
        # [accumulation, ranks, micro]: this rank's column
        places = computed.reshape(-1, self._ranks, self._micro)[:, self._rank].ravel()
        own = ids[places]
        arrays = self._fetch(own, positions[places])
        if self._annotate:
            arrays |= self._annotate(own, arrays)
        if self._on_policy:
            arrays |= self._on_policy.arrays(ids, positions, places)
        if self._partners:
            arrays |= self._partners.arrays(index, ids, positions, places, self._fetch)
        if self._draws:
            arrays[DRAWS] = draw_keys(self._seed, positions[places])
        return Batch(
            batch_index=index,
            epoch=self._order.epoch_of(int(positions[0])),
            samples=ids[computed],
            num_targets=self._reader.num_targets(ids),
            micro_batches=tuple(
                self._reader.micro_batch(arrays, slice(start, start + self._micro))
                for start in range(0, len(places), self._micro)
            ),
        )

    def _computed(self, index: int, ids: IntArray) -> IntArray:
        """Places of the batch in the order of its micro-batches, [batch]."""
        lengths = self._reader.lengths(ids) if self._alike else None
        if lengths is None:
            return np.arange(self._batch)
        return alike_together(lengths, self._micro, self._ranks, index)

    def _fetch(self, ids: IntArray, visits: IntArray) -> dict[str, NDArray[Any]]:
        """Arrays [n, …] of samples as they are learned from."""
        arrays: dict[str, NDArray[Any]] = {**self._reader.fetch(ids, visits)}
        return self._augment(arrays, ids, visits) if self._augment else arrays


class _Ahead:
    """A thread that reads a few batches ahead."""

    def __init__(self, source: Iterator[Batch], limit: int, name: str):
        self._source, self._limit = source, limit
        self._ready: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for batch in self._source:
                with self._changed:
                    self._ready.append(batch)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closing or len(self._ready) < self._limit)
                    if self._closing:
                        return
        except BaseException as error:  # noqa: BLE001 - raised again where the batch is asked for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def take(self) -> Batch:
        with self._changed:
            while not self._ready:
                if self._error is not None or not self._thread.is_alive():
                    reason = (
                        f"{type(self._error).__name__}: {self._error}" if self._error else "it ended without a word"
                    )
                    raise WorkerDiedError(
                        f"the thread {self._thread.name} that reads data died: {reason}"
                    ) from self._error
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()


def num_evaluation_batches(samples: Samples, *, micro: int, ranks: int, max_samples: int | None) -> int:
    """How many micro-batches each rank evaluates."""
    return -(-min(len(samples), max_samples or len(samples)) // (micro * ranks))


def evaluation_batches(
    samples: Samples,
    *,
    micro: int,
    rank: int,
    ranks: int,
    max_samples: int | None,
    objective: ObjectiveConfig,
    seed: int,
) -> Iterator[dict[str, IntArray]]:
    """This rank's micro-batches of an evaluation: every sample once over all ranks, equally many micro-batches on each.

    `max_samples` are spread evenly over the split. A place left empty holds a sample without labels.
    """
    reader = Reader(samples, objective, seed)
    total = min(len(samples), max_samples or len(samples))
    chosen = np.arange(total) * len(samples) // total
    for step in range(num_evaluation_batches(samples, micro=micro, ranks=ranks, max_samples=max_samples)):
        places = (step * ranks + rank) * micro + np.arange(micro)
        arrays = reader.fetch(chosen[np.minimum(places, total - 1)], np.zeros(micro, dtype=np.int64))
        # a label that is a number may be any number
        arrays["labels"][places >= total] = np.nan if objective.kind in {"regression", "several"} else IGNORED
        yield reader.micro_batch(arrays, slice(None))
