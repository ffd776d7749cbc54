"""The folder of an incident: what it says, that it says it safely, and that it is there whole or not at all."""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.config.schema import TelemetryConfig
from trainer.records import (
    Evidence,
    IncidentEvent,
    Outcome,
    Position,
    RankStats,
    Replay,
    Rewind,
    Rollback,
    Skip,
    Step,
    StepStats,
    Timing,
    Verdict,
)
from trainer.report.incident import IncidentReports, read_evidence, read_samples
from trainer.report.template import cell, fenced, number
from trainer.telemetry.recorder import RunFacts, Telemetry

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
FACTS = RunFacts("run", 2, "cpu", "fp32", NAMES, 20, 64, {}, "", {})
QUIET = TelemetryConfig(console="quiet", tensorboard=False)
TIMING = Timing(0.25, 0.0, 256.0, None, 1 << 30)
NASTY = "a ``` fence\n# <script>alert(1)</script> | cell\n" + "x" * 700
FILES = {"report.md", "evidence.json", "samples.jsonl", "norms.png", "loss.png"}


def describe(sample: int) -> list[tuple[str, str, str]]:
    if sample == 13:
        raise ValueError("the token file is gone")
    return [("web|1", f"doc-{sample}<b>", NASTY if sample == 12 else f"text of {sample}")]


class Run:
    """A run with its ledger and its reports."""

    def __init__(self, run_dir: Path, resumed: Position | None = None, attempt: int = 0, calm_seconds: float = 1000.0):
        self.telemetry = Telemetry.open(run_dir, QUIET, FACTS, resumed)
        self.complaints: list[str] = []
        self.reports = IncidentReports(run_dir, describe, NAMES, self.complaints.append, calm_seconds)
        self.attempt, self.step = attempt, resumed.step if resumed else 0

    def attempted(self, verdict: Verdict, loss: float, incident: int = 0, first_rank: float = 1.0) -> None:
        self.attempt += 1
        applied = isinstance(verdict, Step)
        stats = StepStats(
            attempt=self.attempt,
            batch_index=self.attempt - 1,
            step=self.step + 1,
            loss=loss,
            parts={},
            num_targets=63,
            grad_norm=loss,
            num_nonfinite=0,
            parameter_norms=np.array([1.0, 2.0, loss]),
            ranks=RankStats(losses=np.array([loss, 1.0, 1.0]), grad_norms=np.array([first_rank, 1.0, 1.0])),
        )
        self.telemetry.record_attempt(stats, verdict, TIMING, 1e-3, 0, applied, {"loss": 12.5}, incident)
        self.step += applied

    def steps(self, count: int, loss: float = 4.0) -> None:
        for _ in range(count):
            self.attempted(Step(1.0), loss)

    def told(self, phase: str, text: str, **numbers: float) -> None:
        event = IncidentEvent(1, phase, self.attempt, self.step + 1, self.attempt - 1, text, numbers)
        self.telemetry.record_incident(event)
        self.reports.note(event)

    def kept(self, incident: int = 1) -> None:
        self.reports.keep(
            Evidence(
                incident,
                self.attempt,
                self.step + 1,
                self.attempt - 1,
                sample_ids=np.array([11, 12, 13, 14]),
                sample_losses=np.array([3.0, 9.5, 2.0, math.nan]),
                parameter_norms=np.array([1.0, 2.0, math.inf]),
                usual_norms=np.array([1.0, 2.0, 4.0]),
            )
        )

    def rewind(self, to_step: int, quarantine: tuple[int, int] | None) -> None:
        rewind = Rewind(1, self.step, to_step, self.attempt, self.attempt, quarantine, "memory", 0.05, "high")
        self.telemetry.record_rewind(rewind)
        self.step = to_step

    def close(self) -> None:
        self.reports.close()
        self.reports.close()
        self.telemetry.close(Outcome("completed", 0, "Done.", 20, 20, None))
        assert self.complaints == []


def rolled_back(run: Run) -> None:
    run.steps(8)
    run.steps(2, loss=6.0)
    run.attempted(Replay("high"), 99.0, incident=1, first_rank=50.0)
    run.told("opened", "the loss is 99 | `usual` 4", loss=99.0)
    run.attempted(Rollback("high", 8), 99.0, incident=1)
    run.kept()
    run.rewind(8, (8, 11))
    run.told("acted", "back to step 8")
    run.steps(6, loss=3.5)


def test_a_run_that_dies_in_the_middle_leaves_its_evidence(tmp_path: Path) -> None:
    run = Run(tmp_path, calm_seconds=0.0)
    rolled_back(run)
    run.telemetry.flush()
    report, deadline = tmp_path / "incidents" / "0001" / "report.md", time.monotonic() + 60
    while not report.exists():
        assert time.monotonic() < deadline, run.complaints
        time.sleep(0.02)
    assert "back to step 8" in report.read_text()
    run.close()


def section(report: str, title: str) -> str:
    return report.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_folder_tells_the_whole_incident(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rolled_back(run)
    run.told("recovered", "back on its trajectory", verified=1.0, loss=3.5)
    run.reports.finish(1)
    run.close()
    folder = tmp_path / "incidents" / "0001"
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["0001"]
    report = (folder / "report.md").read_text()
    assert report.startswith("# Incident 1: the loss is 99")
    for line in (
        "**Recovered: the loss is back on the trajectory that it had.**",
        "| began at | step 11, attempt 11, batch 10 |",
        "| batches left out | batches 8–11 |",
        "| rollbacks | 1 |",
        "| work done in vain | 2 steps taken back, 2 attempts not applied, 1.05 s |",
        "| loss before · at · after | 4 · 99 · 3.5 |",
        "| recovery verified | yes |",
        r"| 11 | 11 | 10 | opened | the loss is 99 \| \`usual\` 4 |",
        "| 10 | 8 | memory | 0.05 | 8–11 |",
        "| 11 | 11 | 10 | replay | 99 | 99 | loss 12.5 |",
        "What each rank brought to attempt 11. 3 ranks; rank 0 stands out.",
        "| layer 01 | 4 | ∞ | × ∞ |",
    ):
        assert line in report
    for picture in ("norms.png", "loss.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_samples_are_told_the_worst_first(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rolled_back(run)
    run.reports.finish(1)
    run.close()
    folder = tmp_path / "incidents" / "0001"
    samples = read_samples(folder / "samples.jsonl")
    assert [sample["id"] for sample in samples] == [14, 12, 11, 13]
    assert math.isnan(samples[0]["loss"])
    assert samples[1]["documents"] == [{"source": "web|1", "document": "doc-12<b>", "text": NASTY}]
    assert "the token file is gone" in samples[3]["documents"][0]["text"]
    worst = section((folder / "report.md").read_text(), "The worst samples")
    assert re.findall(r"### (Sample .*)", worst) == [
        "Sample 14: loss NaN",
        "Sample 12: loss 9.5",
        "Sample 11: loss 3",
        "Sample 13: loss 2",
    ]
    assert r"web\|1 · doc-12&lt;b&gt;" in worst
    # the fence is longer than any in the text, which is cut
    assert f"````text\n{NASTY[:600]}…\n````\n" in worst


def test_evidence_is_strict_json_and_comes_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rolled_back(run)
    run.told("halted", "no way on")
    run.reports.finish(1)
    run.close()

    def refuse(text: str) -> float:
        raise AssertionError(text)

    path = tmp_path / "incidents" / "0001" / "evidence.json"
    json.loads(path.read_text(), parse_constant=refuse)
    found = read_evidence(path)
    (evidence,) = found["evidence"]
    assert evidence["parameter_norms"] == [1.0, 2.0, math.inf]
    assert (evidence["sample_ids"], evidence["sample_losses"][:3]) == ([11, 12, 13, 14], [3.0, 9.5, 2.0])
    assert math.isnan(evidence["sample_losses"][3])
    assert (found["outcome"], found["batches_left_out"], found["steps_taken_back"]) == ("halted", [[8, 11]], 2)
    assert [attempt["verdict"] for attempt in found["attempts_not_applied"]] == ["replay", "rollback"]
    assert found["loss_before"] == 4.0


def test_a_transient_fault_needs_no_evidence(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(4)
    run.attempted(Replay("not finite"), math.nan, incident=1, first_rank=math.nan)
    run.told("opened", "not finite", loss=math.nan)
    run.attempted(Step(1.0), 4.0, incident=1)
    run.told("replayed", "a transient fault of rank 0 on node-1")
    run.steps(3)
    run.told("recovered", "back", verified=1.0, loss=4.0)
    run.reports.finish(1)
    run.close()
    folder = tmp_path / "incidents" / "0001"
    report = (folder / "report.md").read_text()
    assert "| loss before · at · after | 4 · NaN · 4 |" in report
    assert "rank 0 stands out" in report
    assert "| 0 | NaN | NaN |" in report
    assert "No samples were kept" in report
    assert "| batches left out | none |" in report
    assert (folder / "norms.png").exists()
    assert read_samples(folder / "samples.jsonl") == []


@pytest.mark.parametrize(("verified", "words"), [(0.0, "Closed without proof"), (1.0, "Recovered")])
def test_recovery_that_was_not_verified_says_so(tmp_path: Path, verified: float, words: str) -> None:
    run = Run(tmp_path)
    rolled_back(run)
    run.told("recovered", "closed", verified=verified, loss=5.0)
    run.reports.finish(1)
    run.close()
    report = (tmp_path / "incidents" / "0001" / "report.md").read_text()
    assert f"**{words}" in report
    assert f"| recovery verified | {'yes' if verified else 'no'} |" in report


def test_evidence_that_came_before_its_number_is_found(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(3)
    run.attempted(Skip("high"), 99.0, incident=1)
    run.kept(incident=0)
    run.told("opened", "high", loss=99.0)
    run.told("acted", "left out")
    run.close()
    folder = tmp_path / "incidents" / "0001"
    assert len(read_samples(folder / "samples.jsonl")) == 4
    assert "| batches left out | batch 3 |" in (folder / "report.md").read_text()


def test_an_incident_that_outlives_its_process_keeps_its_evidence(tmp_path: Path) -> None:
    first = Run(tmp_path)
    rolled_back(first)
    first.close()
    report = tmp_path / "incidents" / "0001" / "report.md"
    assert "**Open:" in report.read_text()
    second = Run(tmp_path, Position(first.step, first.attempt, first.attempt), first.attempt)
    second.steps(2, loss=3.5)
    second.told("recovered", "back", verified=1.0, loss=3.5)
    second.reports.finish(1)
    second.close()
    assert "**Recovered" in report.read_text()
    assert "the loss is 99" in report.read_text()
    assert len(read_samples(report.with_name("samples.jsonl"))) == 4


def test_what_a_resume_took_back_is_not_told(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.steps(2)
    checkpoint = Position(2, 2, 2)
    rolled_back(first)
    first.close()
    second = Run(tmp_path, checkpoint, first.attempt)
    second.steps(3)
    second.attempted(Skip("other"), 50.0, incident=1)
    second.told("opened", "another alarm", loss=50.0)
    second.told("acted", "left out")
    second.close()
    folder = tmp_path / "incidents" / "0001"
    report = (folder / "report.md").read_text()
    assert report.startswith("# Incident 1: another alarm")
    assert "the loss is 99" not in report
    assert "| rollbacks | 0 |" in report
    assert read_samples(folder / "samples.jsonl") == []


def test_a_half_written_folder_never_looks_whole(tmp_path: Path) -> None:
    incidents = tmp_path / "incidents"
    run = Run(tmp_path)
    incidents.mkdir()
    (incidents / "0001.partial").mkdir()
    (incidents / "0001.partial" / "report.md").write_text("half")
    rolled_back(run)
    run.reports.finish(1)
    run.close()
    assert [path.name for path in incidents.iterdir()] == ["0001"]
    assert "half" not in (incidents / "0001" / "report.md").read_text()[:10]


def test_what_cannot_be_written_is_said_and_stops_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "incidents").write_text("a file where the folder should be")
    rolled_back(run)
    run.reports.finish(1)
    run.reports.close()
    assert run.complaints
    assert all("could not be written" in complaint for complaint in run.complaints)
    run.telemetry.close(Outcome("completed", 0, "Done.", 20, 20, None))


def test_text_of_others_is_no_markdown() -> None:
    assert cell("a|b\n<b> `c` [d](e) *f*") == r"a\|b &lt;b&gt; \`c\` \[d\](e) \*f\*"
    assert fenced("a\x00b\r\nc") == "```text\na\ufffdb\nc\n```"
    assert fenced("```` here").splitlines()[0] == "`````text"
    assert [number(value) for value in (1234567.0, 0.5, math.nan, math.inf, -math.inf)] == [
        "1.235e+06",
        "0.5",
        "NaN",
        "∞",
        "−∞",
    ]
