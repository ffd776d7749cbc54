"""Copies in the memory of the nodes: used only where every rank has its own of the same moment, whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import RankPool

from trainer.checkpoint.manifest import Manifest, name_of
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.store import State
from trainer.checkpoint.writer import Failed
from trainer.config.files import RunFiles
from trainer.errors import CheckpointError
from trainer.records import Saved
from trainer.starts import RunFence, begin


def manifest(step: int, world_size: int, attempt: int | None = None) -> Manifest:
    return Manifest(
        step=step,
        attempt=step if attempt is None else attempt,
        next_batch=step,
        quarantine=(),
        world_size=world_size,
        stage=2,
        global_batch=8,
        config_fingerprint="c",
        data_fingerprint="d",
        parameters=(),
        files=(),
    )


def state(step: int, rank: int) -> State:
    return {"flat.0.master": torch.full((50_000,), float(10 * step + rank))}, {"rank": rank, "step": step}


def tier_of(rank: int, world_size: int, folder: Path, fence: Any, **options: Any) -> MemoryTier:
    values = {"stage": 2, **options}
    return MemoryTier(folder, rank=rank, world_size=world_size, fence=fence, ranks_on_node=world_size, **values)


def keep(
    rank: int, world_size: int, root: Path, number: int, run: str, steps: list[int], attempt: int = 0
) -> list[str]:
    """Copies of some steps; the names of what is there then."""
    tier = tier_of(rank, world_size, root / "shm", RunFence(RunFiles(root), number, run))
    released: list[int] = []
    for number_of_copies, step in enumerate(steps, 1):
        tier.begin(
            lambda step=step: state(step, rank),
            manifest(step, world_size, step + attempt),
            release=lambda: released.append(1),
        )
        saved = tier.drain()
        assert isinstance(saved, Saved)
        assert len(released) == number_of_copies
    tier.close()
    return sorted(path.name for path in tier.folder.iterdir())


def find(rank: int, world_size: int, root: Path, number: int, run: str, **options: Any) -> Any:
    """(newest step, value and rank in the copy, how often something was said), by a process that starts anew."""
    said: list[str] = []
    fence = RunFence(RunFiles(root), number, run)
    tier = tier_of(rank, world_size, root / "shm", fence, say=lambda level, text: said.append(text), **options)
    step = tier.newest()
    if step is None:
        return None
    loaded = tier.load(step)
    if loaded is None:
        return step, said[0], tier.newest()
    found, (tensors, numbers) = loaded
    return step, found.step, tensors["flat.0.master"][-1].item(), numbers["rank"]


@pytest.fixture
def fence(tmp_path: Path) -> RunFence:
    first = begin(RunFiles(tmp_path))
    first.resumed(0, 0)
    return first


@pytest.fixture
def known(tmp_path: Path, fence: RunFence) -> dict[str, Any]:
    return {"root": tmp_path, "number": fence.number, "run": fence.run}


def rank_folder(known: dict[str, Any], rank: int) -> Path:
    [base] = (known["root"] / "shm").iterdir()
    return Path(base / known["run"] / f"rank-{rank:05d}")


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path) -> None:
    (tmp_path / "shm").mkdir()


def test_the_newest_two_stay_and_come_back(two_ranks: RankPool, known: dict[str, Any]) -> None:
    assert two_ranks(keep, **known, steps=[1, 2, 3]) == [["step-00000002", "step-00000003"]] * 2
    assert two_ranks(find, **known) == [(3, 3, 30.0, 0), (3, 3, 31.0, 1)]


def test_where_one_rank_lacks_the_newest_the_one_before_is_used(two_ranks: RankPool, known: dict[str, Any]) -> None:
    two_ranks(keep, **known, steps=[1, 2])
    directory = rank_folder(known, 1) / name_of(2)
    directory.rename(directory.with_name(f"{name_of(2)}.partial-0001"))
    assert two_ranks(find, **known) == [(1, 1, 10.0, 0), (1, 1, 11.0, 1)]
    shutil.rmtree(rank_folder(known, 1))
    assert two_ranks(find, **known) == [None, None]


def test_a_damaged_copy_is_dropped_on_all_ranks(two_ranks: RankPool, known: dict[str, Any]) -> None:
    two_ranks(keep, **known, steps=[1, 2])
    shard = rank_folder(known, 0) / name_of(2) / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for step, said, newest in two_ranks(find, **known):
        assert (step, newest) == (2, 1)
        assert "rank-00000.safetensors has hash" in said
    assert two_ranks(find, **known) == [(1, 1, 10.0, 0), (1, 1, 11.0, 1)]


def test_copies_of_another_shape_or_run_are_none(two_ranks: RankPool, known: dict[str, Any]) -> None:
    two_ranks(keep, **known, steps=[1])
    assert two_ranks(find, **known, stage=3) == [None, None]
    assert two_ranks(find, **known | {"run": "f" * 32}) == [None, None]


def test_copies_of_a_history_that_was_cut_off_are_none(two_ranks: RankPool, known: dict[str, Any]) -> None:
    two_ranks(keep, **known, steps=[1, 2])
    second = begin(RunFiles(known["root"]))
    second.resumed(1, 1)
    newer = known | {"number": second.number}
    assert two_ranks(find, **newer) == [(1, 1, 10.0, 0), (1, 1, 11.0, 1)]
    # and the start that goes on from there does not keep them
    assert two_ranks(keep, **newer, steps=[2, 3]) == [["step-00000002", "step-00000003"]] * 2
    assert two_ranks(keep, **newer, steps=[2]) == [["step-00000002"]] * 2


def keep_two_moments(rank: int, world_size: int, root: Path, number: int, run: str) -> None:
    """Step 2 on both ranks, and on one of them once more, after a rollback."""
    keep(rank, world_size, root, number, run, [1, 2])
    if rank == 1:
        keep(rank, world_size, root, number, run, [2], attempt=5)


def test_copies_of_the_same_step_but_of_two_moments_do_not_mix(two_ranks: RankPool, known: dict[str, Any]) -> None:
    two_ranks(keep_two_moments, **known)
    assert two_ranks(find, **known) == [(1, 1, 10.0, 0), (1, 1, 11.0, 1)]


def superseded(rank: int, world_size: int, root: Path, number: int, run: str) -> Any:
    """A superseded start on the same node leaves the newer one's copies alone."""
    tier = tier_of(rank, world_size, root / "shm", RunFence(RunFiles(root), number, run))
    tier.begin(state(9, rank), manifest(9, world_size))
    result = tier.drain()
    assert isinstance(result, Failed)
    return sorted(path.name for path in tier.folder.iterdir())


def test_a_superseded_start_writes_nothing(two_ranks: RankPool, known: dict[str, Any]) -> None:
    second = begin(RunFiles(known["root"]))
    second.resumed(0, 0)
    two_ranks(keep, **known | {"number": second.number}, steps=[1, 2])
    assert two_ranks(superseded, **known) == [["step-00000001", "step-00000002"]] * 2


def roll_back(rank: int, world_size: int, root: Path, number: int, run: str) -> Any:
    tier = tier_of(rank, world_size, root / "shm", RunFence(RunFiles(root), number, run))
    tier.begin(state(3, rank), manifest(3, world_size))
    # waits for what is in flight by itself
    tier.abandon_after(2)
    assert not tier.in_flight
    left = tier.newest()
    tier.clear()
    return left, tier.newest(), (root / "shm").exists(), tier.folder.exists()


def test_a_rollback_takes_later_copies_and_the_end_takes_all(two_ranks: RankPool, known: dict[str, Any]) -> None:
    two_ranks(keep, **known, steps=[1, 2])
    assert two_ranks(roll_back, **known) == [(2, None, True, False)] * 2


def too_large(rank: int, world_size: int, root: Path, number: int, run: str) -> Any:
    """Tensors that take no memory until they are written, and more than the machine has then."""
    said: list[str] = []
    fence = RunFence(RunFiles(root), number, run)
    tier = tier_of(rank, world_size, root / "shm", fence, say=lambda level, text: said.append(text))
    huge = torch.zeros(1).expand(1 << 50)
    results = []
    for step in (1, 2):
        tier.begin(({"flat.0.master": huge}, {}), manifest(step, world_size))
        results.append(isinstance(tier.drain(), Failed))
    return results, said, tier.newest()


def test_where_there_is_no_room_it_is_said_once_and_nothing_is_kept(two_ranks: RankPool, known: dict[str, Any]) -> None:
    for rank, (failed, said, newest) in enumerate(two_ranks(too_large, **known)):
        assert (failed, len(said), newest) == ([True, True], 1, None)
        assert f"rank {rank} keeps no copy of step 1 in memory: 27,021,597,764,222,976 bytes are needed" in said[0]


def test_somebody_else_s_folder_is_not_trusted(tmp_path: Path) -> None:
    """Open to others, it may hold what another user put there."""
    tier = MemoryTier(tmp_path / "shm", rank=0, world_size=1, stage=2)
    tier.begin(state(1, 0), manifest(1, 1))
    assert isinstance(tier.drain(), Saved)
    assert tier.newest() == 1
    [base] = (tmp_path / "shm").iterdir()
    assert base.stat().st_mode & 0o777 == 0o700
    base.chmod(0o777)
    with pytest.raises(CheckpointError, match="is not a folder of this user alone"):
        tier.newest()
    tier.begin(state(2, 0), manifest(2, 1))
    assert isinstance(tier.drain(), Failed)
