"""Has the teacher of a run predict every sample, and keeps what it says: what `trimtab teach` does on each rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from trainer.config.distill import TeacherConfig
from trainer.config.teaching import distill_of
from trainer.data.prepared import Split
from trainer.data.samples import IGNORED
from trainer.data.stream import Reader
from trainer.errors import DataError
from trainer.knowledge import Targets, Teacher
from trainer.records import IntArray
from trainer.stages.build import Setting
from trainer.stages.caching import agreed, folder_of, name_of, wanted_of
from trainer.teacher.blocks import Tally
from trainer.teacher.cache import CacheWriter
from trainer.teacher.header import Header, find
from trainer.teacher.sparse import Entries, entries_of, vocabulary_of

logger = logging.getLogger(__name__)

_TRIES = 3

Progress = Callable[[str, int, int], None]
"""Told the stage, samples done and all samples."""
OpenTeacher = Callable[[Setting], Teacher]


@dataclass(frozen=True, slots=True)
class Taught:
    """What is in a cache, and what it cost to write."""

    folder: str
    header: Header
    tally: Tally
    """Over all of its samples."""
    num_bytes: int
    """Of its blocks."""
    new_tokens: int
    """That were predicted now."""
    seconds: float
    """Of predicting and writing them."""


class _AskedToStopError(Exception):
    pass


class Teaching:
    """One split of a run."""

    def __init__(self, setting: Setting, split: Split, open_teacher: OpenTeacher, progress: Progress):
        """
        Args:
            setting: its config is of :func:`writing`.
            open_teacher: called when there is something to predict. A collective.

        Raises:
            DataError: the split has no samples, or the teacher cannot be read.
        """
        config, data = setting.config, setting.config.data
        self._setting, self._progress, self._open_teacher = setting, progress, open_teacher
        self._folder = folder_of(config)
        self._wanted = agreed(lambda: wanted_of(config, setting.prepared, split))
        samples = setting.prepared.samples(split, data.sequence_length, data.boundaries)
        self._reader = Reader(samples, config.objective, config.seed)
        self._chunk = distill_of(config).loss.chunk
        self._teacher: Teacher | None = None
        # its forward pass is a collective: all ranks go through equally many
        self._together = distill_of(config).teacher.place == "zero3"

    def run(self) -> Taught | None:
        """Write what is missing of the cache. A collective.

        Returns:
            None: it was asked to stop; the blocks that are complete stay.

        Raises:
            DataError: the teacher's predictions are not finite.
            RunDirectoryError: the cache cannot be written.
        """
        try:
            return self._run()
        except _AskedToStopError:
            return None
        finally:
            if self._teacher is not None:
                self._teacher.close()

    def _run(self) -> Taught:
        header = agreed(self._known) or self._new()
        writer = CacheWriter(self._folder, header)
        if self._setting.ranks.is_first:
            writer.create()
        dist.barrier()
        tallies = self._look(writer)
        missing = [block for block, tally in enumerate(tallies) if tally is None]
        seconds = 0.0
        if missing:
            self._ask_for_teacher()
            started = time.perf_counter()
            if self._setting.ranks.is_first:
                writer.open_again()
            dist.barrier()
            self._write(writer, missing, tallies)
            seconds = time.perf_counter() - started
        if self._setting.ranks.is_first:
            writer.finish()
        dist.barrier()
        known = [tally for tally in tallies if tally is not None]
        new = sum(len(header.grid.within(block)) for block in missing) * header.length
        return Taught(str(writer.folder), header, sum(known, Tally()), writer.num_bytes(), new, seconds)

    def _known(self) -> Header | None:
        found = find(self._folder, self._wanted)
        return found[1] if found else None

    def _new(self) -> Header:
        """The header of a new cache; a teacher's vocabulary shows in its first prediction."""
        targets = self._predict(np.zeros(1, dtype=np.int64))[1]
        teacher = distill_of(self._setting.config).teacher
        assert self._wanted.teacher is not None
        about = (self._wanted.teacher, name_of(teacher), self._computes_in(teacher))
        vocabulary = vocabulary_of(targets) or self._wanted.vocabulary
        return Header.of(self._wanted, about, vocabulary, self._setting.config.seed)

    def _computes_in(self, teacher: TeacherConfig) -> str:
        if teacher.place == "server":
            return "unknown"
        if teacher.precision != "auto":
            return teacher.precision
        return "bf16" if self._setting.device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"

    def _look(self, writer: CacheWriter) -> list[Tally | None]:
        """What is there of each block; each rank reads its part."""
        ranks, grid = self._setting.ranks, writer.header.grid
        mine = {}
        for block in range(ranks.rank, grid.blocks, ranks.world_size):
            self._setting.heartbeat.beat("loading")
            mine[block] = writer.look_at(block)
            if mine[block] is not None:
                self._progress("reading what is there", grid.within(block)[-1] + 1, grid.samples)
        parts: list[dict[int, Tally | None]] = [{}] * ranks.world_size
        dist.all_gather_object(parts, mine)
        found = {block: tally for part in parts for block, tally in part.items()}
        return [found[block] for block in range(grid.blocks)]

    def _write(self, writer: CacheWriter, missing: list[int], tallies: list[Tally | None]) -> None:
        """Write the missing blocks, and fill in what they say of themselves.

        Raises:
            _AskedToStopError: on all ranks.
        """
        ranks, grid = self._setting.ranks, writer.header.grid
        done = grid.samples - sum(len(grid.within(block)) for block in missing)
        for first in range(0, len(missing), ranks.world_size):
            blocks = missing[first : first + ranks.world_size]
            mine = blocks[ranks.rank] if ranks.rank < len(blocks) else None
            tally = self._write_block(writer, mine, blocks, done)
            parts: list[Tally | None] = [None] * ranks.world_size
            dist.all_gather_object(parts, tally)
            for block, part in zip(blocks, parts, strict=False):
                tallies[block] = part
            done += sum(len(grid.within(block)) for block in blocks)
        self._progress("predicting", done, grid.samples)

    def _write_block(self, writer: CacheWriter, block: int | None, beside: list[int], done: int) -> Tally | None:
        """Predict and write a block; what it says of itself.

        Args:
            block: None: this rank has none; it goes along where the teacher's forward pass is a collective.
            beside: all that are being written now; the first is the longest.
            done: samples of all blocks before them.

        Raises:
            DataError: the teacher's weights do not stay what was loaded.
        """
        for _ in range(_TRIES):
            records, tally = self._predict_block(writer, block, beside, done)
            # before anything is written that harmed weights have predicted
            found = self._ask_for_teacher().mend()
            if found is None:
                break
            logger.warning("%s; blocks %s are predicted again", found, ", ".join(map(str, beside)))
        else:
            raise DataError(f"{found}, {_TRIES} times in a row: look at the memory of this machine")
        if block is None:
            return None
        writer.write(block, records, tally)
        return tally

    def _predict_block(
        self, writer: CacheWriter, block: int | None, beside: list[int], done: int
    ) -> tuple[list[bytes], Tally]:
        """Records of a block. Its micro-batches begin with its first sample, so that its bytes depend on nothing but
        `batch.micro`. Arguments as above."""
        header, micro = writer.header, self._setting.config.batch.micro
        records: list[bytes] = []
        tally = Tally()
        longest = np.array(header.grid.within(beside[0]))
        ids = longest[:0] if block is None else np.array(header.grid.within(block))
        for first in range(0, len(longest), micro):
            self._stop_if_asked()
            self._progress("predicting", min(header.samples, done + first * len(beside)), header.samples)
            part = ids[first : first + micro]
            if part.size or self._together:
                shown = part if part.size else longest[:1]
                arrays, targets = self._predict(shown)
                entries = entries_of(targets, header.form, shown, header.seed, self._chunk)
            if part.size:
                tokens = None if entries.ids is None else entries.ids.numpy()
                records += writer.records(tokens, entries.values.numpy())
                tally += tally_of(arrays, entries)
            self._setting.heartbeat.beat("computing", beside[0])
        return records, tally

    def _stop_if_asked(self) -> None:
        vote = torch.tensor(int(self._setting.stop.requested), device=self._device)
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        if vote.item():
            raise _AskedToStopError

    @property
    def _device(self) -> torch.device:
        setting = self._setting
        return torch.device("cuda", setting.ranks.local_rank) if setting.device == "cuda" else torch.device("cpu")

    def _ask_for_teacher(self) -> Teacher:
        if self._teacher is None:
            self._teacher = self._open_teacher(self._setting)
        return self._teacher

    @torch.no_grad()
    def _predict(self, ids: IntArray) -> tuple[dict[str, NDArray[Any]], Targets]:
        """Arrays of samples and what the teacher predicts of them."""
        teacher = self._ask_for_teacher()
        arrays: dict[str, NDArray[Any]] = {**self._reader.fetch(ids, np.zeros_like(ids))}
        arrays |= teacher.annotate(ids, arrays)
        arrays = self._reader.micro_batch(arrays, slice(0, len(ids)))
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        targets = teacher.knowledge(tensors).targets
        assert targets is not None
        return arrays, targets


def tally_of(arrays: Mapping[str, NDArray[Any]], entries: Entries) -> Tally:
    """Sums over the positions of samples, and over those of them at which something is predicted."""
    predicted = torch.from_numpy(arrays["labels"] != IGNORED).flatten()
    kept = torch.full_like(entries.mass, entries.values.shape[-1])
    if entries.ids is not None:
        kept = (entries.ids >= 0).sum(dim=-1).double()
    return Tally(
        samples=len(arrays["labels"]),
        tokens=arrays["input_ids"].size,
        targets=float(predicted.sum()),
        entries=float(kept[predicted].sum()),
        entropy=float(entries.entropy[predicted].sum()),
        mass=float(entries.mass[predicted].sum()),
    )
