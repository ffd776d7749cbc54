"""Two starts of one run alive at once: the older one was cut off, and is back. One history, and the older one ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from workspace import Workspace

from trainer.telemetry.ledger import read_ledger, standing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

SECONDS = 200.0


@pytest.fixture
def run(workspace: Workspace, uninterrupted: Workspace) -> Path:
    """The directory of a run that was prepared, and is started by torchrun, which knows no lock."""
    folder = workspace.run_dir("small")
    folder.mkdir(parents=True)
    for name in ("config.yaml", "plan.json", "model.json", "data.json"):
        shutil.copy(uninterrupted.run_dir("small") / name, folder / name)
    return folder


def torchrun(workspace: Workspace, run: Path, **environment: str) -> subprocess.Popen[str]:
    command = ("torchrun", "--nproc-per-node", "2", "--standalone", "-m", "trainer", str(run))
    return workspace.start(*command, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", **environment)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    return ranks


def is_stopped(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_STOPPED)


def attempts(run: Path, start: int) -> int:
    ledger = run / "ledger.jsonl"
    if not ledger.exists():
        return 0
    return sum(f'"start":{start},"attempt":' in line for line in ledger.read_text().splitlines())


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the run by its name. Without event files: the older start's own one may still grow by what it had
    shown before, which the newer one's takes back."""
    return {
        name: path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and not (name := str(path.relative_to(run))).startswith("tensorboard/")
    }


def end_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    return output


def assert_ended_as_superseded(process: subprocess.Popen[str]) -> None:
    output = end_of(process)
    assert process.returncode != 0
    for rank in range(2):
        said = [line for line in output.splitlines() if line.startswith(f"rank {rank}: ")]
        assert len(said) == 1, output
        assert "start 2 of " in said[0]
        assert said[0].endswith("start 1 is superseded, writes nothing more and ends")
    assert "exitcode  : 4" in output, output


def test_an_older_start_that_comes_back_ends_by_itself(
    workspace: Workspace, uninterrupted: Workspace, run: Path
) -> None:
    older = torchrun(workspace, run)
    wait_until(lambda: attempts(run, 1) >= 12, older)
    ranks = ranks_of(older)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    wait_until(lambda: all(map(is_stopped, ranks)), older)
    reached = attempts(run, 1)
    assert reached < 30

    newer = torchrun(workspace, run)
    output = end_of(newer)
    assert newer.returncode == 0, output
    before = contents(run)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    assert_ended_as_superseded(older)

    assert contents(run) == before
    outcome = workspace.outcome("small")
    assert (outcome["reason"], outcome["start"]) == ("completed", 2)
    assert workspace.final_state("small") == uninterrupted.final_state("small")
    stands = standing(read_ledger(run / "ledger.jsonl"))
    clean = standing(read_ledger(uninterrupted.run_dir("small") / "ledger.jsonl"))
    assert [(found["step"], found["loss"]) for found in stands] == [(found["step"], found["loss"]) for found in clean]
    first = next(found for found in stands if found["start"] == 2)
    assert first["step"] in (1, 11), "it went on from the checkpoint of step 10, or began anew"


STOP_BEFORE_THE_COMMIT = """
import os, pathlib, signal, threading

rename = pathlib.Path.rename

def stopping(self, target):
    if self.name == "step-00000020.partial-0001" and os.path.basename(target) == "step-00000020":
        # to this thread: it stops before the call returns
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    return rename(self, target)

pathlib.Path.rename = stopping
"""


def test_stopped_between_its_last_look_and_the_commit(
    workspace: Workspace, uninterrupted: Workspace, run: Path
) -> None:
    """The worst instant: its next act is the rename that would commit."""
    hook = workspace.root / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(textwrap.dedent(STOP_BEFORE_THE_COMMIT))
    older = torchrun(workspace, run, PYTHONPATH=str(hook))
    wait_until(lambda: len(psutil.Process(older.pid).children()) == 2, older)
    ranks = ranks_of(older)
    wait_until(lambda: any(map(is_stopped, ranks)), older)
    assert (run / "checkpoints" / "step-00000020.partial-0001" / "manifest.json").exists()

    newer = torchrun(workspace, run)
    output = end_of(newer)
    assert newer.returncode == 0, output
    before = contents(run)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    assert_ended_as_superseded(older)

    assert contents(run) == before
    manifests = [json.loads(text) for name, text in before.items() if name.endswith("manifest.json")]
    assert {manifest["start"] for manifest in manifests if manifest["step"] > 10} == {2}
    assert [name for name in before if ".partial" in name] == []
    code, said = workspace.trimtab("verify", str(run))
    assert code == 0, said
    assert "All is well: the next start goes on from step-00000030." in said
    assert workspace.final_state("small") == uninterrupted.final_state("small")
    assert workspace.outcome("small")["start"] == 2
