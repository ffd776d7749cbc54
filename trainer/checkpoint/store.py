"""Write, commit, find and read checkpoints. Sharded: each rank writes and reads its own files, rank 0 commits.

A checkpoint is written in a thread under a temporary name and renamed when every rank's files are on disk, so a
directory `step-NNNNNNNN` is whole or does not exist. Only tensors (safetensors) and plain JSON: loading runs no code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from trainer.checkpoint.elastic import Shape, refuse_unconvertible, reshard
from trainer.checkpoint.folder import Folder, Say
from trainer.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_file,
    check_listing,
    committed_steps,
    encode_manifest,
    name_of,
    read_manifest,
    shard_files,
)
from trainer.checkpoint.shard import Moment, State, halves, read_shard, sync_directory, write_file, write_shard
from trainer.checkpoint.together import Together, nothing
from trainer.checkpoint.writer import Failed, Writer
from trainer.errors import CheckpointError, DamagedError, SupersededError, TrimtabError
from trainer.records import Saved
from trainer.starts import NO_FENCE, Fence

__all__ = ["CheckpointStore", "Failed", "Moment", "Saved", "State", "committed_steps", "name_of", "shard_files"]

_PATIENCE_SECONDS = 3.0
"""In which a file that another node wrote may still appear."""
_MESSAGE_TIMEOUT = timedelta(hours=4)
"""A rank waits for the slowest one's disk; that a rank hangs is noticed elsewhere."""


class CheckpointStore:
    """The `checkpoints` folder of a run, seen by one rank. Making it is a collective.

    Args:
        folder: the run's `checkpoints` directory, on a file system that all ranks share.
        replicated: every rank holds the same state (ZeRO 0): rank 0 writes it, all read it.
        keep: rolling checkpoints that stay.
        keep_every: steps between checkpoints that stay for good.
        fence: keeps what a superseded start writes out of the run.
        moment: called while a checkpoint is written, in the thread that does.
        say: told what a person must hear (level, text); on rank 0 only, from any thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        replicated: bool,
        keep: int,
        keep_every: int | None = None,
        fence: Fence = NO_FENCE,
        moment: Moment = nothing,
        say: Say = nothing,
    ):
        self.folder = folder
        self._rank = rank
        self._world_size = world_size
        self._replicated = replicated
        self._shard = 0 if replicated else rank
        self._fence = fence
        self._moment = moment
        self._directories = Folder(folder, self._fence, keep=keep, keep_every=keep_every, say=say)
        self._writer = Writer("checkpoint")
        self._writing: Path | None = None
        # the threads talk beside the training: in a group of their own nothing gets out of order
        group = dist.new_group(backend="gloo", timeout=_MESSAGE_TIMEOUT) if world_size > 1 else None
        self._threads = Together(rank, world_size, group)
        self._ranks = Together(rank, world_size)

    @property
    def in_flight(self) -> bool:
        """From :meth:`begin` until :meth:`poll` or :meth:`drain` has given the result."""
        return self._writer.in_flight

    @property
    def progress(self) -> int:
        """Bytes that this rank has written so far."""
        return self._writer.progress

    def begin(
        self, state: State | Callable[[], State], manifest: Manifest, *, release: Callable[[], None] = lambda: None
    ) -> None:
        """Begin to write this rank's state, in a thread, to be committed with all others'. All ranks do.

        Args:
            state: what `engine.state.read_state` gives, or a function that gives it, called in the thread. The tensors
                must not change before `release`.
            manifest: without run, start and files.
            release: called, from the thread, as soon as this rank's bytes are written or that has failed.
        """
        manifest = manifest.model_copy(update={"run": self._fence.run, "start": self._fence.number})
        self._writing = self._directories.partial(manifest.step)
        self._writer.begin(manifest.step, lambda: self._work(state, manifest, release))

    def poll(self) -> Saved | Failed | None:
        """The result of a write that has ended, once; never waits. Ranks get it at different times."""
        return self._writer.poll()

    def drain(self, beat: Callable[[], None] = lambda: None) -> Saved | Failed | None:
        """Wait for the write in flight; the result is the same on all ranks. None: it was taken already.

        Args:
            beat: called while some rank still writes.

        Raises:
            SupersededError: on all ranks; a newer start has taken over.
        """
        # every rank asks the file system for the sizes of all ranks' files
        return self._writer.drain(beat, self._seen, every=max(1.0, self._world_size / 50))

    def save(self, state: State, manifest: Manifest) -> Saved:
        """Write and commit while the caller waits. A collective.

        Raises:
            CheckpointError: on all ranks when one of them could not write; nothing is left behind.
            SupersededError: on all ranks; a newer start has taken over.
        """
        self.begin(state, manifest)
        result = self.drain()
        if isinstance(result, Failed):
            raise CheckpointError(result.reason)
        assert result is not None
        return result

    def newest(self, at_most: int | None = None) -> Path | None:
        """The newest committed checkpoint of this run's history, of at most a step; chosen by rank 0. A collective."""
        found: list[Path | None] = []
        name = self._ranks.first(
            lambda: found.append(self._directories.newest(at_most)), lambda: found[0].name if found[0] else None
        )
        return self.folder / name if name else None

    def load(
        self, directory: Path, shape: Shape | None = None, *, beat: Callable[[], None] = lambda: None
    ) -> tuple[Manifest, State]:
        """Verify all files and read this rank's part, converted where it was written in another shape. A collective.

        Args:
            shape: what this rank's part must look like; None: as it was written.
            beat: called after every chunk.

        Raises:
            DamagedError: on all ranks; names file and rank, what was expected and what was found.
            CheckpointError: on all ranks; it cannot be read or converted.
        """
        text: list[str] = []

        def look() -> None:
            manifest = read_manifest(directory)
            check_listing(directory, manifest)
            text.append(manifest.model_dump_json())

        manifest = Manifest.model_validate_json(self._ranks.first(look, lambda: text[0]))
        result: list[State] = []
        self._ranks.all(lambda: result.extend(self._checked(directory, manifest, shape, beat)))
        # only what all ranks have found whole is converted
        self._ranks.all(lambda: result.extend(_converted(directory, manifest, shape) if not result else ()))
        return manifest, result[0]

    def load_newest(
        self, shape: Shape | None = None, at_most: int | None = None, *, beat: Callable[[], None] = lambda: None
    ) -> tuple[Path, Manifest, State] | None:
        """The newest whole checkpoint of this run's history; damaged ones are said and put aside. A collective.

        Raises:
            CheckpointError: on all ranks; the newest whole one cannot be read or converted.
            SupersededError: on all ranks; a newer start has taken over.
        """
        while (directory := self.newest(at_most)) is not None:
            try:
                manifest, state = self.load(directory, shape, beat=beat)
            except DamagedError as error:
                reason = str(error)
            else:
                return directory, manifest, state
            self._ranks.first(lambda: self._directories.quarantine(directory, reason))  # noqa: B023 - called at once
        return None

    def abandon_after(self, step: int) -> None:
        """Checkpoints of later steps are of a history that was rolled back. Nothing may be in flight."""
        assert not self.in_flight, "drain before going back"
        if self._rank == 0:
            self._directories.abandon_after(step)

    def mark_healthy(self, step: int) -> None:
        """The steps after the checkpoint of `step`, committed or in flight, were clean."""
        if self._rank == 0:
            self._directories.mark_healthy(step)

    def mark_best(self, step: int, score: str, value: float) -> None:
        """The checkpoint of `step`, committed or in flight, is better than all before by a score."""
        if self._rank == 0:
            self._directories.mark_best(step, score, value)

    def forget_best(self) -> None:
        """No checkpoint is called best any more."""
        if self._rank == 0:
            self._directories.forget_best()

    def clean(self) -> None:
        """Remove what older starts have left unfinished; once this start has its number."""
        if self._rank == 0:
            self._directories.clean()

    def close(self) -> None:
        """A write that is in flight is given up."""
        self._writer.close()

    def _work(
        self, state: State | Callable[[], State], manifest: Manifest, release: Callable[[], None]
    ) -> Saved | Failed:
        """In the thread: write, agree, commit, agree."""
        began = time.perf_counter()
        step, partial = manifest.step, self._directories.partial(manifest.step)
        entries: list[FileEntry] = []
        releasing = ExitStack()
        releasing.callback(release)
        try:
            with releasing:
                self._threads.first(lambda: self._directories.prepare(step))
                listed = self._threads.all(
                    lambda: entries.extend(self._write(partial, state)), lambda: entries, releasing.close
                )
            complete = manifest.model_copy(update={"files": tuple(entry for part in listed for entry in part)})
            self._threads.first(lambda: self._commit(partial, complete))
        except TrimtabError as error:
            superseded = isinstance(error, SupersededError)
            if self._rank == 0:
                with suppress(OSError):
                    self._directories.remove(partial)
            return Failed(step, f"the checkpoint of step {step} could not be written: {error}", superseded)
        if self._rank == 0:
            self._directories.tidy()
        return Saved(step, name_of(step), complete.num_bytes, time.perf_counter() - began)

    def _write(self, partial: Path, state: State | Callable[[], State]) -> list[FileEntry]:
        if self._shard != self._rank:
            return []
        # rank 0 has made it; another node's file system may not know that yet, but does once it is asked to make it
        partial.mkdir(exist_ok=True)
        self._moment("begin", partial)
        value = state() if callable(state) else state
        return write_shard(partial, self._shard, value, moment=self._moment, count=self._writer.count)

    def _commit(self, partial: Path, manifest: Manifest) -> None:
        content = halves(encode_manifest(manifest))
        write_file(partial / MANIFEST, content, moment=self._moment, count=self._writer.count)
        sync_directory(partial)
        directory = self._directories.commit(manifest, lambda path: self._moment("commit", path))
        self._moment("committed", directory)

    def _checked(
        self, directory: Path, manifest: Manifest, shape: Shape | None, beat: Callable[[], None]
    ) -> list[State]:
        """Compare this rank's share of the files; its part of the state, if that needs no conversion."""
        alike = self._replicated if manifest.stage == 0 else manifest.world_size == self._world_size
        if shape is not None:
            refuse_unconvertible(manifest, shape)
            alike = alike and shape.stage == manifest.stage
        elif not alike:
            raise CheckpointError(
                f"{directory} was written by {manifest.world_size} ranks in ZeRO {manifest.stage} and this start has "
                f"{self._world_size}; start as many, in the same stage"
            )
        if not alike:
            for entry in manifest.files[self._rank :: self._world_size]:
                check_file(directory, entry, _PATIENCE_SECONDS, beat)
            return []
        state = read_shard(directory, manifest.files, self._shard, patience=_PATIENCE_SECONDS, beat=beat)
        if shape is not None and state[1].get("fragments") != list(shape.fragments):
            return []
        return [state]

    def _seen(self) -> int:
        """Bytes of the checkpoint in flight, of all ranks."""
        total = self.progress
        if self._writing is not None:
            with suppress(OSError):
                total += sum(path.stat().st_size for path in self._writing.iterdir())
        return total


def _converted(directory: Path, manifest: Manifest, shape: Shape | None) -> list[State]:
    assert shape is not None
    return [reshard(directory, manifest, shape)]
