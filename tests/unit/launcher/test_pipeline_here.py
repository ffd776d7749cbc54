"""Pipelines on this machine: order, what is left and what is done again, how they end. Ranks are a function here."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import start
from launcher.local import Requests
from launcher.pipelines.here import run_pipeline
from launcher.pipelines.record import read_record
from launcher.pipelines.stages import read_pipeline
from launcher.run_directory import locked, read_outcome
from launcher.status import statuses
from tests.unit.launcher.conftest import small_config
from trainer.config.files import RunFiles
from trainer.errors import ConfigError, LaunchError, RunDirectoryError

ENDINGS = {"completed": 0, "crashed": 1, "halted": 3, "stopped": 75}


class Machine:
    """What stands for the ranks: each training ends as it is told to, well by default."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.trained: list[str] = []
        self.exported: list[str] = []
        self.endings: dict[str, str] = {}
        self.meanwhile: Callable[[str], None] = lambda _: None
        self.said: list[str] = []
        self.shown: list[Any] = []
        (folder / "small.yaml").write_text(json.dumps(small_config(folder)))
        more = {"model": {"pretrained": "gpt2"}}
        (folder / "more.yaml").write_text(json.dumps(small_config(folder, **more)))

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "line"

    def make_ready(
        self, request: start.Request, lock: int | None, say: start.Say, requests: Requests | None = None
    ) -> None:
        if self.endings.get(request.root.name) == "unprepared":
            raise SystemExit(2)
        if self.endings.get(request.root.name) == "misfit":
            raise ConfigError([("data.sequence_length", "64 tokens do not fit")])

    def train(
        self, request: start.Request, plan: None, lock: int | None, say: start.Say, requests: Requests | None
    ) -> dict[str, Any]:
        assert requests is not None, "held back over all stages"
        name = str(request.root.relative_to(self.root))
        self.trained.append(name)
        self.meanwhile(name)
        reason = self.endings.get(name, "completed")
        outcome = {"reason": reason, "exit_code": ENDINGS[reason], "message": f"it {reason}", "start": 0}
        RunFiles(request.root).ledger.touch()
        RunFiles(request.root).outcome.write_text(json.dumps(outcome))
        return outcome

    def export(self, root: Path, options: Any = (), requests: Requests | None = None) -> int:
        self.exported.append(root.name)
        if self.endings.get(f"export of {root.name}"):
            return 1
        RunFiles(root).export.mkdir(exist_ok=True)
        return 0

    def write(self, *stages: dict[str, Any]) -> Path:
        path = self.folder / "line.yaml"
        given = [{"config": "small.yaml"} | stage for stage in stages]
        path.write_text(json.dumps({"name": "line", "runs": str(self.folder / "runs"), "stages": given}))
        return path

    def run(self, path: Path, **options: Any) -> int:
        for memory in (self.trained, self.exported, self.said, self.shown):
            memory.clear()
        return run_pipeline(read_pipeline(path, here=True), self.said.append, self.shown.append, **options)

    def outcome(self, name: str) -> dict[str, Any] | None:
        return read_outcome(self.root / name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    for name in ("make_ready", "train", "export"):
        monkeypatch.setattr(start, name, getattr(made, name))
    return made


CHAIN: tuple[dict[str, Any], ...] = (
    {"name": "a"},
    {"name": "b", "config": "more.yaml", "from": "a", "seeds": 2},
    {"name": "c", "after": ["b"]},
    {"name": "d", "after": []},
)


def test_stages_run_in_order_and_are_then_left_alone(machine: Machine) -> None:
    path = machine.write(*CHAIN)
    assert machine.run(path) == 0
    assert machine.trained == ["a", "b/seed=0", "b/seed=1", "c", "d"]
    assert machine.said == [
        "stage 1 of 4, a",
        "stage 2 of 4, b seed=0, going on with a/export",
        "stage 2 of 4, b seed=1, going on with a/export",
        "stage 3 of 4, c",
        "stage 4 of 4, d",
    ]
    record = read_record(machine.root)
    assert record is not None
    assert [(stage.name, stage.after, stage.job, len(stage.runs)) for stage in record.stages] == [
        ("a", (), "", 1), ("b", ("a",), "", 2), ("c", ("b",), "", 1), ("d", (), "", 1),
    ]  # fmt: skip
    assert [(run.name, run.state) for run in statuses(machine.root)] == [
        ("a", "finished"), ("c", "finished"), ("d", "finished"),
    ]  # fmt: skip
    assert machine.run(path) == 0
    assert machine.trained == []
    assert machine.said[0] == "stage 1 of 4, a: it is complete"


def test_a_stage_that_fails_ends_it_with_its_exit_code_and_is_gone_on_with(machine: Machine) -> None:
    path = machine.write(*CHAIN)
    machine.endings["b/seed=1"] = "halted"
    assert machine.run(path) == 3
    assert machine.trained == ["a", "b/seed=0", "b/seed=1"]
    assert machine.said[-1] == "the pipeline ends with stage 'b', which halted: it halted"
    waiting = machine.outcome("c")
    assert waiting is not None
    assert (waiting["reason"], waiting["message"]) == ("cancelled", "not started: stage 'b' halted: it halted")
    states = {run.name: run.state for run in statuses(machine.root)}
    assert states == {"a": "finished", "c": "cancelled", "d": "prepared"}

    machine.endings["b/seed=1"] = "stopped"
    assert machine.run(path) == 75
    assert machine.outcome("c") is None, "it is to come again"
    machine.endings.clear()
    assert machine.run(path) == 0
    assert machine.trained == ["b/seed=1", "c", "d"]


def test_ctrl_c_stops_the_stage_and_the_same_command_goes_on(machine: Machine) -> None:
    path = machine.write({"name": "a"}, {"name": "b"})
    machine.endings["a"] = "stopped"
    assert machine.run(path) == 75
    assert machine.said[-1] == "stage a stopped; the same command goes on with it"
    assert machine.outcome("b") is None, "it is still to come"
    # one that comes as a stage ends stops it before the next
    machine.endings.clear()
    # to this thread: others of a test process do not hold it back
    machine.meanwhile = lambda _: signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    assert machine.run(path) == 75
    assert machine.trained == ["a"]
    assert machine.said[-1] == "Ctrl-C: stopped before b; the same command goes on"
    # and after the last there is nothing to stop
    assert machine.run(path) == 0
    assert machine.trained == ["b"]


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("unprepared", 2, "which was refused: what it needs could not be prepared, see above"),
        ("misfit", 2, "which was refused: the config has 1 problem:\n  data.sequence_length: 64 tokens do not fit"),
    ],
)
def test_a_stage_that_cannot_be_started(machine: Machine, ending: str, code: int, said: str) -> None:
    machine.endings["b"] = ending
    assert machine.run(machine.write({"name": "a"}, {"name": "b"}, {"name": "c"})) == code
    assert machine.trained == ["a"]
    assert machine.said[-1] == f"the pipeline ends with stage 'b', {said}"
    waiting = machine.outcome("c")
    assert waiting is not None
    assert waiting["message"].startswith("not started: stage 'b' was refused: ")


def test_what_a_later_stage_needs_must_be_exported(machine: Machine) -> None:
    path = machine.write({"name": "a"}, {"name": "b", "config": "more.yaml", "from": "a"})
    machine.endings["export of a"] = "fails"
    assert machine.run(path) == 1
    assert machine.said[-1] == "the pipeline ends with stage 'a', which crashed: it was not exported"
    machine.endings.clear()
    assert machine.run(path) == 0
    assert (machine.trained, machine.exported) == (["b"], ["a", "b"])


def test_fresh_moves_everything_aside_before_it_begins(machine: Machine) -> None:
    path = machine.write({"name": "a"}, {"name": "b"})
    assert machine.run(path) == 0
    machine.endings["a"] = "crashed"
    assert machine.run(path, fresh=True) == 1
    assert machine.trained == ["a"]
    assert (machine.root / "a.old-1").is_dir()
    assert (machine.root / "b.old-1").is_dir()
    machine.endings.clear()
    assert machine.run(path) == 0
    assert machine.trained == ["a", "b"], "what followed from the old first stage does not count"


def test_what_cannot_run_here_is_said_before_the_first_stage(machine: Machine) -> None:
    path = machine.write({"name": "a"}, {"name": "b", "nodes": 2})
    with pytest.raises(LaunchError, match=r"^stage b: the config asks for 2 machines"):
        machine.run(path)
    path = machine.write({"name": "a"}, {"name": "b", "set": ["precision=fp16"]})
    with pytest.raises(ConfigError, match=r"^stage b has 1 problem:\n  precision: fp16 needs a GPU"):
        machine.run(path)
    assert not machine.root.exists()
    assert machine.run(machine.write({"name": "a"}, {"name": "b", "nodes": "1-2"})) == 0
    with pytest.raises(RunDirectoryError, match="holds a run with another config"):
        machine.run(machine.write({"name": "a"}, {"name": "b", "set": ["optim.lr=0.5"]}))
    with locked(machine.root), pytest.raises(RunDirectoryError, match="is being run by process"):
        machine.run(machine.write({"name": "a"}, {"name": "b"}))
    assert machine.trained == []


def test_a_stage_is_complete_with_its_comparison(machine: Machine) -> None:
    distill = {"teacher": {"pretrained": "gpt2"}, "compare": True}
    taught = small_config(machine.folder, stage="distill", distill=distill)
    (machine.folder / "taught.yaml").write_text(json.dumps(taught))
    path = machine.write({"name": "a"}, {"name": "b", "config": "taught.yaml", "teacher": "a"}, {"name": "c"})
    machine.endings["b-plain"] = "stopped"
    assert machine.run(path) == 75
    assert machine.trained == ["a", "b", "b-plain"]
    machine.endings.clear()
    assert machine.run(path) == 0
    assert machine.trained == ["b-plain", "c"]
    assert RunFiles(machine.root / "b").comparison.is_file()
    assert machine.run(path) == 0
    assert machine.trained == []
