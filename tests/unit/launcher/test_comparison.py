"""Teacher and students side by side: the run that is compared with, the figures, and what is said of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher import comparison, here, start
from launcher.comparison import Comparison, Entry
from launcher.local import Requests
from launcher.slurm import verbs
from tests.unit.launcher.conftest import small_config
from trainer.config.facts import facts_to_json
from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig
from trainer.errors import RunDirectoryError
from trainer.records import ModelFacts, ParameterFacts
from trainer.telemetry.ledger import encode

MakeConfig = Callable[..., RunConfig]
TAUGHT: dict[str, Any] = {"teacher": {"pretrained": "/models/large"}, "compare": True}
TEACHER = {"loss": 2.0, "accuracy": 0.8, "parameters": 4_000_000}


@pytest.fixture
def request_of(make_config: MakeConfig, tmp_path: Path) -> Callable[..., start.Request]:
    def make(**changes: Any) -> start.Request:
        config = make_config(**{"name": "student", "stage": "distill", "distill": TAUGHT} | changes)
        return start.Request(config, tmp_path / "runs" / "student", ())

    return make


def complete(root: Path, loss: float, accuracy: float | None = None, parameters: int = 1_000_000) -> None:
    root.mkdir(parents=True, exist_ok=True)
    files = RunFiles(root)
    facts = ModelFacts(
        model_type="llama", parameters=(ParameterFacts("w", (parameters,), True),), num_layers=1, hidden_size=8,
        num_attention_heads=1, intermediate_size=8, vocabulary=8, max_positions=None, matmul_parameters=0,
    )  # fmt: skip
    files.model.write_text(facts_to_json(facts))
    about = {"reason": "completed", "exit_code": 0, "message": "", "step": 10, "steps": 10, "held_out_loss": loss}
    files.outcome.write_text(json.dumps(about))
    scores = {} if accuracy is None else {"accuracy": accuracy}
    records: list[dict[str, Any]] = [
        {"kind": "start", "time": 100.0, "step": 0, "resumed_step": 0},
        {"kind": "evaluation", "time": 190.0, "step": 10, "loss": loss, "seconds": 1.0, "scores": scores},
        {"kind": "outcome", "time": 220.0, "reason": "completed"},
    ]
    common = {"attempt": 10, "start": 0}
    files.ledger.write_bytes(b"".join(encode({**record, **common}) for record in records))


def test_the_plain_run_is_the_same_without_a_teacher(request_of: Callable[..., start.Request]) -> None:
    request = request_of()
    plain = comparison.plain(request)
    assert plain.root == request.root.with_name("student-plain")
    changed = {"name": "student-plain", "stage": "pretrain", "distill": None}
    assert plain.config == request.config.model_copy(update=changed)
    pretrained = request_of(model={"pretrained": "/models/large", "layers": "0, 5"})
    assert comparison.plain(pretrained).config.stage == "finetune"
    borrowed = request_of(data=request.config.data.model_dump(mode="json") | {"tokenizer": {}})
    assert comparison.plain(borrowed).config.data.tokenizer.path == "/models/large", "it was the teacher's"
    assert not comparison.is_wanted(plain.config)


def test_the_figures_of_all_three(request_of: Callable[..., start.Request]) -> None:
    request = request_of()
    plain = comparison.plain(request)
    complete(request.root, 2.25, 0.76)
    with pytest.raises(RunDirectoryError, match="student-plain is not complete, and cannot be compared yet"):
        comparison.compare(request, plain)
    complete(plain.root, 3.0, 0.6)
    RunFiles(request.root).teacher_scores.write_text(json.dumps(TEACHER))
    found = comparison.compare(request, plain)
    tokens = 10 * 8 * 64
    assert found.entries == (
        Entry("teacher", None, 4_000_000, 2.0, 0.8, None, None),
        Entry("distilled", str(request.root), 1_000_000, 2.25, 0.76, tokens, 2.0),
        Entry("plain", str(plain.root), 1_000_000, 3.0, 0.6, tokens, 2.0),
    )
    assert comparison.sentences(found) == [
        "The held-out loss of the distilled student is 0.7500 nats below that of plain training, which is 75% of the "
        "way to the teacher.",
    ]
    assert not comparison.is_done(request)
    comparison.write(request.root, found)
    assert comparison.is_done(request)
    assert json.loads(RunFiles(request.root).comparison.read_text())["entries"][1]["held_out_loss"] == 2.25
    lines = (request.root / "comparison.md").read_text().splitlines()
    assert lines[2:7] == [
        "|  | parameters | size | held-out | perplexity | accuracy | tokens | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| teacher | 4.0 M | – | 2.0000 | 7.39 | 80.00% | – | – |",
        "| distilled | 1.0 M | 25% | 2.2500 | 9.49 | 76.00% | 5.1 k | 2.0 |",
        "| plain | 1.0 M | 25% | 3.0000 | 20.09 | 60.00% | 5.1 k | 2.0 |",
    ]
    classified = Comparison(found.entries, "classification")
    assert comparison.sentences(classified)[1] == ("It keeps 95.0% of the teacher's accuracy (without it 75.0%).")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width: int) -> None:
    large = [
        Entry(name, None, 134_515_008, 12.3456, 0.5, 10_000_000_000, 12345.6)
        for name in ("teacher", "distilled", "plain")
    ]
    console = Console(width=width, record=True)
    with console.capture() as shown:
        console.print(comparison.table(Comparison(tuple(large), "causal")))
    assert "…" not in shown.get()
    assert "134.5 M" in shown.get()
    assert "10.0 B" in shown.get()


def entries(distilled: float | None, plain: float | None, teacher: float | None = None) -> Comparison:
    def entry(name: str, loss: float | None) -> Entry:
        return Entry(name, None, None, loss, None, None, None)

    students = (entry("distilled", distilled), entry("plain", plain))
    return Comparison(students if teacher is None else (entry("teacher", teacher), *students), "causal")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (entries(2.0, 3.0), "1.0000 nats below that of plain training."),
        (entries(3.0, 2.0, 1.0), "1.0000 nats above that of plain training."),
        # a teacher that knows less of this text is no measure
        (entries(2.0, 3.0, 4.0), "1.0000 nats below that of plain training."),
        (entries(1.0, 3.0, 2.0), "2.0000 nats below that of plain training, which is 200% of the way to the teacher."),
    ],
)
def test_what_is_said_of_the_loss(found: Comparison, said: str) -> None:
    assert comparison.sentences(found) == [f"The held-out loss of the distilled student is {said}"]


def test_what_is_not_known_is_a_dash_and_what_is_not_finite_is_no_number(tmp_path: Path) -> None:
    found = entries(math.nan, None)
    assert comparison.sentences(found) == []
    comparison.write(tmp_path, found)
    assert json.loads((tmp_path / "comparison.json").read_text())["entries"][0]["held_out_loss"] is None
    assert "| plain | – | – | – | – | – | – |" in (tmp_path / "comparison.md").read_text()
    huge = Comparison((Entry("distilled", None, None, 1e6, None, None, None), *entries(1.0, 2.0).entries[1:]), "causal")
    comparison.write(tmp_path, huge)
    assert "| 1000000.0000 | inf |" in (tmp_path / "comparison.md").read_text()
    classifier = Comparison(entries(1.0, 2.0).entries, "classification")
    comparison.write(tmp_path, classifier)
    assert "perplexity" not in (tmp_path / "comparison.md").read_text()


def test_both_runs_are_trained_and_an_interrupted_comparison_goes_on(
    request_of: Callable[..., start.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of()
    trained: list[str] = []
    endings = {"student-plain": "stopped"}

    def train(given: start.Request, plan: None, lock: int | None, say: start.Say, requests: Requests) -> dict[str, Any]:
        trained.append(given.root.name)
        if (reason := endings.get(given.root.name)) is not None:
            return {"reason": reason, "exit_code": 75, "message": "as asked"}
        complete(given.root, 2.0)
        outcome: dict[str, Any] = json.loads(RunFiles(given.root).outcome.read_text())
        return outcome

    monkeypatch.setattr(start, "make_ready", lambda *_: None)
    monkeypatch.setattr(start, "train", train)
    monkeypatch.setattr(start, "export", lambda root, requests: RunFiles(root).export.mkdir())
    said: list[str] = []
    shown: list[Any] = []

    def run(**options: Any) -> here.Ended:
        return here.run(request, said.append, shown.append, **options)

    assert run().outcome["exit_code"] == 75
    assert said[-1] == "the comparison is still to be made: the same command goes on with it"
    endings.clear()
    assert run().outcome["reason"] == "completed"
    assert trained == ["student", "student-plain", "student-plain"]
    assert RunFiles(request.root).comparison.is_file()
    assert run().before
    assert trained[3:] == []
    assert not isinstance(shown[-1], str), "the table is shown again"
    run(fresh=True)
    assert trained[3:] == ["student", "student-plain"]
    assert (request.root.with_name("student-plain.old-1")).is_dir()


def test_on_slurm_it_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "student.yaml"
    given: dict[str, Any] = {"name": "student", "stage": "distill", "distill": TAUGHT, "cluster": {"device": "cpu"}}
    path.write_text(json.dumps(small_config(tmp_path, **given)))
    verbs.submit(path, dry_run=True)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "note: distill.compare is left out of a job: submit the same config with `stage=pretrain distill= "
        "name=student-plain` too; when both are complete, "
        f"`trimtab run {tmp_path}/runs/student` shows them side by side"
    )
