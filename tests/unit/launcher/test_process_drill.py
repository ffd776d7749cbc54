"""What the drill of the processes runs, and how it judges what became of a fault."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.drill import closing, drill_config, passed, possible, tables
from launcher.process_drill import OUTPUT, Ran, assess, process_config, table, watched
from trainer.checkpoint.manifest import FileEntry, Manifest, write_manifest
from trainer.config.load import load_config
from trainer.config.schema import RunConfig
from trainer.faults.catalogue import Exercise, process_catalogue
from trainer.faults.process import STRUCK

ROOT = Path(__file__).parents[3]
KILLED = Exercise("kill-rank", process_catalogue(40, 2)[0].fault, says=("rank 1 was killed",))
ASKED = next(each for each in process_catalogue(40, 2) if each.name == "terminate")


def short(*overrides: str) -> RunConfig:
    config = load_config(ROOT / "configs/quickstart.yaml", overrides)
    return process_config(drill_config(config, 40, 0), 40, Path("/somewhere/processes"))


def test_it_is_the_users_run_with_checkpoints_every_few_steps() -> None:
    config = short(
        "checkpoint.every=700", "checkpoint.keep=1", "checkpoint.max_failures=0", "checkpoint.background=false"
    )
    assert (config.checkpoint.every, config.checkpoint.keep, config.checkpoint.max_failures) == (5, 2, 2)
    assert config.checkpoint.background is False
    assert config.checkpoint.memory_every is None
    assert short("checkpoint.memory_every=10").checkpoint.memory_every == 2
    assert config.runs == "/somewhere/processes"
    assert config.schedule.duration == 40


def outcome(reason: str = "completed", code: int = 0, checkpoint: str | None = "checkpoints/step-00000040") -> Any:
    return {"reason": reason, "exit_code": code, "message": "why", "checkpoint": checkpoint, "held_out_loss": 2.5}


def run(
    root: Path,
    *,
    xxh3: str = "a",
    resumed: tuple[int, ...] = (20,),
    struck: bool = True,
    said: str = "rank 1 was killed by signal 9: starting again",
    outcomes: tuple[dict[str, Any], ...] | None = None,
) -> Ran:
    """A run whose steps are a second apart; the fault strikes half a second after step 22 was recorded."""
    directory = root / "checkpoints/step-00000040"
    directory.mkdir(parents=True)
    files = (FileEntry(name="rank-00000.json", num_bytes=1, xxh3=hashlib.md5(str(root).encode()).hexdigest()),)
    files += (FileEntry(name="rank-00000.safetensors", num_bytes=1, xxh3=xxh3 * 32),)
    manifest = Manifest(
        step=40, attempt=40, next_batch=40, quarantine=(), world_size=1, stage=2, global_batch=8,
        config_fingerprint="c", data_fingerprint="d", parameters=("w",), files=files,
    )  # fmt: skip
    write_manifest(directory, manifest)
    time, records = 100.0, []
    for start, step in enumerate((0, *resumed), 1):
        records.append({"kind": "start", "time": time, "start": start, "resumed_step": step})
        last = 22 if start <= len(resumed) else 40
        for step_done in range(step + 1, last + 1):
            time += 1
            records.append({"kind": "attempt", "time": time, "start": start, "step": step_done, "applied": True,
                            "attempt": step_done})  # fmt: skip
        time += 10
    (root / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if struck:
        (root / STRUCK).write_text(json.dumps({"time": 122.5, "rank": 1, "step": 23, "fault": "x"}) + "\n")
    (root / OUTPUT).write_text(said)
    return Ran(root, outcomes or (outcome(),), 30.0)


@pytest.fixture
def clean(tmp_path: Path) -> Ran:
    return run(tmp_path / "clean", resumed=(), struck=False)


def test_what_came_back_with_the_same_bits_has_passed(tmp_path: Path, clean: Ran) -> None:
    result = assess(KILLED, run(tmp_path / "a"), clean)
    assert (result["passed"], result["outcome"], result["same_bits"], result["why"]) == (True, "resumed", "clean", "")
    assert (result["lost"], result["starts"], result["exit_codes"]) == (2, 2, [0])
    assert result["rungs"] == ["resumed at step 20"]
    assert result["seconds_recovering"] == 10.5, "from the fault to the next step"
    assert result["difference"] == 0
    twice = assess(KILLED, run(tmp_path / "b", resumed=(20, 15)), clean)
    assert (twice["lost"], twice["starts"]) == (7, 3)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"struck": False}, "the fault never struck"),
        ({"xxh3": "b"}, "its final weights and moments are not those of the clean run to the bit"),
        ({"said": "nothing"}, "nobody said 'rank 1 was killed'"),
        ({"outcomes": (outcome("crashed", 1),)}, "it ended crashed: why"),
        ({"outcomes": (outcome(checkpoint=None),)}, "its final weights and moments are not"),
        ({"outcomes": (outcome(checkpoint="checkpoints/step-00000035"),)}, "its final weights and moments are not"),
    ],
)
def test_what_did_not_has_failed_and_says_why(tmp_path: Path, clean: Ran, changes: dict[str, Any], why: str) -> None:
    result = assess(KILLED, run(tmp_path / "a", **changes), clean)
    assert (result["passed"], result["outcome"]) == (False, "failed")
    assert why in result["why"]


def test_a_request_to_end_gives_its_exit_code_and_the_same_command_goes_on(tmp_path: Path, clean: Ran) -> None:
    stopped = outcome("stopped", 75)
    result = assess(ASKED, run(tmp_path / "a", outcomes=(stopped, outcome())), clean)
    assert (result["passed"], result["exit_codes"]) == (True, [75, 0])
    assert result["rungs"] == ["saved, exit code 75", "resumed at step 20"]
    ignored = assess(ASKED, run(tmp_path / "b", resumed=()), clean)
    assert ignored["why"] == "asked to stop, it completed with exit code 0"


def test_a_run_that_went_on_lost_nothing(tmp_path: Path, clean: Ran) -> None:
    full = next(each for each in process_catalogue(40, 2) if each.name == "full-disk")
    result = assess(full, run(tmp_path / "a", resumed=(), said="no checkpoint at step 25"), clean)
    assert (result["passed"], result["outcome"], result["lost"]) == (True, "went on", 0)
    assert result["rungs"] == ["went on"]
    assert result["seconds_recovering"] is None


def test_nobody_waits_for_a_hang_longer_than_need_be(clean: Ran) -> None:
    assert watched(short("supervision.hang_seconds=null"), clean).supervision.hang_seconds is None
    # of 30 s the steps took 39: what is left is the longest step, one second
    assert watched(short(), clean).supervision.hang_seconds == 10
    slow = Ran(clean.root, clean.outcomes, 39 + 20.5)
    assert watched(short(), slow).supervision.hang_seconds == 62
    assert watched(short("supervision.hang_seconds=40"), slow).supervision.hang_seconds == 40


def test_a_hang_that_nobody_would_notice_is_left_out_and_said() -> None:
    exercises, told = process_catalogue(40, 2), list[str]()
    assert possible(exercises, short(), told.append) == list(exercises)
    assert told == []
    left = possible(exercises, short("supervision.hang_seconds=null"), told.append)
    assert [each.name for each in exercises if each not in left] == ["stop-rank"]
    assert "supervision.hang_seconds is off" in told[0]


def test_what_is_said_is_kept_though_files_cannot_grow(tmp_path: Path) -> None:
    """In a process of its own: its standard output is put elsewhere for a while."""
    code = """
        import resource, subprocess, sys
        from pathlib import Path
        from launcher.process_drill import output_to
        print("before")
        child = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1)); print('x' * 5000, flush=True)"
        with output_to(Path(sys.argv[1])):
            print("meanwhile", flush=True)
            subprocess.run([sys.executable, "-c", child], check=True)
        print("after")
    """
    code = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    argv = [sys.executable, "-c", code, str(tmp_path / "output")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "before\nafter\n"
    assert (tmp_path / "output").read_text() == "meanwhile\n" + "x" * 5000 + "\n"


def test_the_tables_and_the_verdict(tmp_path: Path, clean: Ran) -> None:
    good, bad = (assess(KILLED, run(tmp_path / name, xxh3=name), clean) for name in "ab")
    part = {
        "before": 0, "steps": 40, "ranks": 2, "stage": 3, "results": [good, bad],
        "clean": {"held_out_loss": 2.5, "seconds": 30.0, "alarms": []},
    }  # fmt: skip
    report = {"root": "runs/x", "processes": part}
    assert not passed(report)
    assert passed({"root": "runs/x", "processes": part | {"results": [good]}})
    assert len(list(tables(report))) == 1
    assert closing(report)[-1] == "1 of 2 faults ended as they should; ledgers and incidents: runs/x"
    file = io.StringIO()
    Console(file=file, width=140).print(table(part))
    assert "40 steps in processes of their own, ZeRO 3, 2 ranks" in file.getvalue()
    assert "resumed at step 20" in file.getvalue()
    assert "✗ failed" in file.getvalue()
