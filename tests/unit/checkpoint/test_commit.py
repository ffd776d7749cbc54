"""What becomes visible, and what does not: fences, kills at every instant, writes that fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoints import Said, make_manifest, make_state, make_store, same, save_steps

from trainer.checkpoint.manifest import committed_steps, is_healthy, name_of, read_manifest
from trainer.checkpoint.store import CheckpointStore, Failed, Saved
from trainer.config.files import RunFiles
from trainer.errors import CheckpointError, SupersededError
from trainer.starts import RunFence, begin


def there(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-0000000") for path in folder.iterdir())


def begin_from(files: RunFiles, start: int = 0, step: int = 0) -> RunFence:
    """The next start, going on from a checkpoint; 0, 0: from nothing."""
    fence = begin(files)
    fence.resumed(start, step)
    return fence


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


class Race(RunFence):
    """A start that is overtaken right after a look that found nothing."""

    def __init__(self, files: RunFiles, fence: RunFence, overtake: Callable[[], None], after: int):
        super().__init__(files, fence.number, fence.run)
        self._overtake, self._left = overtake, after

    def check(self) -> None:
        super().check()
        self._left -= 1
        if self._left == 0:
            self._overtake()


def test_run_and_start_are_those_of_the_fence(files: RunFiles) -> None:
    fence = begin_from(files)
    save_steps(make_store(files.checkpoints, fence=fence), 1)
    manifest = read_manifest(files.checkpoints / name_of(1))
    assert (manifest.run, manifest.start) == (fence.run, fence.number)


def test_a_superseded_start_commits_nothing_and_deletes_nothing(files: RunFiles) -> None:
    older = make_store(files.checkpoints, fence=begin_from(files), keep=1)
    save_steps(older, 1)
    newer = begin_from(files, 1, 1)
    older.begin(make_state(2), make_manifest(2))
    with pytest.raises(SupersededError):
        older.drain()
    assert there(files.checkpoints) == ["1"]
    save_steps(make_store(files.checkpoints, fence=newer, keep=1), 2)
    with pytest.raises(SupersededError):
        older.save(make_state(2), make_manifest(2))
    older.abandon_after(0)
    assert there(files.checkpoints) == ["1", "2"]
    assert read_manifest(files.checkpoints / name_of(2)).start == 2


def test_poll_leaves_it_to_drain_that_a_newer_start_has_taken_over(files: RunFiles) -> None:
    """All ranks drain at the same step; one that ended earlier would leave the others waiting."""
    older = make_store(files.checkpoints, fence=begin_from(files))
    begin_from(files)
    released = threading.Event()
    older.begin(make_state(1), make_manifest(1), release=released.set)
    released.wait()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    assert older.poll() is None
    assert older.in_flight
    with pytest.raises(SupersededError):
        older.drain()
    assert not older.in_flight


def test_overtaken_between_the_look_and_the_rename(files: RunFiles) -> None:
    """Whichever of the two renames comes first, the newer start's checkpoint is the one that stays."""
    first = begin_from(files)

    def overtake() -> None:
        second = begin_from(files)
        save_steps(make_store(files.checkpoints, fence=second), 1)

    # 1st look: before writing; 2nd: before the commit
    store = make_store(files.checkpoints, fence=Race(files, first, overtake, after=2))
    with pytest.raises(SupersededError, match="already committed by start 2"):
        store.save(make_state(9), make_manifest(1))
    assert there(files.checkpoints) == ["1"]
    assert read_manifest(files.checkpoints / name_of(1)).start == 2


def test_overtaken_between_the_look_at_what_is_there_and_taking_it_away(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was grabbed turns out to be a newer start's: it is put back."""
    first = begin_from(files)
    store = make_store(files.checkpoints, fence=first)
    save_steps(store, 1)
    rename = Path.rename

    def overtaking(path: Path, target: Path) -> Path:
        if path.name == name_of(1) and ".replaced-0001" in target.name:
            monkeypatch.setattr(Path, "rename", rename)
            second = begin_from(files)
            save_steps(make_store(files.checkpoints, fence=second), 1)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", overtaking)
    with pytest.raises(SupersededError):
        store.save(make_state(9), make_manifest(1))
    assert there(files.checkpoints) == ["1"]
    assert read_manifest(files.checkpoints / name_of(1)).start == 2


def test_overtaken_between_commit_and_retention(files: RunFiles) -> None:
    """The newer start chose before the commit, and may be reading what retention would delete."""
    first = begin_from(files)
    save_steps(make_store(files.checkpoints, fence=first, keep=1), 1)
    store = make_store(files.checkpoints, fence=Race(files, first, lambda: begin_from(files) and None, after=2), keep=1)
    save_steps(store, 2)
    assert there(files.checkpoints) == ["1", "2"]


def test_late_commits_of_a_cut_off_start_are_no_part_of_the_history(files: RunFiles) -> None:
    said: Said = []
    first = begin_from(files)
    store = make_store(files.checkpoints, fence=first)
    save_steps(store, 1, 2)
    second = begin_from(files, 1, 1)
    newer = make_store(files.checkpoints, said, fence=second)
    found = newer.newest()
    assert found is not None
    assert found.name == name_of(1)
    assert "step-00000002 was written by an older start" in said[0][1]
    save_steps(newer, 3)
    assert there(files.checkpoints) == ["1", "3"]


def test_another_run_s_checkpoints_are_neither_used_nor_deleted(files: RunFiles, tmp_path: Path) -> None:
    said: Said = []
    other = RunFiles(tmp_path / "other")
    other.root.mkdir()
    fence = begin_from(files)
    save_steps(make_store(other.checkpoints, fence=begin_from(other)), 1, 2, 3)
    shutil.copytree(other.checkpoints, files.checkpoints)
    store = make_store(files.checkpoints, said, fence=fence, keep=1)
    assert store.newest() is None
    save_steps(store, 2)
    assert there(files.checkpoints) == ["1", "2", "2.foreign", "3"]
    assert [text.partition(" ")[0].rpartition("-")[2] for _, text in said] == [
        "00000003",
        "00000002",
        "00000001",
        "00000002",
    ]


def test_an_abandoned_history_goes_after_the_next_commit(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save_steps(store, 1, 2, 3)
    store.mark_healthy(3)
    store.abandon_after(1)
    assert there(tmp_path) == ["1", "2.abandoned", "3.abandoned"]
    assert store.newest() == tmp_path / name_of(1)
    save_steps(store, 2)
    store.abandon_after(1)
    save_steps(store, 3)
    assert there(tmp_path) == ["1", "3"]
    assert not is_healthy(tmp_path / name_of(3))


def test_healthy_ones_stay_also_where_they_are_marked_before_the_commit(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=1)
    save_steps(store, 1)
    hold, held = threading.Event(), threading.Event()

    def state() -> object:
        held.set()
        hold.wait()
        return make_state(2)

    store.begin(state, make_manifest(2))  # type: ignore[arg-type]
    held.wait()
    store.mark_healthy(2)
    hold.set()
    assert isinstance(store.drain(), Saved)
    save_steps(store, 3)
    assert there(tmp_path) == ["2", "3"]
    store.mark_healthy(3)
    save_steps(store, 4)
    assert there(tmp_path) == ["3", "4"]


def test_permanent_ones_stay(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=1, keep_every=3)
    store.mark_healthy(8)
    save_steps(store, *range(1, 9))
    assert there(tmp_path) == ["3", "6", "8"]


def test_killed_at_every_moment_of_a_save(tmp_path: Path) -> None:
    """The same step once more, then the next: whatever is loaded afterwards is whole, and the rest is cleaned up."""
    # a process of its own that forks: each child then has everything imported
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_checkpoints import save_and_die
for after in range(1, 99):
    child = os.fork()
    if child == 0:
        save_and_die(Path({str(tmp_path)!r}) / str(after), after)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -9:
        sys.exit(after if status == 0 else 255)
"""
    num_moments = subprocess.run([sys.executable, "-c", code], check=False).returncode - 1
    assert 20 < num_moments < 60
    seen = set()
    for after in range(1, num_moments + 2):
        folder = tmp_path / str(after)
        loaded = make_store(folder, keep=1).load_newest()
        assert loaded is not None
        _, manifest, state = loaded
        seen.add((manifest.step, state[1]["step"]))
        assert any(same(state, make_state(seed)) for seed in (1, 7, 2))
        store = make_store(folder, keep=1, fence=_Second())
        store.clean()
        store.mark_healthy(3)
        store.save(make_state(3), make_manifest(3))
        assert there(folder) == ["3"]
    assert seen == {(1, 1), (1, 7), (2, 2)}


class _Second:
    number = 2
    run = ""
    superseded = noticed = False

    def check(self) -> None:
        pass

    def admits(self, start: int, step: int) -> bool:
        return True


def test_killed_between_taking_the_old_one_away_and_the_rename(tmp_path: Path) -> None:
    save_steps(make_store(tmp_path), 1)
    (tmp_path / name_of(1)).rename(tmp_path / f"{name_of(1)}.replaced-0001")
    store = make_store(tmp_path)
    assert committed_steps(tmp_path) == []
    assert store.newest() == tmp_path / name_of(1)
    assert there(tmp_path) == ["1"]


def test_a_deletion_that_is_cut_short_leaves_no_half_under_a_valid_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: Said = []
    rmtree = shutil.rmtree

    def cut_short(path: Path) -> None:
        next(path.glob("rank-*")).unlink()
        raise OSError("cut short")

    store = make_store(tmp_path, said, keep=1)
    save_steps(store, 1)
    monkeypatch.setattr(shutil, "rmtree", cut_short)
    store.mark_healthy(2)
    save_steps(store, 2)
    assert there(tmp_path) == ["1.removed", "2"]
    assert said == [("warning", "an old checkpoint could not be deleted and takes up space: cut short")]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    store.mark_healthy(3)
    save_steps(store, 3)
    assert there(tmp_path) == ["3"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A real limit: a process that may not write files beyond a size."""
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_checkpoints import make_manifest, make_state, make_store, save_steps
from trainer.checkpoint.store import Failed
folder = Path({str(tmp_path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
released = []
store = make_store(folder)
save_steps(store, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
store.begin(make_state(2, 10_000), make_manifest(2), release=lambda: released.append(1))
failed = store.drain()
assert isinstance(failed, Failed) and not failed.superseded, failed
assert released == [1]
print(failed.step, failed.reason)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(store.save(make_state(3), make_manifest(3)).name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failed, saved = done.stdout.splitlines()
    assert failed == "2 the checkpoint of step 2 could not be written: rank 0: [Errno 27] File too large"
    assert saved == "step-00000003"
    assert there(tmp_path) == ["1", "3"]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step 1 could not be written: rank 0: .*Not a directory"):
        make_store(tmp_path / "checkpoints").save(make_state(1), make_manifest(1))
    released: list[int] = []
    store = make_store(tmp_path / "checkpoints")
    store.begin(make_state(1), make_manifest(1), release=lambda: released.append(1))
    assert isinstance(store.drain(), Failed)
    # nothing was ever written, and what waits for it must go on all the same
    assert released == [1]


def test_an_error_that_nobody_thought_of_is_told_too(tmp_path: Path) -> None:
    def broken() -> object:
        raise ZeroDivisionError("by chance")

    store = make_store(tmp_path)
    store.begin(broken, make_manifest(1))  # type: ignore[arg-type]
    failed = store.drain()
    assert isinstance(failed, Failed)
    assert failed.reason.endswith("rank 0: ZeroDivisionError: by chance")
    assert there(tmp_path) == []


def test_training_goes_on_while_bytes_are_being_written(tmp_path: Path) -> None:
    """`begin` returns, `poll` does not wait, `release` comes before the commit, `drain` gives the result once."""
    go, released = threading.Event(), threading.Event()
    order: list[str] = []

    def moment(name: str, path: Path) -> None:
        if name == "begin":
            go.wait()
        order.append(name)

    def release() -> None:
        order.append("release")
        released.set()

    store: CheckpointStore = make_store(tmp_path, moment=moment)
    store.begin(make_state(1), make_manifest(1), release=release)
    assert store.in_flight
    assert store.poll() is None
    assert (store.progress, committed_steps(tmp_path)) == (0, [])
    with pytest.raises(AssertionError, match="drain the one before"):
        store.begin(make_state(2), make_manifest(2))
    go.set()
    released.wait()
    saved = store.drain()
    assert isinstance(saved, Saved)
    assert (saved.step, saved.name) == (1, name_of(1))
    assert saved.num_bytes == read_manifest(tmp_path / name_of(1)).num_bytes
    assert saved.num_bytes < store.progress
    assert (store.drain(), store.poll(), store.in_flight) == (None, None, False)
    assert order.index("release") < order.index("commit") < order.index("committed")


def test_drain_shows_signs_of_life_only_while_bytes_are_written(tmp_path: Path) -> None:
    hold = threading.Event()
    beats: list[int] = []
    store = make_store(tmp_path, moment=lambda name, path: name == "commit" and hold.wait() and None)
    store.begin(make_state(1), make_manifest(1))

    def beat() -> None:
        beats.append(store.progress)

    waiting = threading.Thread(target=lambda: beats.append(-1) if store.drain(beat) else None)
    waiting.start()
    waiting.join(3.5)
    assert waiting.is_alive()
    hold.set()
    waiting.join()
    # it was looked three times and more, and nothing moved after the first or second look
    assert 1 <= len(beats) - 1 <= 2
    assert beats[-1] == -1
