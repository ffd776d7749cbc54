"""Supervision with real processes: what a signal reaches, and that nothing is left behind.

Nothing here sleeps to be in step: a process says on a pipe that it is ready, and the end of the pipe, which all of them
hold, says that the last of them is gone.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import local
from launcher.accelerate import Layout, accelerate_yaml
from trainer.errors import LaunchError

DRIVER = """
import dataclasses, json, os, sys
from launcher import local
ended = local.supervise(
    sys.argv[2:], os.environ, targets=local.children_of if sys.argv[1] == "ranks" else None, grace_seconds=0.2,
    say=lambda text: print("said:", text, flush=True))
print("ended:", json.dumps(dataclasses.asdict(ended)), flush=True)
"""

READY = "import os; print('ready:', os.getpid(), flush=True)\n"


class Driver:
    """A process that supervises a command, and all that they print."""

    def __init__(self, *argv: str, kind: str = "command", cwd: Path | None = None, **more: object):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, kind, *argv],
            stdout=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            **more,  # type: ignore[call-overload]
        )
        self.lines: list[str] = []

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stdin):
            if pipe is not None:
                pipe.close()

    def until(self, start: str, count: int = 1) -> list[str]:
        """Read until `count` more lines begin with `start`; return them."""
        found: list[str] = []
        assert self.process.stdout is not None
        while len(found) < count:
            line = self.process.stdout.readline()
            assert line, f"ended without {start!r}: {self.lines}"
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                found.append(line.removeprefix(start).strip())
        return found

    def rest(self) -> dict[str, object]:
        """Read to the end of the pipe, which is when every process that holds it is gone; how the command ended."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        self.process.wait()
        ended = [line for line in self.lines if line.startswith("ended:")]
        return json.loads(ended[0].removeprefix("ended:")) if ended else {}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.kill(os.getpid(), 15)", 143)],
)
def test_exit_code_is_what_a_shell_gives(code: str, expected: int) -> None:
    with Driver(*python(code)) as driver:
        assert driver.rest() == {"exit_code": expected, "stop_requested": None, "killed": False, "alarm": None}


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(LaunchError, match="cannot be started"):
        local.supervise(["/no/such/program"], {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_one_request_is_passed_on_once_and_leaves_time_to_save(number: signal.Signals) -> None:
    # were it not passed on, the command would wait forever; passed on twice, it would print twice
    code = (
        "import signal\n"
        "numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, numbers)\n" + READY + "got = signal.sigwait(numbers)\n"
        "print('got:', int(got), 'pending:', len(signal.sigpending()), flush=True)\n"
        "raise SystemExit(75)"
    )
    with Driver(*python(code)) as driver:
        driver.until("ready:")
        os.kill(driver.process.pid, number)
        ended = driver.rest()
    passed = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
    assert f"got: {int(passed)} pending: 0" in driver.lines
    assert ended == {"exit_code": 75, "stop_requested": int(number), "killed": False, "alarm": None}


def test_a_second_request_kills_what_does_not_end() -> None:
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "signal.pause()\n" * 9
    with Driver(*python(code)) as driver:
        driver.until("ready:")
        os.kill(driver.process.pid, signal.SIGINT)
        driver.until("said: Ctrl-C")
        os.kill(driver.process.pid, signal.SIGINT)
        ended = driver.rest()
    assert ended == {"exit_code": 137, "stop_requested": int(signal.SIGINT), "killed": True, "alarm": None}


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup: the hang-up neither stops the command nor counts as a request."""
    code = "import sys\n" + READY + "sys.stdin.readline()\nraise SystemExit(4)"
    ignore = {"stdin": subprocess.PIPE, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with Driver(*python(code), **ignore) as driver:
        driver.until("ready:")
        os.kill(driver.process.pid, signal.SIGHUP)
        assert driver.process.stdin is not None
        driver.process.stdin.close()
        assert driver.rest() == {"exit_code": 4, "stop_requested": None, "killed": False, "alarm": None}


def test_an_orphan_of_the_command_is_ended_with_it() -> None:
    orphan = READY + "import signal; signal.pause()"
    code = (
        "import os, subprocess, sys\n"
        f"argv = [sys.executable, '-c', {orphan!r}]\n"
        "child = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)\n"
        "line = child.stdout.readline()\n"
        "print(line.decode(), end='', flush=True)\n"
        "os._exit(0)"
    )
    with Driver(*python(code)) as driver:
        [orphan_id] = driver.until("ready:")
        ended = driver.rest()
    assert ended == {"exit_code": 0, "stop_requested": None, "killed": True, "alarm": None}
    assert not Path(f"/proc/{orphan_id}").exists()


def test_the_command_ends_when_its_supervisor_is_killed() -> None:
    with Driver(*python(READY + "import signal; signal.pause()")) as driver:
        driver.until("ready:")
        driver.process.kill()
        # reading to the end returns only because the kernel ended the command
        assert driver.rest() == {}


RANK = r"""
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
words = ["ready:", os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"]]
# the ranks share the pipe and the agent starts Python with -u: only a single write keeps a line whole
os.write(1, " ".join([*words, "\n"]).encode())
if sys.argv[1] == "wait":
    signal.sigwait({signal.SIGTERM})
    os.write(1, f"saved: {os.environ['RANK']}\n".encode())
"""


def launch(folder: Path, ranks: int, argument: str) -> list[str]:
    (folder / "rank_program.py").write_text(RANK)
    (folder / "accelerate.yaml").write_text(accelerate_yaml(Layout(1, ranks, "cpu", 1)))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    return [*launcher, "-m", "rank_program", argument]


def test_accelerate_ranks_save_when_asked_and_nothing_remains(tmp_path: Path) -> None:
    with Driver(*launch(tmp_path, 2, "wait"), kind="ranks", cwd=tmp_path) as driver:
        ready = [line.split() for line in driver.until("ready:", 2)]
        assert sorted(words[:2] for words in ready) == [["0", "2"], ["1", "2"]]
        os.kill(driver.process.pid, signal.SIGINT)
        ended = driver.rest()
    assert sorted(line for line in driver.lines if line.startswith("saved:")) == ["saved: 0", "saved: 1"]
    assert ended == {"exit_code": 0, "stop_requested": int(signal.SIGINT), "killed": False, "alarm": None}


def test_accelerate_ranks_save_when_the_launcher_is_killed(tmp_path: Path) -> None:
    """The agent, a single rank's too, is told by the kernel and tells its ranks."""
    with Driver(*launch(tmp_path, 1, "wait"), kind="ranks", cwd=tmp_path) as driver:
        driver.until("ready:")
        driver.process.kill()
        driver.rest()
    assert "saved: 0" in driver.lines


def test_two_launches_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with (
        Driver(*launch(tmp_path, 1, "wait"), kind="ranks", cwd=tmp_path) as one,
        Driver(*launch(tmp_path / "b", 1, "wait"), kind="ranks", cwd=tmp_path / "b") as other,
    ):
        ports = {driver.until("ready:")[0].split()[2] for driver in (one, other)}
        for driver in (one, other):
            os.kill(driver.process.pid, signal.SIGTERM)
        assert [driver.rest()["exit_code"] for driver in (one, other)] == [0, 0]
    assert len(ports) == 2
