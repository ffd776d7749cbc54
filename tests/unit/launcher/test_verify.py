"""`trimtab verify`: every damage is named, and what can be resumed is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from launcher.verify import Verification, closing, size, table, verify
from trainer.checkpoint.manifest import HEALTHY, Manifest, entry_of, name_of, shard_names, write_manifest
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.starts import RunFence, begin


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    (tmp_path / "config.yaml").write_text("")
    return RunFiles(tmp_path)


def commit(files: RunFiles, step: int, fence: RunFence, run: str | None = None) -> Path:
    """A checkpoint of two ranks."""
    directory = files.checkpoints / name_of(step)
    directory.mkdir(parents=True)
    entries = []
    for rank in range(2):
        tensors, numbers = (directory / name for name in shard_names(rank))
        save_file({"flat.0.master": np.full(1000, step + rank, dtype=np.float32)}, tensors)
        numbers.write_text(json.dumps({"step": step}))
        entries += [entry_of(tensors), entry_of(numbers)]
    manifest = Manifest(
        run=fence.run if run is None else run, start=fence.number, step=step, attempt=step, next_batch=step,
        quarantine=(), world_size=2, stage=3, global_batch=8, config_fingerprint="c", data_fingerprint="d",
        parameters=("w",), files=tuple(entries),
    )  # fmt: skip
    write_manifest(directory, manifest)
    return directory


def shown(result: Verification) -> dict[str, str]:
    """Name → its row, as a wide terminal shows it."""
    console = Console(width=400, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table(result))
    lines = [line.strip() for line in captured.get().splitlines()]
    return {line.split()[0]: line for line in lines}


def test_a_whole_run(files: RunFiles) -> None:
    first = begin(files)
    first.resumed(0, 0)
    commit(files, 10, first)
    second = begin(files)
    second.resumed(1, 10)
    (commit(files, 20, second) / HEALTHY).touch()
    result = verify(files.root)
    rows = shown(result)
    assert rows["step-00000010"].split()[1:] == ["10", "1", "2", "×", "3", "8.18", "kB", "–", "whole"]
    assert rows["step-00000020"].split()[1:] == ["20", "2", "2", "×", "3", "8.18", "kB", "yes", "whole"]
    assert closing(result) == "All is well: the next start goes on from step-00000020."
    assert result.passed


def test_damage_is_named_and_what_is_used_instead(files: RunFiles) -> None:
    fence = begin(files)
    fence.resumed(0, 0)
    for step in (10, 20, 30):
        commit(files, step, fence)
    flipped = files.checkpoints / "step-00000020" / "rank-00001.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-7] ^= 1
    flipped.write_bytes(content)
    (files.checkpoints / "step-00000030" / "manifest.json").unlink()
    result = verify(files.root)
    rows = shown(result)
    assert "damaged" in rows["step-00000020"]
    assert str(flipped) in rows["step-00000020"]
    assert "expected" in rows["step-00000020"]
    assert "has no manifest.json" in rows["step-00000030"]
    assert rows["step-00000010"].endswith("whole")
    assert closing(result) == (
        "The next start goes on from step-00000010. Not whole: step-00000020, step-00000030; restore the files "
        "from a copy if there is one."
    )
    assert not result.passed
    (files.checkpoints / "step-00000010" / "rank-00000.json").write_text("{}")
    assert closing(verify(files.root)).startswith("Nothing of the run's history is whole: the next start begins from")


def test_an_older_damaged_one_does_no_harm(files: RunFiles) -> None:
    fence = begin(files)
    fence.resumed(0, 0)
    for step in (10, 20):
        commit(files, step, fence)
    (files.checkpoints / "step-00000010" / "rank-00000.json").unlink()
    result = verify(files.root)
    assert "rank-00000.json is missing" in shown(result)["step-00000010"]
    assert result.passed


def test_what_is_not_of_the_history_is_told_and_not_resumed(files: RunFiles) -> None:
    old = begin(files)
    old.resumed(0, 0)
    commit(files, 10, old)
    new = begin(files)
    new.resumed(1, 10)
    commit(files, 20, old)
    commit(files, 30, new, run="f" * 32)
    (commit(files, 15, new) / "note.txt").write_text("mine")
    for name in ("step-00000040.partial-0001", "step-00000050.damaged", "elsewhere"):
        (files.checkpoints / name).mkdir()
    result = verify(files.root)
    rows = shown(result)
    assert rows["step-00000020"].endswith("whole, but not of this history: start 1 was cut off when it wrote it")
    assert rows["step-00000030"].endswith("whole, but of another run: not used")
    assert rows["step-00000015"].endswith("whole; also holds note.txt, which nobody reads")
    assert "was being written when its start ended" in rows["step-00000040.partial-0001"]
    assert "put aside when it was to be loaded" in rows["step-00000050.damaged"]
    assert "not a checkpoint; ignored" in rows["elsewhere"]
    assert closing(result) == "All is well: the next start goes on from step-00000015."
    before = sorted(files.checkpoints.rglob("*"))
    verify(files.root)
    assert sorted(files.checkpoints.rglob("*")) == before


def test_a_run_that_lost_its_starts_is_judged_by_its_files(files: RunFiles) -> None:
    fence = begin(files)
    commit(files, 10, fence)
    shutil.rmtree(files.root / "starts")
    assert closing(verify(files.root)) == "All is well: the next start goes on from step-00000010."


def test_no_checkpoint_and_no_run(files: RunFiles, tmp_path: Path) -> None:
    result = verify(files.root)
    assert closing(result) == "There is no checkpoint yet: the next start begins from nothing."
    assert not result.passed
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        verify(tmp_path / "nowhere")


def test_exit_codes_as_typed(files: RunFiles) -> None:
    fence = begin(files)
    fence.resumed(0, 0)
    directory = commit(files, 10, fence)

    def call() -> tuple[int, str]:
        command = [sys.executable, "-m", "launcher.cli", "verify", str(files.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout

    code, said = call()
    assert code == 0
    assert "step-00000010" in said
    assert said.endswith("All is well: the next start goes on from step-00000010.\n")
    (directory / "rank-00000.json").unlink()
    code, said = call()
    assert code == 1
    assert "Nothing of the run's history is whole" in said


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (25_000_000, "25 MB"), (3 * 10**12, "3 TB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
