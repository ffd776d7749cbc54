"""What a checkpoint says about itself cannot lead outside of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.checkpoint.manifest import MANIFEST, check_file, entry_of, name_of, read_manifest, step_of
from trainer.errors import CheckpointError

WHOLE = {
    "step": 3,
    "attempt": 3,
    "next_batch": 3,
    "quarantine": [[1, 2]],
    "world_size": 1,
    "stage": 2,
    "global_batch": 8,
    "config_fingerprint": "c",
    "data_fingerprint": "d",
    "parameters": ["w"],
    "files": [],
}


def test_names_and_steps() -> None:
    assert step_of(name_of(300)) == 300
    assert step_of(name_of(123_456_789_012)) == 123_456_789_012
    assert [step_of(name) for name in ("step-00000300.partial", "step-3", "latest", "step-0000000x")] == [None] * 4


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc/passwd", "..", ".hidden", ""])
def test_a_file_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    bad = WHOLE | {"files": [{"name": name, "num_bytes": 1, "xxh3": "0"}]}
    (tmp_path / MANIFEST).write_text(json.dumps(bad))
    with pytest.raises(CheckpointError, match="not a checkpoint's manifest"):
        read_manifest(tmp_path)


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(WHOLE))
    manifest = read_manifest(tmp_path)
    assert manifest.quarantine == ((1, 2),)
    assert manifest.step == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 3}'])
def test_anything_else_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="not a checkpoint's manifest"):
        read_manifest(tmp_path)


def test_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_manifest(tmp_path)


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    directory = tmp_path / "step-00000001"
    directory.mkdir()
    entry = entry_of(outside)
    check_file(tmp_path, entry)
    (directory / "outside").symlink_to(outside)
    with pytest.raises(CheckpointError, match="is missing"):
        check_file(directory, entry)
