"""Starts of a run: numbers that one process gets and no other, who is superseded, and which checkpoints count."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import exclusive
from trainer.__main__ import note_end
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError, SupersededError
from trainer.records import Outcome
from trainer.starts import NO_FENCE, RunFence, begin, lineage, newest, read_starts
from trainer.stop import StopRequest

DONE = Outcome("completed", 0, "all steps", 10, 10, None)


def other_machine(fence: RunFence, files: RunFiles) -> RunFence:
    """The same start, as a process sees it that was told number and identity."""
    return RunFence(files, fence.number, fence.run)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


def test_each_start_takes_the_next_number_of_one_run(files: RunFiles) -> None:
    first, second, third = begin(files), begin(files), begin(files)
    assert [fence.number for fence in (first, second, third)] == [1, 2, 3]
    assert first.run == second.run == third.run
    assert len(first.run) == 32
    assert sorted(path.name for path in (files.root / "starts").iterdir()) == ["0001.json", "0002.json", "0003.json"]
    assert newest(files) == 3


BEGIN_MANY = """
import sys
from pathlib import Path
from trainer.config.files import RunFiles
from trainer.starts import begin
sys.stdin.readline()
for _ in range(10):
    fence = begin(RunFiles(Path(sys.argv[1])))
    print(fence.number, fence.run)
"""


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_number_is_taken_by_one_of_many_processes(files: RunFiles, hard_links: bool) -> None:
    """All begin at once; where the file system has no hard links too."""
    (files.root / "starts").mkdir()
    without = "import os, errno\ndef link(*_): raise OSError(errno.ENOTSUP, 'no')\nos.link = link\n"
    if not hard_links:
        # one run for all: who makes its identity is told by hard links alone
        begin(files)
    code = ("" if hard_links else without) + BEGIN_MANY
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(files.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    lines = [line.split() for process in processes for line in process.communicate(timeout=60)[0].splitlines()]
    before = 0 if hard_links else 1
    assert sorted(int(number) for number, _ in lines) == list(range(1 + before, 41 + before))
    assert len({run for _, run in lines}) == 1


def test_an_older_start_is_superseded_everywhere_and_for_good(files: RunFiles) -> None:
    old = begin(files)
    elsewhere = other_machine(old, files)
    old.check()
    assert not elsewhere.superseded
    new = begin(files)
    for fence in (old, other_machine(old, files)):
        with pytest.raises(SupersededError, match=r"start 2 of .* has taken over \(process \d+ on .*start 1 is supers"):
            fence.check()
        assert fence.superseded
        assert fence.noticed
    new.check()
    assert not new.superseded
    shutil.rmtree(files.root / "starts")
    with pytest.raises(SupersededError, match="start 2 of"):
        old.check()


def test_looks_are_limited_in_time_but_a_commit_looks(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.starts.time.monotonic", lambda: now)
    old = begin(files)
    assert not old.superseded
    begin(files)
    assert not old.superseded
    assert not old.noticed
    now += 0.6
    assert not old.noticed
    assert old.superseded
    assert old.noticed
    now += 10
    again = RunFence(files, 1, old.run)
    shutil.rmtree(files.root / "starts")
    begin(files)
    with pytest.raises(SupersededError):
        again.check()


def test_a_directory_that_was_made_anew_is_not_this_runs(files: RunFiles) -> None:
    """`--fresh` moved the old one aside while a cut-off start was alive: its paths lead into the new run."""
    old = begin(files)
    files.root.rename(files.root.with_name("moved"))
    files.root.mkdir()
    assert old.superseded
    begin(files)
    elsewhere = RunFence(files, 1, old.run)
    with pytest.raises(SupersededError, match="no longer the directory of this run"):
        elsewhere.check()


def test_an_unreadable_directory_fails_a_commit_and_is_no_proof_of_a_newer_start(files: RunFiles) -> None:
    fence = begin(files)
    (files.root / "starts").rename(files.root / "away")
    (files.root / "starts").write_text("in the way")
    assert not fence.superseded
    with pytest.raises(NotADirectoryError):
        fence.check()
    with pytest.raises(RunDirectoryError, match="no start can be noted"):
        begin(files)


def test_only_what_this_start_goes_on_from_is_its_history(files: RunFiles) -> None:
    first = begin(files)
    first.resumed(0, 0)
    second = begin(files)
    assert second.admits(1, 60), "before it has chosen, all that start 1 wrote may be chosen"
    second.resumed(1, 50)
    assert (second.admits(1, 50), second.admits(1, 60)) == (True, False), "start 1 wrote it after start 2 had chosen"
    assert second.admits(2, 10**9)
    assert not second.admits(3, 1), "of a newer start"
    third = begin(files)
    assert (third.admits(1, 50), third.admits(1, 60), third.admits(2, 70)) == (True, False, True)
    third.resumed(1, 40)
    fourth = begin(files)
    for fence in (third, fourth):
        assert (fence.admits(1, 40), fence.admits(1, 50), fence.admits(2, 30)) == (True, False, False)
    assert fourth.admits(3, 41)
    assert read_starts(files).history.admits(3, 41)
    assert not read_starts(files).history.admits(2, 30)


def test_a_start_that_died_before_it_went_on_changes_no_history(files: RunFiles) -> None:
    begin(files)
    second = begin(files)
    assert not second.admits(1, 80), "start 1 had not gone on from anything, so it may have written nothing"
    second.resumed(0, 0)
    begin(files)
    fourth = begin(files)
    assert fourth.admits(2, 80)
    assert not fourth.admits(3, 80)


def test_what_newer_starts_do_does_not_change_an_older_ones_history(files: RunFiles) -> None:
    first = begin(files)
    first.resumed(0, 0)
    begin(files).resumed(1, 50)
    elsewhere = other_machine(first, files)
    assert (elsewhere.admits(1, 60), elsewhere.admits(2, 60)) == (True, False)


def test_a_start_goes_on_from_one_checkpoint_only(files: RunFiles) -> None:
    fence = begin(files)
    fence.resumed(0, 0)
    with pytest.raises(RunDirectoryError, match="one checkpoint only"):
        fence.resumed(0, 0)
    newer = begin(files)
    with pytest.raises(SupersededError):
        fence.resumed(0, 0)
    (files.root / "starts" / "0002.resumed.json").write_text('{"start": 2, "step": 5}')
    with pytest.raises(RunDirectoryError, match=r"0002\.resumed\.json is damaged"):
        newer.admits(1, 1)


@given(st.data())
def test_the_history_is_the_chain_of_what_was_gone_on_from(data: st.DataObject) -> None:
    """Against a model that keeps each history as the set of its checkpoints."""
    written: dict[int, set[tuple[int, int]]] = {}
    history: dict[int, set[tuple[int, int]]] = {0: set()}
    resumed: dict[int, tuple[int, int]] = {}
    for start in range(1, data.draw(st.integers(1, 6)) + 1):
        found = sorted(history[start - 1])
        chosen = data.draw(st.sampled_from([(0, 0), *found]))
        resumed[start] = chosen
        steps = data.draw(st.sets(st.integers(chosen[1] + 1, chosen[1] + 6), max_size=4))
        written[start] = {(start, step) for step in steps}
        # what was saved by the steps that it went on with is done again by this start, if at all
        kept = {(who, step) for who, step in history[start - 1] if step <= chosen[1]} if chosen[0] else set()
        history[start] = kept | written[start]
    head = max(resumed)
    admits = lineage(resumed, head).admits
    everything = set().union(*written.values())
    assert {checkpoint for checkpoint in everything if admits(*checkpoint)} == history[head]


def test_a_rollback_below_what_a_start_went_on_from_binds_those_after_it() -> None:
    """Start 2 went on from step 100, went back to 50 and saved 60, from which start 3 went on."""
    admits = lineage({1: (0, 0), 2: (1, 100), 3: (2, 60)}, 3).admits
    assert admits(1, 60)
    assert not admits(1, 100)


def test_lost_records_are_said_and_the_checkpoints_stay(files: RunFiles, capsys: pytest.CaptureFixture[str]) -> None:
    old = begin(files)
    checkpoint = files.checkpoints / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"run": old.run, "start": 4, "step": 10}))
    hostile = files.checkpoints / "step-00000020"
    hostile.mkdir()
    (hostile / "manifest.json").write_text(json.dumps({"run": "../../elsewhere", "start": 9, "step": 20}))
    shutil.rmtree(files.root / "starts")
    assert read_starts(files).history.admits(4, 10)
    new = begin(files, after=2)
    assert (new.run, new.number) == (old.run, 5)
    assert "starts is gone" in capsys.readouterr().err
    assert new.admits(4, 10)
    new.resumed(4, 10)
    assert (new.admits(4, 10), new.admits(4, 11), new.admits(5, 11)) == (True, False, True)
    assert begin(files).run == old.run


def test_the_ledgers_count_is_gone_on_with(files: RunFiles) -> None:
    assert begin(files, after=7).number == 8
    assert begin(files, after=7).number == 9


def test_a_file_is_placed_whole_by_one_of_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    barrier = threading.Barrier(8)
    placed: list[int] = []

    def place(number: int) -> None:
        barrier.wait()
        if exclusive.place(path, {"number": number}):
            placed.append(number)

    threads = [threading.Thread(target=place, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(placed) == 1
    assert exclusive.read(path) == {"number": placed[0]}
    assert [found.name for found in tmp_path.iterdir()] == ["one.json"]


def test_no_fence_admits_all() -> None:
    NO_FENCE.check()
    NO_FENCE.resumed(0, 0)
    assert NO_FENCE.admits(7, 10**9)
    assert not NO_FENCE.superseded


def outcome(files: RunFiles) -> tuple[str, int]:
    found = json.loads(files.outcome.read_text())
    return found["reason"], found["start"]


def test_an_outcome_is_the_newest_starts(files: RunFiles) -> None:
    old = begin(files)
    refused = Outcome("refused", 2, "bad config", 0, 0, None)
    assert note_end(files, refused)
    assert note_end(files, DONE, old), "one that never took a number is no start"
    assert outcome(files) == ("completed", 1)
    assert not note_end(files, refused, old), "the first of one start knows best"
    assert not note_end(files, refused)
    new = begin(files)
    with pytest.raises(SupersededError):
        note_end(files, refused, old)
    assert outcome(files) == ("completed", 1)
    assert note_end(files, refused, new), "what an older start left behind is replaced"
    assert outcome(files) == ("refused", 2)
    assert [path.name for path in files.root.iterdir() if "outcome" in path.name] == ["outcome.json"]


def test_the_loop_is_asked_to_stop_once_it_is_noticed(files: RunFiles) -> None:
    fence = begin(files)
    stop = StopRequest()
    assert not stop.requested
    stop.when(lambda: fence.noticed)
    assert not stop.requested
    begin(files)
    with pytest.raises(SupersededError):
        fence.check()
    assert stop.requested
    assert stop.signal_name is None
