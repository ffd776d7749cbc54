"""Starting again, with real processes: a small agent that treats its ranks as torch's does, and ranks that die, hang
and crash. Nothing sleeps to be in step: a process says on a pipe that it is ready, and the end of the pipe, which all
of them hold, says that the last of them is gone.
"""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

DRIVER = """
import json, os, sys
from pathlib import Path
from launcher import local, lookout, supervision
from trainer.config.schema import SupervisionConfig
lookout.DEATH_GRACE_SECONDS = 0.5
local.LOOK_SECONDS = 0.1
job = supervision.Job(Path.cwd(), [sys.executable, "agent.py"], os.environ, 2, None)
config = SupervisionConfig.model_validate_json(sys.argv[1])
outcome = supervision.see_through(job, config, lambda text: print("said:", text, flush=True))
print("outcome:", json.dumps(outcome), flush=True)
"""

AGENT = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
with open("starts.jsonl", "a") as file:
    print(os.environ.get("TRIMTAB_RELAUNCHED", "null"), file=file)
with open("starts.jsonl") as file:
    count = len(file.readlines())
ranks = [
    subprocess.Popen([sys.executable, "rank.py"], start_new_session=True,
                     env=os.environ | {"RANK": str(rank), "TORCHELASTIC_RUN_ID": "x", "COUNT": str(count)})
    for rank in range(2)
]
try:
    while None in (codes := [rank.poll() for rank in ranks]):
        if any(codes):
            break
        time.sleep(0.5)
finally:
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.wait(300)
sys.exit(any(rank.returncode for rank in ranks))
"""
"""Like torch's: on the failure of one rank it sends SIGTERM to the others and waits for them, as long as it takes."""

RANK = """
import contextlib, json, os, signal, socket, sys, time
from pathlib import Path
from trainer.heartbeat import die_with_parent, open_heartbeat
rank = int(os.environ["RANK"])
die_with_parent()
heartbeat = open_heartbeat(rank)
count = int(os.environ["COUNT"])

def end(reason, code):
    if rank == 0:
        Path("outcome.json").write_text(json.dumps(
            {"reason": reason, "exit_code": code, "message": reason, "step": 9, "steps": 9}))
    elif code:
        signal.pause()      # until the agent ends it because of the other
    sys.exit(code)

def met():
    # wait until the launcher would see this process die
    while True:
        for path in Path(f"/proc/{os.environ['TRIMTAB_LAUNCHER']}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                if f"Pid:\\t{os.getpid()}\\n" in path.read_text():
                    return
        time.sleep(0.01)

def after(name):
    while not Path(name).exists():
        time.sleep(0.01)

def save(step):
    Path(f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)

def ready():
    os.write(1, f"ready: {os.getpid()} {os.getppid()}\\n".encode())

def stuck_in_a_collective():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Path(f"stuck-{rank}").touch()
    ready()
    while True:
        signal.pause()

"""


class Run:
    """A supervised run in a folder of its own."""

    def __init__(self, folder: Path, rank: str, *, prelude: str = RANK, **config: object):
        (folder / "agent.py").write_text(AGENT)
        (folder / "rank.py").write_text(prelude + textwrap.dedent(rank))
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps({"backoff_seconds": 0.01, **config})],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def until(self, start: str, count: int = 1) -> list[str]:
        """Read until `count` more lines begin with `start`; return what follows in them."""
        found: list[str] = []
        assert self.process.stdout is not None
        while len(found) < count:
            line = self.process.stdout.readline()
            assert line, f"ended without {start!r}: {self.lines}"
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                found.append(line.removeprefix(start).strip())
        return found

    def outcome(self) -> dict[str, object]:
        """Read to the end of the pipe, which is when every process that holds it is gone."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        self.process.wait()
        (line,) = [line for line in self.lines if line.startswith("outcome:")]
        result: dict[str, object] = json.loads(line.removeprefix("outcome:"))
        return result

    @property
    def said(self) -> list[str]:
        return [line.removeprefix("said: ") for line in self.lines if line.startswith("said:")]

    def starts(self) -> list[dict[str, object] | None]:
        """What each start was told about the one before."""
        return [json.loads(line) for line in (self.folder / "starts.jsonl").read_text().splitlines()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        # not read to its end: where a test failed, others may hold it
        self.process.stdout.close()


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for each in started:
        each.close()


def test_a_killed_rank_is_named_and_the_run_goes_on(tmp_path: Path, runs: list[Run]) -> None:
    """The other rank waits for it and ends by nothing less than SIGKILL."""
    run = Run(
        tmp_path,
        """
        if count == 1 and rank == 1:
            save(300)
            met()
            after("stuck-0")
            os.kill(os.getpid(), signal.SIGKILL)
        if count == 1:
            stuck_in_a_collective()
        end("completed", 0)
        """,
    )
    runs.append(run)
    outcome = run.outcome()
    assert outcome["reason"] == "completed"
    killed = "rank 1 was killed by signal 9 (SIGKILL; out of memory?)"
    assert run.said == [f"{killed}: ending all ranks", f"{killed}: starting again now from step-00000300"]
    first, second = run.starts()
    assert first is None
    assert second is not None
    assert second["reason"] == killed
    assert float(str(second["killed"])) < float(str(second["ended"])) <= float(str(second["launched"]))


def test_a_stopped_rank_is_found_out_and_all_stacks_are_kept(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(
        tmp_path,
        """
        def computing_here():
            heartbeat.beat("computing", 41)
            os.kill(os.getpid(), signal.SIGSTOP)
        if count == 1 and rank == 1:
            after("beaten")
            computing_here()
        if count == 1:
            heartbeat.beat("computing", 42)
            Path("beaten").touch()
            stuck_in_a_collective()
        end("completed", 0)
        """,
        hang_seconds=3,
    )
    runs.append(run)
    assert run.outcome()["reason"] == "completed"
    assert run.said[0].startswith(
        "no sign of life for 3 s from rank 1 (computing, step 41; stopped by a signal); stacks"
    )
    assert run.said[1].endswith("starting again in 0.01 s from the beginning (1 of 3 without a new checkpoint)")
    stuck, stopped = sorted((tmp_path / "hangs").glob("*/rank-*.txt"))
    assert "in stuck_in_a_collective" in stuck.read_text()
    assert "in computing_here" in stopped.read_text()
    assert "stopped by a signal" in stopped.read_text().splitlines()[0]
    assert len(run.starts()) == 2


def test_where_none_is_stopped_the_first_to_fall_silent_is_named(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(
        tmp_path,
        """
        if rank == 0:
            after("beaten")
        heartbeat.beat("computing", 7 + rank)
        Path("beaten").touch()
        stuck_in_a_collective()
        """,
        hang_seconds=2,
        restarts=0,
    )
    runs.append(run)
    assert re.match(r"no sign of life for \d+ s from rank 1 \(computing, step 8\); ", str(run.outcome()["message"]))


def test_a_rank_that_never_begins_is_a_hang_too(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(tmp_path, "", prelude="import signal\nsignal.pause()", hang_seconds=1, restarts=0)
    runs.append(run)
    outcome = run.outcome()
    assert outcome["reason"] == "crashed"
    assert re.match(r"no sign of life for \d+ s from rank 0 \(not started yet\); ", str(outcome["message"]))


def test_a_run_that_always_crashes_is_given_up(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(tmp_path, 'end("crashed", 1)', restarts=2)
    runs.append(run)
    assert run.outcome() == {
        "reason": "crashed",
        "exit_code": 1,
        "message": "crashed; gave up: 3 starts in a row brought no new checkpoint (supervision.restarts=2); "
        "the same command goes on from the last checkpoint",
        "step": 9,
        "steps": 9,
    }
    assert len(run.starts()) == 3
    assert [line.partition(": ")[2] for line in run.said] == [
        "starting again in 0.01 s from the beginning (1 of 2 without a new checkpoint)",
        "starting again in 0.02 s from the beginning (2 of 2 without a new checkpoint)",
    ]


def test_as_long_as_there_are_new_checkpoints_it_goes_on(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(
        tmp_path,
        """
        if count == 5:
            end("completed", 0)
        save(count)
        end("crashed", 1)
        """,
        restarts=1,
        backoff_seconds=1000,
    )
    runs.append(run)
    assert run.outcome()["reason"] == "completed"
    assert len(run.starts()) == 5


def test_going_on_from_memory_is_progress_too(tmp_path: Path, runs: list[Run]) -> None:
    """No checkpoint on disk, but each start notes that it went on from a later step."""
    run = Run(
        tmp_path,
        """
        if count == 4:
            end("completed", 0)
        Path("starts").mkdir(exist_ok=True)
        if rank == 0:
            Path(f"starts/{count:04d}.resumed.json").write_text(json.dumps({"start": count - 1, "step": 5 * count}))
        end("crashed", 1)
        """,
        restarts=1,
        backoff_seconds=1000,
    )
    runs.append(run)
    assert run.outcome()["reason"] == "completed"


@pytest.mark.parametrize(("reason", "code"), [("halted", 0), ("refused", 2), ("stopped", 0), ("completed", 0)])
def test_what_another_start_would_not_change_is_not_started_again(
    tmp_path: Path, runs: list[Run], reason: str, code: int
) -> None:
    run = Run(tmp_path, f'end("{reason}", {code})')
    runs.append(run)
    assert run.outcome()["reason"] == reason
    assert run.said == []
    assert len(run.starts()) == 1


def test_a_run_that_was_taken_over_is_left_to_the_other(tmp_path: Path, runs: list[Run]) -> None:
    """Its outcome is the other's."""
    run = Run(
        tmp_path,
        """
        Path("starts").mkdir(exist_ok=True)
        other = {"run": "0" * 32, "host": "elsewhere", "pid": 17}
        if rank == 0:
            Path("starts/0001.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            Path("starts/0002.json").write_text(json.dumps(other))
        end("completed", 1)
        """,
    )
    runs.append(run)
    assert run.outcome() == {
        "reason": "superseded",
        "exit_code": 4,
        "message": "start 2 of the run has taken over (process 17 on elsewhere)",
    }
    assert len(run.starts()) == 1


def test_its_own_number_is_no_other_start(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(
        tmp_path,
        """
        Path("starts").mkdir(exist_ok=True)
        if rank == 0:
            own = {"host": socket.gethostname(), "pid": os.getpid()}
            Path(f"starts/{count:04d}.json").write_text(json.dumps(own))
        end("crashed" if count == 1 else "completed", int(count == 1))
        """,
    )
    runs.append(run)
    assert run.outcome()["reason"] == "completed"


def test_exit_code_4_of_a_rank_is_believed(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(tmp_path, "met()\nsys.exit(4)")
    runs.append(run)
    assert run.outcome()["exit_code"] == 4
    assert run.said == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_request_to_stop_ends_the_wait_between_two_starts(
    tmp_path: Path, runs: list[Run], number: signal.Signals
) -> None:
    run = Run(tmp_path, 'end("crashed", 1)', backoff_seconds=1000)
    runs.append(run)
    run.until("said: crashed: starting again in 300 s")
    run.process.send_signal(number)
    outcome = run.outcome()
    assert (outcome["reason"], outcome["exit_code"]) == ("stopped", 75)
    assert "before it was started again (crashed)" in str(outcome["message"])
    assert len(run.starts()) == 1


def test_a_run_that_crashes_while_stopping_is_not_started_again(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(
        tmp_path,
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        ready()
        signal.sigwait({signal.SIGTERM})
        end("crashed", 1)
        """,
    )
    runs.append(run)
    run.until("ready:", 2)
    run.process.send_signal(signal.SIGTERM)
    outcome = run.outcome()
    assert (outcome["reason"], outcome["exit_code"]) == ("crashed", 1)
    assert len(run.starts()) == 1


def test_the_death_of_the_agent_takes_the_ranks_with_it_and_is_started_again(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(
        tmp_path,
        """
        if count == 1:
            stuck_in_a_collective()
        end("completed", 0)
        """,
    )
    runs.append(run)
    agent = int(run.until("ready:", 2)[0].split()[1])
    os.kill(agent, signal.SIGKILL)
    assert run.outcome()["reason"] == "completed"
    assert run.said[0].startswith("the agent of the ranks was killed by signal 9 (SIGKILL; out of memory?): starting")


def test_nothing_is_left_when_launcher_and_agent_are_killed_and_a_rank_is_stopped(
    tmp_path: Path, runs: list[Run]
) -> None:
    run = Run(tmp_path, "stuck_in_a_collective()")
    runs.append(run)
    pids = [int(word) for line in run.until("ready:", 2) for word in line.split()]
    os.kill(pids[0], signal.SIGSTOP)
    run.process.kill()
    os.kill(pids[1], signal.SIGKILL)
    assert run.process.stdout is not None
    # the ranks hold the pipe: this returns only because they are gone
    assert run.process.stdout.read() == ""
