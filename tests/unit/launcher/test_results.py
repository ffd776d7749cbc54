"""What runs came to, as `trimtab results` shows it."""

import csv
import io
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.pipelines.record import PipelineRecord, StageRecord, write_record
from launcher.pipelines.sweep import expand
from launcher.results import Result, as_csv, as_json, means, results, table
from launcher.slurm.history import Job, append_begin, append_end
from launcher.start import entered
from tests.unit.launcher.conftest import small_config
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.telemetry.ledger import encode

NOW = 2_000_000.0


def train(
    root: Path, loss: float | None, reason: str | None = "completed", speeds: tuple[float, ...] = (100.0,)
) -> None:
    """A run of ten seconds, without the jobs of a scheduler."""
    records: list[dict[str, Any]] = [
        {"kind": "start", "time": NOW - 100, "start": 1, "steps": 9, "resumed_step": 0, "resumed_attempt": 0}
    ]
    records += [
        {
            "kind": "attempt", "time": NOW - 90, "start": 1, "attempt": step, "step": step, "loss": 4.0,
            "applied": True, "tokens_per_second": speed, "num_incidents": 2 if loss == 9.0 else 0,
        }
        for step, speed in enumerate(speeds, 1)
    ]  # fmt: skip
    (root / "ledger.jsonl").write_bytes(b"".join(map(encode, records)))
    outcome = {"reason": reason, "exit_code": 0, "step": 9, "steps": 9, "held_out_loss": loss, "start": 1}
    (root / "outcome.json").write_text(json.dumps(outcome))


def make_sweep(folder: Path, *axes: str, name: str = "small", **changes: Any) -> dict[str, Path]:
    """Point → run directory."""
    file = folder / "config.json"
    file.write_text(json.dumps(small_config(folder, name=name, **changes)))
    requests = expand(file, (), axes, None, None, dry_run=False, say=print)
    for request in requests:
        with entered(request, False, print):
            pass
    return {request.root.name: request.root for request in requests}


def shown(found: list[Result]) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=160).print(table(found))
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_a_sweep_is_ranked_and_averaged_over_its_seeds(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, "optim.lr=0.1,0.2", "seed=1,2")
    train(runs["lr=0.1,seed=1"], 2.5, speeds=(1.0, 300.0, 100.0))
    train(runs["lr=0.1,seed=2"], 3.0, speeds=(200.0,))
    train(runs["lr=0.2,seed=1"], 2.75)
    train(runs["lr=0.2,seed=2"], None, reason="crashed")
    found = results(tmp_path / "runs" / "small", NOW)
    assert [(each.name, each.state, each.held_out_loss) for each in found] == [
        ("lr=0.1,seed=1", "finished", 2.5),
        ("lr=0.2,seed=1", "finished", 2.75),
        ("lr=0.1,seed=2", "finished", 3.0),
        ("lr=0.2,seed=2", "crashed", None),
    ]
    assert found[0].options == {"seed": 1, "optim.lr": 0.1}
    assert (found[0].tokens_per_second, found[0].seconds, found[0].step, found[0].steps) == (100.0, 10.0, 9, 9)
    first, second = means(found)
    assert (first.options, first.runs, first.finished) == ({"optim.lr": 0.1}, 2, 2)
    assert first.held_out_loss == 2.75
    assert first.deviation == statistics.stdev([2.5, 3.0])
    assert first.tokens_per_second == 150.0
    assert (second.options, second.runs, second.finished) == ({"optim.lr": 0.2}, 2, 1)
    assert (second.held_out_loss, second.deviation) == (2.75, None)
    assert shown(found) == [
        "run state seed lr held-out step seconds tokens/s incidents",
        "lr=0.1,seed=1 finished 1 0.1 2.5000 9/9 10 s 100 –",
        "lr=0.2,seed=1 finished 1 0.2 2.7500 9/9 10 s 100 –",
        "lr=0.1,seed=2 finished 2 0.1 3.0000 9/9 10 s 200 –",
        "lr=0.2,seed=2 crashed 2 0.2 – 9/9 10 s 100 –",
        "",
        "Over seeds, of the runs that have finished:",
        "lr held-out tokens/s finished",
        "0.1 2.7500 ± 0.3536 150 2 of 2",
        "0.2 2.7500 100 1 of 2",
    ]


def test_what_is_not_finite_comes_after_what_is_and_before_what_is_not_there(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, "seed=1,2,3,4")
    train(runs["seed=1"], None)
    train(runs["seed=2"], math.nan)
    train(runs["seed=3"], 9.0)
    found = results(tmp_path / "runs" / "small", NOW)
    assert [each.name for each in found] == ["seed=3", "seed=2", "seed=1", "seed=4"]
    assert (found[0].incidents, found[3].state, found[3].seconds) == (2, "prepared", None)
    assert "NaN" in shown(found)[2]
    [mean] = means(found)
    assert (mean.options, mean.runs, mean.finished, mean.held_out_loss) == ({}, 4, 3, None)
    # strict JSON, whatever a loss is
    read = json.loads(as_json(found), parse_constant=lambda name: pytest.fail(name))
    assert [row["held_out_loss"] for row in read["runs"]] == [9.0, None, None, None]
    assert read["means"][0]["runs"] == 4


def test_a_point_whose_directory_is_gone_is_absent_and_of_one_run_there_is_no_mean(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, "optim.lr=0.1,0.2", "seed=1,2")
    (runs["lr=0.2,seed=2"] / "config.yaml").unlink()
    found = results(tmp_path / "runs" / "small", NOW)
    assert [(each.name, each.state) for each in found][2:] == [
        ("lr=0.2,seed=1", "prepared"),
        ("lr=0.2,seed=2", "absent"),
    ]
    assert [mean.options for mean in means(found)] == [{"optim.lr": 0.1}]


def test_seconds_are_those_of_its_jobs_not_of_the_queue(tmp_path: Path) -> None:
    [root] = make_sweep(tmp_path, "seed=1").values()
    train(root, 1.0)
    files = RunFiles(root)
    for began, ended in ((NOW - 5000, NOW - 4000), (NOW - 300, None)):
        job = Job(job="7", restart=0, began=began, nodes=("n",), position=0, submitted=0.0)
        append_begin(files, job)
        if ended is not None:
            append_end(
                files, Job(job="7", restart=0, began=began, nodes=("n",), position=0, submitted=0.0, ended=ended)
            )
    assert results(root, NOW)[0].seconds == 1000.0
    files.outcome.unlink()
    files.ledger.touch()
    os.utime(files.ledger, (NOW, NOW))
    [running] = results(root, NOW)
    assert (running.name, running.state, running.seconds) == ("seed=1", "running", 1300.0)


def test_a_pipeline_shows_its_stages_with_what_their_sweeps_vary(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    others = {
        "model": {"pretrained": "gpt2"},
        "batch": {"samples": 16, "micro": 4},
        "schedule": {"duration": 99, "warmup": 9},
    }
    for stage, axes, changes in (("first", ("seed=0",), {}), ("second", ("optim.lr=0.1,0.2",), others)):
        make_sweep(tmp_path, *axes, name=stage, **changes)
    alone = root / "alone"
    (root / "first" / "seed=0").rename(alone)
    stages = tuple(
        StageRecord(name=name, root=str(root / name), runs=(), after=()) for name in ("alone", "second", "third")
    )
    write_record(root, PipelineRecord(name="p", file="p.yaml", stages=stages))
    train(alone, 3.5)
    train(root / "second" / "lr=0.2", 3.0)
    found = results(root, NOW)
    assert [(each.name, each.state) for each in found] == [
        ("second/lr=0.2", "finished"),
        ("alone", "finished"),
        ("second/lr=0.1", "prepared"),
        ("third", "absent"),
    ]
    assert found[0].swept == ("optim.lr",)
    assert found[1].swept == ()
    assert found[0].options["batch.samples"] == 16
    assert found[1].options["model.pretrained"] is None
    lines = shown(found)
    assert lines[0] == "run state lr held-out step seconds tokens/s incidents"
    assert lines[1].startswith("second/lr=0.2 finished 0.2 3.0000")
    assert lines[-1] == f"They differ in {len(found[0].options)} options; --json shows them all."


def test_any_folder_of_runs_will_do(tmp_path: Path) -> None:
    make_sweep(tmp_path, "seed=1,2")
    folder = tmp_path / "runs"
    (folder / "no run").mkdir()
    (folder / "a file").touch()
    assert [each.name for each in results(folder, NOW)] == ["small/seed=1", "small/seed=2"]
    with pytest.raises(RunDirectoryError, match="there is no folder"):
        results(tmp_path / "missing")
    assert results(folder / "no run") == []
    assert as_csv([]).count("\n") == 1
    assert json.loads(as_json([])) == {"runs": [], "means": []}


def test_hostile_names_and_values_are_text_only(tmp_path: Path) -> None:
    hostile = "[red]$(touch x)\"',\n=1"
    runs = make_sweep(tmp_path, f"model.config.note={json.dumps(hostile)},b", name="[bold]`id`")
    found = results(tmp_path / "runs" / "[bold]`id`", NOW)
    assert {each.options["model.config.note"] for each in found} == {hostile, "b"}
    [header, *rows] = csv.reader(io.StringIO(as_csv(found)))
    assert header[:3] == ["name", "model.config.note", "state"]
    assert {row[1] for row in rows} == {hostile, "b"}
    assert {row["name"] for row in json.loads(as_json(found))["runs"]} == set(runs)
    text = "\n".join(shown(found))
    assert "[red]$(touch x)" in text
    assert any(name in shown(results(tmp_path / "runs", NOW))[1] for name in runs)
    assert not Path("x").exists()
