"""Signs of life, stacks, watchdogs and the end of orphans: real processes, files and signals.

A child says on a pipe that it is ready; the end of the pipe says that it is gone.
"""

import contextlib
import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.heartbeat import (
    FOLDER_VARIABLE,
    LAUNCHER_VARIABLE,
    NoHeartbeat,
    SharedHeartbeat,
    prepare_beats,
    read_beats,
    stacks_path,
    watch_yourself,
)

ROOT = Path(__file__).parents[2]


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    """A Python process whose output is one pipe."""
    kept = {name: value for name, value in os.environ.items() if name not in (FOLDER_VARIABLE, LAUNCHER_VARIABLE)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def beats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for two ranks."""
    folder = tmp_path_factory.mktemp("beats")
    prepare_beats(folder, 2)
    yield folder
    faulthandler.unregister(signal.SIGUSR2)


@pytest.fixture(scope="module")
def heartbeat(beats: Path) -> SharedHeartbeat:
    assert [beat.pid for beat in read_beats(beats)] == [None, None]
    shared = SharedHeartbeat(beats, 1)
    zero, one = read_beats(beats)
    assert (zero.rank, zero.pid) == (0, None)
    assert (one.rank, one.pid, one.phase, one.step) == (1, os.getpid(), "starting", None)
    return shared


@given(
    phase=st.sampled_from(["starting", "loading", "computing", "evaluating", "saving", "ending"]),
    step=st.integers(0, (1 << 63) - 1),
)
def test_a_beat_reads_back_and_the_step_stays_until_the_next(
    beats: Path, heartbeat: SharedHeartbeat, phase: str, step: int
) -> None:
    before = read_beats(beats)[1].seconds
    heartbeat.beat("computing", step)
    heartbeat.beat(phase)
    zero, one = read_beats(beats)
    assert (one.rank, one.pid, one.phase, one.step) == (1, os.getpid(), phase, step)
    assert before < one.seconds <= time.monotonic()
    assert zero.pid is None


def test_without_a_launcher_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    process = start("from trainer.heartbeat import open_heartbeat; print(type(open_heartbeat(0)).__name__)")
    assert line_of(process) == "NoHeartbeat"
    process.communicate()


STUCK = """
import ctypes, sys, threading
from trainer.heartbeat import open_heartbeat
def here_it_stands():
    print("ready", flush=True)
    ctypes.PyDLL(None).pause()      # in C, holding Python's lock
open_heartbeat(sys.argv[1] if len(sys.argv) > 1 else 0)
here_it_stands()
"""


def ask_for_stacks(process: subprocess.Popen[str]) -> str:
    """What it prints until its end. Asked before it stands still, it does so afterwards: it is asked until it ends."""
    while process.poll() is None:
        process.send_signal(signal.SIGUSR2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    return process.communicate()[0]


def test_stacks_of_a_rank_that_holds_pythons_lock_reach_the_launcher(tmp_path: Path) -> None:
    prepare_beats(tmp_path, 1)
    process = start(STUCK, **{FOLDER_VARIABLE: str(tmp_path)})
    assert line_of(process) == "ready"
    assert ask_for_stacks(process) == ""
    assert process.returncode == 0
    assert "in here_it_stands" in stacks_path(tmp_path, 0).read_text()


def test_stacks_without_a_launcher_go_to_stderr() -> None:
    process = start(STUCK)
    assert line_of(process) == "ready"
    assert "in here_it_stands" in ask_for_stacks(process)


def test_a_launcher_that_is_gone_is_said(tmp_path: Path) -> None:
    process = start(
        "from trainer.heartbeat import open_heartbeat; print(type(open_heartbeat(3)).__name__)",
        **{FOLDER_VARIABLE: str(tmp_path / "gone")},
    )
    said = process.communicate()[0]
    assert "rank 3: the launcher will take it for hanging" in said
    assert said.endswith("NoHeartbeat\n")


WATCHDOG = """
import ctypes, sys, threading
from pathlib import Path
from trainer import heartbeat
heartbeat._BACKSTOP_SECONDS = 0.5
def here_it_stands():
    {stand}
watched = heartbeat.watch_yourself(heartbeat.NoHeartbeat(), 2.5, Path(sys.argv[1] if len(sys.argv) > 1 else "."), 2)
for step in range({beats}):
    watched.beat("computing", step)
    threading.Event().wait(0.05)
print("it lives on as long as it beats", flush=True)
here_it_stands()
"""


def test_a_rank_that_hangs_ends_itself_and_says_where_it_stood(tmp_path: Path) -> None:
    code = WATCHDOG.format(stand="threading.Event().wait()", beats=60).replace('"."', repr(str(tmp_path)))
    process = start(code)
    assert line_of(process) == "it lives on as long as it beats"
    said = process.communicate()[0]
    assert process.returncode == 1
    matched = re.search(r"rank 2 showed no sign of life for \d+ s \(computing, step 59\).*; stacks: (.+)\n", said)
    assert matched, said
    path = Path(matched[1])
    assert path.parent.parent == tmp_path
    assert "in here_it_stands" in path.read_text()


def test_a_rank_that_hangs_holding_pythons_lock_ends_too(tmp_path: Path) -> None:
    process = start(WATCHDOG.format(stand="ctypes.PyDLL(None).pause()", beats=1).replace('"."', repr(str(tmp_path))))
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "in here_it_stands" in said


def test_who_is_watched_by_a_launcher_does_not_watch_itself(heartbeat: SharedHeartbeat, tmp_path: Path) -> None:
    assert watch_yourself(heartbeat, 1.0, tmp_path, 0) is heartbeat
    silent = NoHeartbeat()
    assert watch_yourself(silent, None, tmp_path, 0) is silent


RANK = """
import os, signal
from trainer.heartbeat import die_with_parent
die_with_parent()
print("rank", os.getpid(), flush=True)
signal.pause()
"""
AGENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {RANK!r}], start_new_session=True).wait()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_ends_with_its_agent_even_when_it_is_stopped(stopped: bool) -> None:
    agent = start(AGENT, **{LAUNCHER_VARIABLE: str(os.getpid())})
    rank = int(line_of(agent).split()[1])
    if stopped:
        os.kill(rank, signal.SIGSTOP)
    agent.kill()
    # the rank holds the pipe: this returns only because it is gone
    assert agent.communicate()[0] == ""


def test_a_rank_whose_agent_was_dead_before_it_could_ask_ends_at_once() -> None:
    """Its parent is neither the launcher nor a child of it: whoever takes orphans."""
    agent = start(AGENT, **{LAUNCHER_VARIABLE: str(os.getppid() if os.getppid() > 1 else 1 << 22)})
    assert agent.communicate()[0] == ""


def test_without_a_launcher_a_rank_is_not_bound_to_its_parent() -> None:
    agent = start(AGENT)
    rank = int(line_of(agent).split()[1])
    agent.kill()
    agent.wait()
    # still there: it ends by the signal that is sent now, and not before
    os.kill(rank, signal.SIGTERM)
    agent.communicate()
