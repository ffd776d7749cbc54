"""How a start in a job ended, from what it left."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from launcher.local import Ended
from launcher.slurm.ending import Ending, ending_of, note_outcome
from trainer.config.files import RunFiles
from trainer.starts import BY_VARIABLE, begin

CRASHED = Ended(1, None, False)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


def test_the_outcome_says_it(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BY_VARIABLE, "7.0.1")
    number = begin(files).number
    outcome = {"reason": "halted", "exit_code": 3, "message": "the loss is broken", "start": number}
    files.outcome.write_text(json.dumps(outcome))
    assert ending_of(files, Ended(0, None, False), "7.0.1", 0) == Ending("halted", "the loss is broken", 3)


def test_ranks_that_died_without_a_word_crashed(files: RunFiles) -> None:
    assert ending_of(files, CRASHED, "7.0.1", 0).reason == "crashed"


def test_who_was_asked_to_stop_before_anything_was_there_did(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Ended(1, signal.SIGUSR1, False)
    assert ending_of(files, asked, "7.0.1", 0) == Ending("signal", "stopped before it began", 75)
    monkeypatch.setenv(BY_VARIABLE, "7.0.1")
    begin(files)
    assert ending_of(files, asked, "7.0.1", 0) == Ending("signal", "the job was ended before the run could save", 75)


def test_a_start_of_somebody_else_has_taken_over(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BY_VARIABLE, "7.0.1")
    begin(files)
    monkeypatch.setenv(BY_VARIABLE, "7.1.9")
    begin(files)
    found = ending_of(files, CRASHED, "7.0.1", 0)
    assert (found.reason, found.exit_code) == ("superseded", 4)
    assert found.message.startswith("start 2 of the run has taken over (process ")
    assert ending_of(files, CRASHED, "7.1.9", 1).reason == "crashed"


def test_a_run_that_could_not_say_why_it_ended_has_it_noted(files: RunFiles) -> None:
    begin(files)
    note_outcome(files, "crashed", 1, "gave up")
    outcome = json.loads(files.outcome.read_text())
    assert outcome == {
        "reason": "crashed",
        "exit_code": 1,
        "message": "gave up",
        "start": 1,
        "step": 0,
        "checkpoint": None,
        "held_out_loss": None,
    }
