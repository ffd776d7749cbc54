"""From what the loop tells to the ledger: fields, counts over a resume, and what is copied at once."""

import math
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.config.schema import TelemetryConfig
from trainer.records import (
    Halt,
    IncidentEvent,
    Outcome,
    Position,
    RankStats,
    Rewind,
    Saved,
    Skip,
    Step,
    StepStats,
    Structure,
    Timing,
    Verdict,
)
from trainer.telemetry.ledger import FILE_NAME, Record, read_ledger, standing
from trainer.telemetry.recorder import Recorder, RunFacts, Telemetry, next_attempt, rounded
from trainer.telemetry.silent import NoTelemetry

QUIET = TelemetryConfig(console="quiet", tensorboard=False)
NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
FACTS = RunFacts(
    name="run",
    ranks=2,
    device="cpu",
    precision="fp32",
    parameter_names=NAMES,
    steps=10,
    tokens_per_step=64,
    versions={"torch": "2"},
    config="name: run\n",
    plan={"parameters": 3},
)
TIMING = Timing(seconds=0.25, seconds_data=0.01, tokens_per_second=256.0, flop_utilisation=0.5, memory_bytes=1 << 30)
DONE = Outcome("completed", 0, "All steps done.", 10, 10, "checkpoints/step-00000010")


def stats(attempt: int, step: int, grad_norm: float = 2.0, loss: float = 3.0) -> StepStats:
    return StepStats(
        attempt=attempt,
        batch_index=attempt - 1,
        step=step,
        loss=loss,
        parts={"z_loss": 0.125},
        measures={"teacher entropy": 0.5},
        num_targets=63,
        grad_norm=grad_norm,
        num_nonfinite=0,
        parameter_norms=np.array([grad_norm, 1 / 3, 0.0]),
        ranks=RankStats(np.array([0.2, 0.3]), np.array([1.0, 2.0]), np.array([math.nan, 1.5])),
    )


def records(run_dir: Path, kind: str) -> list[Record]:
    return [record for record in read_ledger(run_dir / FILE_NAME) if record["kind"] == kind]


def record(telemetry: Recorder, seen: StepStats, verdict: Verdict, applied: bool) -> None:
    telemetry.record_attempt(seen, verdict, TIMING, lr=1e-3, epoch=0, applied=applied)


def test_an_attempt_is_recorded_whole(tmp_path: Path) -> None:
    telemetry = Telemetry.open(tmp_path, QUIET, FACTS)
    record(telemetry, stats(1, 1), Step(clip=1.0), applied=True)
    assert telemetry.close(DONE) is None
    (found,) = records(tmp_path, "attempt")
    assert abs(found.pop("time") - time.time()) < 60
    assert found == {
        "kind": "attempt",
        "start": 1,
        "attempt": 1,
        "step": 1,
        "batch": 0,
        "epoch": 0,
        "loss": 3.0,
        "parts": {"z_loss": 0.125},
        "measures": {"teacher entropy": 0.5},
        "targets": 63,
        "grad_norm": 2.0,
        "nonfinite": 0,
        "lr": 1e-3,
        "lr_scale": 1.0,
        "verdict": "step",
        "reason": None,
        "incident": 0,
        "scores": {},
        "clip": 1.0,
        "clipped": True,
        "applied": True,
        "quarantined": False,
        "num_skipped": 0,
        "num_clipped": 1,
        "num_incidents": 0,
        "num_rollbacks": 0,
        "num_quarantined": 0,
        "seconds": 0.25,
        "seconds_data": 0.01,
        "tokens_per_second": 256.0,
        "flop_utilisation": 0.5,
        "memory_bytes": 1 << 30,
        "loss_scale": 1.0,
        "stop_votes": 0,
        "agree": True,
        "rank_seconds": [0.2, 0.3],
        "parameter_norms": [2.0, 0.33333, 0.0],
    }


@pytest.mark.parametrize(
    ("verdict", "grad_norm", "applied", "clipped"),
    [
        (Step(clip=1.0), 1.0, True, False),
        (Step(clip=0.0), 5.0, True, False),
        (Step(clip=1.0), 5.0, False, False),
        (Skip("not finite"), math.nan, False, False),
        (Halt("too often"), math.inf, False, False),
    ],
)
def test_clipped_is_what_the_clip_changed(
    tmp_path: Path, verdict: Verdict, grad_norm: float, applied: bool, clipped: bool
) -> None:
    telemetry = Telemetry.open(tmp_path, QUIET, FACTS)
    record(telemetry, stats(1, 1, grad_norm), verdict, applied)
    telemetry.close(DONE)
    (found,) = records(tmp_path, "attempt")
    assert (found["clipped"], found["num_clipped"]) == (clipped, int(clipped))
    assert (found["num_skipped"], found["verdict"]) == (int(not applied), type(verdict).__name__.lower())
    assert found["grad_norm"] == grad_norm or (math.isnan(grad_norm) and math.isnan(found["grad_norm"]))


def test_counts_go_on_from_where_the_weights_stand(tmp_path: Path) -> None:
    first = Telemetry.open(tmp_path, QUIET, FACTS)
    assert next_attempt(tmp_path, None) == 1
    record(first, stats(1, 1), Step(1.0), applied=True)
    record(first, stats(2, 2, math.nan), Skip("not finite"), applied=False)
    record(first, stats(3, 2), Step(1.0), applied=True)
    # the checkpoint is here; what follows will be done again
    record(first, stats(4, 3, math.nan), Skip("not finite"), applied=False)
    record(first, stats(5, 3), Step(1.0), applied=True)
    first.flush()
    resumed = Position(step=2, attempt=3, next_batch=3)
    assert next_attempt(tmp_path, resumed) == 6
    second = Telemetry.open(tmp_path, QUIET, FACTS, resumed)
    record(second, stats(6, 3), Step(1.0), applied=True)
    second.close(DONE)
    first.close(DONE)
    last = records(tmp_path, "attempt")[-1]
    assert (last["start"], last["num_skipped"], last["num_clipped"]) == (2, 1, 3)
    assert [(start["start"], start["resumed_step"]) for start in records(tmp_path, "start")] == [(1, 0), (2, 2)]
    assert [found["attempt"] for found in standing(read_ledger(tmp_path / FILE_NAME))][:3] == [1, 3, 6]


def test_norms_are_recorded_every_so_often_and_always_for_what_was_not_applied(tmp_path: Path) -> None:
    config = QUIET.model_copy(update={"norms_every": 4})
    telemetry = Telemetry.open(tmp_path, config, FACTS)
    for step in range(1, 9):
        record(telemetry, stats(step, step), Step(1.0), applied=True)
    record(telemetry, stats(9, 9, math.nan), Skip("not finite"), applied=False)
    telemetry.close(DONE)
    assert [found["attempt"] for found in records(tmp_path, "attempt") if "parameter_norms" in found] == [4, 8, 9]


def test_arrays_may_be_used_again_at_once(tmp_path: Path) -> None:
    telemetry = Telemetry.open(tmp_path, QUIET, FACTS)
    norms, ratios = np.ones(3), np.full(3, 0.5)
    seen = stats(1, 1)
    for step in range(1, 200):
        telemetry.record_structure(step, Structure(ratios, 7.0, norms, ratios))
        norms += 1
        record(telemetry, seen, Step(1.0), applied=True)
        seen.parameter_norms[:] += 1
    telemetry.close(DONE)
    assert [found["parameter_norms"] for found in records(tmp_path, "weights")] == [
        [float(n)] * 3 for n in range(1, 200)
    ]
    assert [found["parameter_norms"][2] for found in records(tmp_path, "attempt")] == list(range(199))


def test_every_event_is_recorded(tmp_path: Path) -> None:
    telemetry = Telemetry.open(tmp_path, QUIET, FACTS)
    telemetry.message("info", "held-out: 3 documents")
    telemetry.record_part_norms(5, {"loss": 2.0, "z_loss": 0.5})
    telemetry.record_evaluation(5, math.inf, 100, 1.5, {"accuracy": 0.25})
    telemetry.record_predictions(5, {"errors": [], "classes": ["a", "b"], "confusion": [[3, 1], [0, 2]]})
    telemetry.record_checkpoint(Saved(5, "step-00000005", 1000, 2.5), 0.5)
    telemetry.record_snapshot(5, 0.25, 2000)
    telemetry.record_structure(5, Structure(np.array([1.0, 2.0]), math.inf, np.ones(3), np.full(3, 0.5)))
    telemetry.record_incident(IncidentEvent(1, "opened", 6, 6, 5, "the loss is high", {"loss": math.inf}))
    telemetry.record_rewind(Rewind(1, 5, 4, 6, 5, (4, 5), "memory", 0.125, "high"))
    telemetry.close(DONE)
    everything = [{**entry, "time": 0} for entry in read_ledger(tmp_path / FILE_NAME)]
    assert [entry["kind"] for entry in everything].count("goodput") == 3, "at the start, the checkpoint and the end"
    found = [entry for entry in everything if entry["kind"] not in ("start", "goodput")]
    head = {"time": 0, "start": 1}
    assert found == [
        {"kind": "message", **head, "step": 0, "level": "info", "text": "held-out: 3 documents"},
        {"kind": "part_norms", **head, "step": 5, "norms": {"loss": 2.0, "z_loss": 0.5}},
        {
            "kind": "evaluation",
            **head,
            "step": 5,
            "loss": math.inf,
            "targets": 100,
            "seconds": 1.5,
            "scores": {"accuracy": 0.25},
        },
        {
            "kind": "predictions",
            **head,
            "step": 5,
            "errors": [],
            "classes": ["a", "b"],
            "confusion": [[3, 1], [0, 2]],
        },
        {
            "kind": "checkpoint",
            **head,
            "step": 5,
            "name": "step-00000005",
            "seconds": 0.5,
            "seconds_written": 2.5,
            "num_bytes": 1000,
        },
        {"kind": "snapshot", **head, "step": 5, "seconds": 0.25, "num_bytes": 2000},
        {
            "kind": "weights",
            **head,
            "step": 5,
            "parameter_norms": [1.0] * 3,
            "update_ratios": [0.5] * 3,
            "attention_logits": [1.0, 2.0],
            "output_logits": math.inf,
        },
        {
            "kind": "incident",
            **head,
            "incident": 1,
            "phase": "opened",
            "attempt": 6,
            "step": 6,
            "batch": 5,
            "text": "the loss is high",
            "numbers": {"loss": math.inf},
        },
        {
            "kind": "rewind",
            **head,
            "incident": 1,
            "from_step": 5,
            "to_step": 4,
            "attempt": 6,
            "next_batch": 5,
            "quarantine": [4, 5],
            "source": "memory",
            "seconds": 0.125,
            "reason": "high",
            "num_skipped": 0,
            "num_clipped": 0,
            "num_incidents": 1,
            "num_rollbacks": 1,
            "num_quarantined": 2,
        },
        {
            "kind": "outcome",
            **head,
            "reason": "completed",
            "exit_code": 0,
            "message": "All steps done.",
            "step": 10,
            "steps": 10,
            "checkpoint": "checkpoints/step-00000010",
            "held_out_loss": None,
        },
    ]
    (start,) = records(tmp_path, "start")
    assert start["parameter_names"] == list(NAMES)
    assert (start["versions"], start["plan"], start["resumed_attempt"]) == ({"torch": "2"}, {"parameters": 3}, 0)


def test_rounding_keeps_five_digits_and_what_is_not_finite() -> None:
    assert rounded(np.array([123456.0, -0.000123456, 0.0])) == [123460.0, -0.00012346, 0.0]
    nan, inf = rounded(np.array([math.nan, -math.inf]))
    assert math.isnan(nan)
    assert inf == -math.inf


def test_other_ranks_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    telemetry: Recorder = NoTelemetry()
    record(telemetry, stats(1, 1), Step(1.0), applied=True)
    telemetry.record_structure(1, Structure(np.ones(3), 1.0, np.ones(3), np.ones(3)))
    telemetry.record_snapshot(1, 0.1, 10)
    telemetry.record_rewind(Rewind(1, 2, 1, 2, 2, None, "memory", 0.1, "high"))
    telemetry.record_incident(IncidentEvent(1, "opened", 1, 1, 0, "high"))
    telemetry.record_evaluation(1, 1.0, 1, 1.0)
    telemetry.record_checkpoint(Saved(1, "step", 1, 1.0), 1.0)
    telemetry.message("error", "only rank 0 says it")
    telemetry.flush()
    assert telemetry.close(DONE) is None
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
