"""Saving beside training: what is saved, when it counts as healthy, and what becomes of a save that fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import RankPool
from workload import make_batch, make_config, make_engine

from trainer.checkpoint.manifest import Manifest, committed_steps
from trainer.checkpoint.store import CheckpointStore
from trainer.config.schema import RunConfig
from trainer.engine.snapshot import SnapshotRing
from trainer.engine.state import read_state
from trainer.errors import SaveFailedError
from trainer.records import Position, Saved
from trainer.saving import Saver
from trainer.telemetry.silent import NoTelemetry

LR = 1e-2


class Heard(NoTelemetry):
    def __init__(self) -> None:
        self.saved: list[int] = []
        self.messages: list[str] = []

    def record_checkpoint(self, saved: Saved, seconds_blocked: float) -> None:
        self.saved.append(saved.step)

    def message(self, level: str, text: str) -> None:
        self.messages.append(f"{level}: {text}")


class Training:
    """An engine, its ring and its saver, one step at a time."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, folder: Path, moment: Callable[..., None]):
        self.config, self.rank, self.world_size, self.folder = config, rank, world_size, folder
        self.engine = make_engine(config, rank, world_size, dropout=0.1)
        snapshots = config.snapshots.every is not None
        self.ring = SnapshotRing(self.engine, keep=1 if snapshots else 0, audit=False, spare=1)
        self.heard = Heard()
        self.position = Position()
        store = CheckpointStore(
            folder,
            rank=rank,
            world_size=world_size,
            replicated=self.engine.stage == 0,
            keep=config.checkpoint.keep,
            moment=moment,
        )
        self.store = store
        self.saver = Saver(
            self.engine,
            store,
            self.heard,
            config=config.checkpoint,
            memory=None,
            ring=self.ring,
            describe=self.describe,
            notes=lambda: {"at": [self.position.step]},
            resumed=None,
            newest=None,
            clean_steps=config.guard.clean_steps,
            beat=lambda: None,
        )

    def describe(self, position: Position) -> Manifest:
        return Manifest(
            step=position.step,
            attempt=position.attempt,
            next_batch=position.next_batch,
            quarantine=(),
            world_size=self.world_size,
            stage=self.engine.stage,
            global_batch=self.config.batch.samples,
            config_fingerprint="c",
            data_fingerprint="d",
            parameters=self.engine.names,
            files=(),
        )

    def step(self, *, in_incident: bool = False) -> None:
        index = self.position.step
        batch = make_batch(self.config, index, self.rank, self.world_size)
        self.engine.accumulate(batch, attempt=index + 1, step=index + 1)
        self.saver.waited(self.ring.fence())
        self.engine.apply(self.config.optim.clip, LR)
        self.position = Position(index + 1, index + 1, index + 1)
        self.saver.look(applied=True, in_incident=in_incident, step=index + 1)
        if self.config.snapshots.every and (index + 1) % self.config.snapshots.every == 0:
            self.ring.take(index + 1, {})
        self.saver.due(self.position)

    def live(self) -> dict[str, Any]:
        tensors, _ = read_state(self.engine)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def close(self) -> None:
        self.saver.close()
        self.ring.close()


def written_later(rank: int, world_size: int, config: RunConfig, folder: Path) -> Any:
    """The thread may write only after training has gone on by two steps."""
    gate = threading.Event()
    training = Training(config, rank, world_size, folder, lambda name, path: gate.wait() if name == "begin" else None)
    for _ in range(3):
        training.step()
    then = training.live()
    for _ in range(2):
        training.step()
    in_flight = training.store.in_flight, committed_steps(folder)
    gate.set()
    training.step()
    training.saver.finish(training.position, completed=True)
    training.saver.finish(training.position, completed=True)
    heard = training.heard.saved
    saved = {}
    for step in (3, 6):
        _, (tensors, numbers) = training.store.load(folder / f"step-{step:08d}")
        saved[step] = tensors, numbers["guard"]
    same = all(torch.equal(then[name], saved[3][0][name].view(then[name].shape)) for name in then)
    newest = training.live()
    same_again = all(torch.equal(newest[name], saved[6][0][name].view(newest[name].shape)) for name in newest)
    training.close()
    return in_flight, heard, same, same_again, [saved[3][1], saved[6][1]]


@pytest.mark.parametrize("snapshots", [None, 3], ids=["own copy", "shared with the snapshot"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_while_a_state_is_written(
    two_ranks: RankPool, tmp_path: Path, stage: int, snapshots: int | None
) -> None:
    config = make_config(zero={"stage": stage}, checkpoint={"every": 3, "keep": 2}, snapshots={"every": snapshots})
    for result in two_ranks(written_later, config=config, folder=tmp_path / "c"):
        in_flight, heard, same, same_again, notes = result
        assert in_flight == (True, [])
        assert heard == [3, 6], "the state at the end was saved already, and not again"
        assert same
        assert same_again
        assert notes == [{"at": [3]}, {"at": [6]}]


def refused_writes(rank: int, world_size: int, config: RunConfig, folder: Path, refused: list[int]) -> Any:
    """The disk of the last rank is full at the saves of some steps."""

    def moment(name: str, path: Path) -> None:
        step = int(path.parent.name.split(".")[0].removeprefix("step-")) if name == "chunk" else 0
        if rank == world_size - 1 and step in refused:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    training = Training(config, rank, world_size, folder, moment)
    ended = None
    try:
        for _ in range(9):
            training.step()
        training.saver.finish(training.position, completed=True)
    except SaveFailedError as error:
        ended = str(error)
    # rank 0 removes older ones after all have heard of the commit
    torch.distributed.barrier()
    training.close()
    return training.position.step, ended, training.heard.saved, training.heard.messages, committed_steps(folder)


def test_a_failed_save_is_said_and_training_goes_on(two_ranks: RankPool, tmp_path: Path) -> None:
    config = make_config(checkpoint={"every": 2, "keep": 2, "max_failures": 2})
    results = two_ranks(refused_writes, config=config, folder=tmp_path / "c", refused=[4, 6])
    for step, ended, saved, messages, steps in results:
        assert (step, ended, saved) == (9, None, [2, 8, 9])
        assert steps == [2, 8, 9], "the first one stays until it or a later one is proven healthy"
        assert [text[:26] for text in messages] == ["error: no checkpoint at st"] * 2
        for part in ("step 4", "rank 1", "No space left"):
            assert part in messages[0]
    assert not [path for path in (tmp_path / "c").iterdir() if "partial" in path.name]


def test_too_many_failed_saves_end_the_run_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    config = make_config(checkpoint={"every": 2, "keep": 2, "max_failures": 1})
    results = two_ranks(refused_writes, config=config, folder=tmp_path / "c", refused=[4, 6, 8])
    for step, ended, saved, _, steps in results:
        # the save of step 6 is the second that failed; it is heard of when the next is due
        assert (step, saved, steps) == (8, [2], [2])
        assert ended is not None
        assert "2 saves in a row have failed" in ended
        assert "step-00000002" in ended


def test_a_last_save_that_fails_ends_the_run_as_crashed(two_ranks: RankPool, tmp_path: Path) -> None:
    config = make_config(checkpoint={"every": 4, "keep": 2})
    for step, ended, _, _, steps in two_ranks(refused_writes, config=config, folder=tmp_path / "c", refused=[9]):
        assert (step, steps) == (9, [4, 8])
        assert ended is not None
        assert "could not be saved at step 9" in ended


def proven(rank: int, world_size: int, config: RunConfig, folder: Path) -> Any:
    """Checkpoints of steps 2, 4 and 6; an incident at steps 5 and 6."""
    training = Training(config, rank, world_size, folder, lambda name, path: None)

    def healthy() -> list[int]:
        return [step for step in committed_steps(folder) if (folder / f"step-{step:08d}" / "healthy").exists()]

    seen = []
    for step in range(1, 10):
        training.step(in_incident=step in (5, 6))
        training.saver.settle()
        torch.distributed.barrier()
        seen.append(healthy())
        torch.distributed.barrier()
    training.close()
    return seen


def test_a_checkpoint_is_healthy_once_clean_steps_followed_it(two_ranks: RankPool, tmp_path: Path) -> None:
    config = make_config(checkpoint={"every": 2, "keep": 9}, guard={"clean_steps": 2})
    for seen in two_ranks(proven, config=config, folder=tmp_path / "c"):
        assert seen == [[], [], [], [2], [2], [2], [2], [2, 4, 6], [2, 4, 6]]


def proven_without_another(rank: int, world_size: int, config: RunConfig, folder: Path) -> Any:
    training = Training(config, rank, world_size, folder, lambda name, path: None)
    for _ in range(7):
        training.step()
    training.saver.settle()
    torch.distributed.barrier()
    training.close()
    return (folder / "step-00000004" / "healthy").exists()


def test_a_checkpoint_is_proven_before_the_next_one_is_due(two_ranks: RankPool, tmp_path: Path) -> None:
    config = make_config(checkpoint={"every": 4}, guard={"clean_steps": 2})
    assert two_ranks(proven_without_another, config=config, folder=tmp_path / "c") == [True, True]


def gone_back(rank: int, world_size: int, config: RunConfig, folder: Path) -> Any:
    training = Training(config, rank, world_size, folder, lambda name, path: None)
    for _ in range(5):
        training.step()
    # to step 3: the checkpoint of step 4 belongs to no run
    training.saver.settle()
    training.saver.went_back(3)
    torch.distributed.barrier()
    left = committed_steps(folder)
    torch.distributed.barrier()
    training.position = Position(3, 5, 3)
    training.step()
    training.saver.finish(training.position, completed=False)
    manifest, _ = training.store.load(folder / "step-00000004")
    torch.distributed.barrier()
    training.close()
    return left, committed_steps(folder), manifest.attempt


def test_a_rollback_takes_back_what_was_saved_after_it(two_ranks: RankPool, tmp_path: Path) -> None:
    config = make_config(checkpoint={"every": 2, "keep": 9})
    for left, steps, attempt in two_ranks(gone_back, config=config, folder=tmp_path / "c"):
        assert left == [2]
        assert steps == [2, 4]
        assert attempt == 4


def left_with_nothing(rank: int, world_size: int, config: RunConfig, folder: Path) -> Any:
    training = Training(config, rank, world_size, folder, lambda name, path: None)
    for _ in range(4):
        training.step()
    training.saver.settle()
    training.saver.went_back(2)
    training.position = Position(2, 4, 2)
    for _ in range(2):
        training.step()
    training.saver.settle()
    torch.distributed.barrier()
    training.close()
    return committed_steps(folder)


def test_with_nothing_left_on_disk_the_next_step_is_saved(two_ranks: RankPool, tmp_path: Path) -> None:
    config = make_config(checkpoint={"every": 4, "keep": 9})
    for steps in two_ranks(left_with_nothing, config=config, folder=tmp_path / "c"):
        assert steps == [3, 4]
