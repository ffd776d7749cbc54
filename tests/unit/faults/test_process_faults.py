"""Faults of processes, disks and checkpoints: in real processes, with real signals, files and kernel limits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trainer.config.files import RunFiles
from trainer.errors import ConfigError
from trainer.faults import parse_fault
from trainer.faults.process import STRUCK, ProcessFaults, damage, file_of_newest
from trainer.faults.sentence import Kind

BEGINNING = """
import os, signal, sys, threading
from pathlib import Path
from trainer.config.files import RunFiles
from trainer.faults import parse_fault
from trainer.faults.process import ProcessFaults

def faults(sentence, start=1, rank=0):
    return ProcessFaults(parse_fault(sentence).strikes, rank, start, RunFiles(Path(sys.argv[1])))

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


def process(tmp_path: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs the code; it has no agent, unless it is told so."""
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    return subprocess.Popen(
        [sys.executable, "-c", BEGINNING + textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | environment,
    )


def ended(tmp_path: Path, code: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of such a process; stdout is at its end only when every process that holds it has ended."""
    started = process(tmp_path, code, **environment)
    output, errors = started.communicate(timeout=30)
    assert "Traceback" not in errors, errors
    return started.returncode, output.splitlines()


def struck(tmp_path: Path) -> list[tuple[int, int, str]]:
    path = tmp_path / STRUCK
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(entry["rank"], entry["step"], entry["fault"]) for entry in entries]


@pytest.mark.parametrize(
    ("sentence", "start", "steps", "dies_at"),
    [
        ("at(step=3).kill()", 1, [1, 2, 3, 4], 3),
        ("at(step=3).kill()", 1, [8, 9], 8),
        ("at(step=3).kill()", 2, [1, 2, 3, 4], None),
        ("at(step=3, start=2).kill()", 2, [1, 2, 3, 4], 3),
        ("at(step=3, start=2).kill()", 1, [1, 2, 3, 4], None),
        ("at(step=3).kill().every_time()", 7, [2, 3], 3),
        ("at(step=3, visit=2).kill()", 1, [2, 3, 4, 2, 3], 3),
        ("at(step=3, visit=2).kill()", 1, [2, 3, 4, 5], None),
        ("at(step=3).kill_everything()", 1, [2, 3], 3),
    ],
)
def test_when_a_process_is_killed(
    tmp_path: Path, sentence: str, start: int, steps: list[int], dies_at: int | None
) -> None:
    code, lines = ended(
        tmp_path,
        f"""
        own = faults({sentence!r}, {start})
        for step in {steps}:
            own.begin(step)
            say(step)
        """,
    )
    survived = [str(step) for step in steps]
    if dies_at is None:
        assert (code, lines, struck(tmp_path)) == (0, survived, [])
    else:
        place = len(steps) - 1 - steps[::-1].index(dies_at)
        assert (code, lines) == (-signal.SIGKILL, survived[:place])
        assert struck(tmp_path) == [(0, dies_at, str(parse_fault(sentence)))]


def test_everything_is_the_agent_and_all_its_ranks(tmp_path: Path) -> None:
    """The rank that does not strike waits for ever and holds stdout: that it ends says that the rank is dead."""
    code, lines = ended(
        tmp_path,
        """
        signal.alarm(50)
        if os.fork() == 0:
            signal.alarm(50)
            signal.pause()
        if os.fork() == 0:
            faults("at(step=2).kill_everything()").begin(2)
        signal.pause()
        """,
        TORCHELASTIC_RUN_ID="1",
    )
    assert (code, lines) == (-signal.SIGKILL, [])
    assert struck(tmp_path) == [(0, 2, "at(step=2).kill_everything()")]


def test_without_an_agent_the_parent_is_spared(tmp_path: Path) -> None:
    code, lines = ended(
        tmp_path,
        """
        if (child := os.fork()) == 0:
            faults("at(step=2).kill_everything()").begin(2)
        say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    )
    assert (code, lines) == (0, ["-9"])


def test_a_stopped_process_stands_still_and_can_go_on(tmp_path: Path) -> None:
    started = process(
        tmp_path,
        """
        own = faults("at(step=2).stop()")
        for step in (1, 2, 3):
            own.begin(step)
        say("on")
        """,
    )
    _, status = os.waitpid(started.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert struck(tmp_path) == [(0, 2, "at(step=2, rank=0).stop()")]
    os.kill(started.pid, signal.SIGCONT)
    output, _ = started.communicate(timeout=60)
    assert (started.returncode, output) == (0, "on\n")


@pytest.mark.parametrize(("word", "number"), [("terminate", signal.SIGTERM), ("warn", signal.SIGUSR1)])
def test_requests_arrive_as_signals(tmp_path: Path, word: str, number: signal.Signals) -> None:
    code, lines = ended(
        tmp_path,
        f"""
        received = []
        signal.signal({int(number)}, lambda got, _: received.append(got))
        own = faults("at(step=2).{word}()")
        for step in (1, 2, 3):
            own.begin(step)
            say(step, *received)
        """,
    )
    assert (code, lines) == (0, ["1", f"2 {int(number)}", f"3 {int(number)}"])


@pytest.mark.parametrize(
    ("word", "moments_before"), [("kill_while_saving()", 1), ("kill_everything_while_saving(7)", 6)]
)
def test_a_kill_in_a_save_waits_for_its_moment(tmp_path: Path, word: str, moments_before: int) -> None:
    code, lines = ended(
        tmp_path,
        f"""
        own = faults("at(step=5).{word}")
        def save():
            for moment in ("begin", "chunk", "written", "commit", "committed"):
                own.moment()
                say(step, moment)
        for step in (4, 5, 6, 7):
            own.begin(step)
            thread = threading.Thread(target=save)
            thread.start()
            thread.join()
        """,
    )
    assert code == -signal.SIGKILL
    assert lines[:5] == [f"4 {moment}" for moment in ("begin", "chunk", "written", "commit", "committed")]
    assert len(lines) == 5 + moments_before


def test_a_warning_in_a_save_comes_once_at_its_moment(tmp_path: Path) -> None:
    code, lines = ended(
        tmp_path,
        """
        received = []
        signal.signal(signal.SIGUSR1, lambda got, _: received.append(got))
        own = faults("at(step=2).warn_while_saving(3)")
        for step in (1, 2, 3):
            own.begin(step)
            for moment in range(4):
                own.moment()
            say(step, len(received))
        """,
    )
    assert (code, lines) == (0, ["1 0", "2 1", "3 1"])


def test_a_slow_rank_computes_longer_in_its_steps(tmp_path: Path) -> None:
    code, lines = ended(
        tmp_path,
        """
        import time
        own = faults("at(step=2).slow(0.2, steps=2)")
        for step in (1, 2, 3, 4):
            before = time.thread_time()
            own.begin(step)
            say(step, time.thread_time() - before > 0.05)
        """,
    )
    assert (code, lines) == (0, ["1 False", "2 True", "3 True", "4 False"])


def checkpoint(folder: Path, name: str, ranks: int = 2) -> Path:
    directory = folder / "checkpoints" / name
    directory.mkdir(parents=True)
    for rank in range(ranks):
        (directory / f"rank-{rank:05d}.safetensors").write_bytes(bytes([rank + 1]) * 101)
    return directory


@pytest.mark.parametrize(
    ("word", "left"),
    [
        ("damage_checkpoint", b"\2" * 50 + b"\3" + b"\2" * 50),
        ("truncate_checkpoint", b"\2" * 50),
        ("delete_checkpoint_file", None),
    ],
)
def test_the_newest_committed_checkpoint_is_harmed_before_everything_dies(
    tmp_path: Path, word: str, left: bytes | None
) -> None:
    checkpoint(tmp_path, "step-00000004.partial-0001")
    code, lines = ended(
        tmp_path,
        f"""
        own = faults("at(step=2, rank=1).{word}()", rank=1)
        root = Path(sys.argv[1])
        for step in range(1, 9):
            own.begin(step)
            say(step)
            if step == 4:
                (root / "checkpoints/step-00000004.partial-0001").rename(root / "checkpoints/step-00000004")
        """,
    )
    assert (code, lines) == (-signal.SIGKILL, ["1", "2", "3", "4"]), "it waits until there is one"
    harmed = tmp_path / "checkpoints/step-00000004/rank-00001.safetensors"
    assert (harmed.read_bytes() if harmed.exists() else None) == left
    assert harmed.with_name("rank-00000.safetensors").read_bytes() == b"\1" * 101
    assert struck(tmp_path) == [(1, 5, f"at(step=2, rank=1).{word}()")]
    entry = json.loads((tmp_path / STRUCK).read_text())
    assert entry["file"] == "checkpoints/step-00000004/rank-00001.safetensors"


def test_which_file_is_harmed(tmp_path: Path) -> None:
    assert file_of_newest(tmp_path / "checkpoints", 0) is None
    checkpoint(tmp_path, "step-00000100.abandoned")
    assert file_of_newest(tmp_path / "checkpoints", 0) is None
    older = checkpoint(tmp_path, "step-00000020")
    checkpoint(tmp_path, "step-00000030", ranks=0)
    assert file_of_newest(tmp_path / "checkpoints", 1) == older / "rank-00001.safetensors"
    assert file_of_newest(tmp_path / "checkpoints", 5) == older / "rank-00000.safetensors", "replicated: rank 0's"
    damage(older / "rank-00000.safetensors", Kind.DELETE_CHECKPOINT_FILE)
    assert file_of_newest(tmp_path / "checkpoints", 0) == older / "rank-00001.safetensors"


def test_a_full_disk_refuses_what_is_beyond_a_page_and_recovers(tmp_path: Path) -> None:
    code, lines = ended(
        tmp_path,
        """
        own = faults("at(step=2).disk_is_full(steps=2)")
        file = os.open(Path(sys.argv[1]) / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        def write():
            written = []
            for _ in range(2):
                try:
                    written.append(os.write(file, bytes(3000)))
                except OSError as error:
                    written.append(-error.errno)
            say(step, *written)
        for step in (1, 2, 3, 2, 4, 5):
            own.begin(step)
            if step > 1:
                os.ftruncate(file, 0)
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
        """,
    )
    assert code == 0
    full = "3000 1096"
    assert lines == ["1 3000 3000", f"2 {full}", f"3 {full}", f"2 {full}", "4 3000 3000", "5 3000 3000"]
    code, lines = ended(
        tmp_path,
        """
        faults("at(step=2).disk_is_full(steps=2)").begin(2)
        try:
            (Path(sys.argv[1]) / "large").write_bytes(bytes(10000))
        except OSError as error:
            say(error.errno)
        """,
    )
    assert (code, lines) == (0, [str(errno.EFBIG)])


READ_ONLY = """
own = faults("at(step=2).checkpoints_are_read_only(steps=2)")
folder = Path(sys.argv[1]) / "checkpoints"
def save():
    try:
        (folder / f"step-{step}").mkdir()
        say(step, "saved")
    except PermissionError:
        say(step, "refused")
for step in range(1, LAST):
    own.begin(step)
    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
"""


def test_a_read_only_folder_refuses_and_recovers_for_root_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    code, lines = ended(tmp_path, READ_ONLY.replace("LAST", "6"))
    assert (code, lines) == (0, ["1 saved", "2 refused", "3 refused", "4 saved", "5 saved"])


def test_the_next_start_finds_the_folder_writable_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    code, lines = ended(tmp_path, READ_ONLY.replace("LAST", "3"))
    assert (code, lines) == (0, ["1 saved", "2 refused"])
    assert (tmp_path / "checkpoints").stat().st_mode & 0o222 == 0
    strikes = parse_fault("at(step=2).checkpoints_are_read_only(steps=2)").strikes
    ProcessFaults(strikes, 0, 2, RunFiles(tmp_path))
    assert (tmp_path / "checkpoints").stat().st_mode & 0o200


def test_the_thread_that_reads_dies_once(tmp_path: Path) -> None:
    own = ProcessFaults(parse_fault("at(step=2).data_worker_dies()").strikes, 0, 1, RunFiles(tmp_path))
    own.begin(1)
    own.reading()
    own.begin(2)
    with pytest.raises(RuntimeError, match=r"ended on purpose by at\(step=2, rank=0\)\.data_worker_dies\(\)"):
        own.reading()
    own.reading()
    assert struck(tmp_path) == [(0, 2, "at(step=2, rank=0).data_worker_dies()")]


def test_it_needs_a_run() -> None:
    with pytest.raises(ConfigError, match="strikes the processes of a run, and this is none"):
        ProcessFaults(parse_fault("at(step=2).kill()").strikes, 0, 1, None)
    assert ProcessFaults((), 0, 1, None).begin(3) is None
