"""Where the states of a run are kept, and how one is put back: on disk, in the memory of the nodes, in host memory."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.elastic import Shape
from trainer.checkpoint.manifest import Manifest, name_of, read_manifest, step_of
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.store import CheckpointStore
from trainer.config.memory import copies, shortage, snapshot_bytes
from trainer.config.resolve import fingerprint
from trainer.engine.injection import Injector
from trainer.engine.snapshot import SnapshotRing
from trainer.engine.state import read_shape, write_state
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError, DamagedError, TrimtabError
from trainer.recovery import Notes
from trainer.stages.build import Setting
from trainer.telemetry.recorder import Level

Say = Callable[[Level, str], None]
State = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Resumed:
    """The state that a start goes on from."""

    manifest: Manifest
    from_memory: bool
    """It was a copy in the memory of the nodes."""
    guard: dict[str, Any]
    """Its `history` and its `ladder`."""
    newest: str | None
    """The newest checkpoint on disk, relative to the run directory; None: there is none yet."""
    seconds: float
    """That finding, checking and loading took."""


class Storage:
    """The states of one run, seen by one rank.

    Args:
        flush: called before a checkpoint is committed: what was told before it is on disk then.
        say: told what a person must hear.
    """

    def __init__(self, setting: Setting, engine: Engine, injector: Injector, *, flush: Callable[[], None], say: Say):
        self._setting, self._engine, self._say = setting, engine, say
        config, ranks = setting.config, setting.ranks

        def moment(name: str, path: Path) -> None:
            if name == "commit":
                flush()
            injector.moment(name, path)

        self.store = CheckpointStore(
            setting.files.checkpoints,
            rank=ranks.rank,
            world_size=ranks.world_size,
            replicated=engine.stage == 0,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            fence=setting.fence,
            moment=moment,
            say=say,
        )
        self.memory: MemoryTier | None = None
        if config.checkpoint.memory_every is not None:
            # of each rank's own memory: the others' ledger is rank 0's
            own_say = say if ranks.is_first else lambda _level, text: print(text, file=sys.stderr, flush=True)
            self.memory = MemoryTier(
                rank=ranks.rank,
                world_size=ranks.world_size,
                stage=engine.stage,
                place=setting.files.root,
                fence=setting.fence,
                say=own_say,
            )
        self._shape = Shape(**read_shape(engine))
        self._beat = partial(setting.heartbeat.beat, "loading")

    def resume(self) -> Resumed | None:
        """Put the newest whole state of the run into the engine; None: there is none. A collective.

        Raises:
            CheckpointError: there is one, and it belongs to another config, other data, or cannot be converted.
        """
        began = time.perf_counter()
        self._beat()
        newest = self.store.newest()
        if newest is not None:
            # before anything of it is read; a manifest that is damaged is dealt with below
            with contextlib.suppress(DamagedError):
                self._check(newest.name, read_manifest(newest))
        found = self._from_memory((step_of(newest.name) if newest else None) or 0)
        from_memory = found is not None
        if found is None and (loaded := self.store.load_newest(self._shape, beat=self._beat)) is not None:
            newest, found = loaded[0], loaded[1:]
        if found is None:
            self._goes_on(0, 0)
            return None
        manifest, (tensors, numbers) = found
        self._check(f"the state of step {manifest.step}", manifest)
        write_state(self._engine, tensors, numbers)
        self._goes_on(manifest.start, manifest.step)
        if (manifest.world_size, manifest.stage) != (self._shape.world_size, self._shape.stage):
            self._say(
                "info",
                f"{name_of(manifest.step)} was written by {manifest.world_size} ranks in ZeRO {manifest.stage} and "
                f"goes on with {self._shape.world_size} in ZeRO {self._shape.stage}",
            )
        on_disk = f"checkpoints/{newest.name}" if newest else None
        return Resumed(manifest, from_memory, numbers["guard"], on_disk, time.perf_counter() - began)

    def load_at_most(self, step: int) -> Notes | None:
        """Put the newest checkpoint of at most `step` into the live engine, for a rollback. A collective."""
        found = self.store.load_newest(self._shape, at_most=step, beat=self._beat)
        if found is None:
            return None
        _, manifest, (tensors, numbers) = found
        write_state(self._engine, tensors, numbers)
        position = {"step": manifest.step, "next_batch": manifest.next_batch}
        return {"position": position, "history": numbers["guard"]["history"]}

    def make_ring(self) -> SnapshotRing | None:
        """Room for copies in host memory, where they are wanted and fit on every node. A collective."""
        config = self._setting.config
        keep, spare = copies(config)
        if not keep + spare:
            return None
        num_elements = sum(flat.numel() for flat in self._engine.shards.flats())
        on_node = int(os.environ.get("LOCAL_WORLD_SIZE", config.cluster.ranks_per_node))
        shortages: list[str | None] = [None] * self._setting.ranks.world_size
        dist.all_gather_object(shortages, shortage(snapshot_bytes(config, num_elements), on_node))
        for rank, text in enumerate(shortages):
            if text is not None:
                self._say(
                    "warning",
                    f"copies of the training state do not fit beside rank {rank} ({text}): a rollback will go to a "
                    "checkpoint on disk, and training waits while one is written; lower snapshots.keep to have them",
                )
                return None
        return SnapshotRing(self._engine, keep, config.snapshots.audit, spare)

    def _from_memory(self, newer_than: int) -> tuple[Manifest, State] | None:
        """The copy in the memory of the nodes, where it is newer than what lies on disk."""
        while self.memory is not None and (step := self.memory.newest()) is not None and step > newer_than:
            # a damaged one is said and dropped by then
            if (loaded := self.memory.load(step, beat=self._beat)) is not None:
                self._say("info", f"going on from the copy of step {step} in the memory of the nodes")
                return loaded
        return None

    def _check(self, name: str, manifest: Manifest) -> None:
        if manifest.config_fingerprint != fingerprint(self._setting.config):
            raise CheckpointError(f"{name} belongs to another config; use another name, or the config it began with")
        if manifest.data_fingerprint != self._setting.prepared.fingerprint:
            if not self._setting.config.data.accept_changed:
                raise CheckpointError(
                    f"{name} was trained on other data; restore the data, or set data.accept_changed=true"
                )
            self._say("warning", f"{name} was trained on other data, which data.accept_changed allows")

    def _goes_on(self, start: int, step: int) -> None:
        """From now on this is the history of the run: whatever else lies there does not belong to it."""
        box: list[TrimtabError | None] = [None]
        if self._setting.ranks.is_first:
            try:
                self._setting.fence.resumed(start, step)
            except TrimtabError as error:
                box[0] = error
        dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            raise box[0]
        self.store.abandon_after(step)
        if self.memory is not None:
            self.memory.abandon_after(step)
        self.store.clean()
