"""What a checkpoint says about itself cannot lead outside of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import make_manifest

from trainer.checkpoint import manifest as manifest_module
from trainer.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    check_file,
    check_listing,
    encode_manifest,
    entry_of,
    name_of,
    read_manifest,
    step_of,
    write_manifest,
)
from trainer.errors import CheckpointError, DamagedError

FILE = "rank-00000.json"
HASH = "0" * 32


def change(directory: Path, **changes: Any) -> None:
    content = json.loads(encode_manifest(make_manifest(3)))
    (directory / MANIFEST).write_text(json.dumps(content | changes))


def test_names_and_steps() -> None:
    assert step_of(name_of(300)) == 300
    assert step_of(name_of(123_456_789_012)) == 123_456_789_012
    assert [step_of(name) for name in ("step-00000300.partial", "step-3", "latest", "step-0000000x")] == [None] * 4


@pytest.mark.parametrize(
    "name",
    ["../outside", "a/b", "/etc/passwd", "..", ".hidden", "", "rank-00000.pt", "model.safetensors", f"{FILE}\n"],
)
def test_any_other_file_name_is_refused_and_named(tmp_path: Path, name: str) -> None:
    change(tmp_path, files=[{"name": name, "num_bytes": 1, "xxh3": HASH}])
    with pytest.raises(DamagedError, match="not a checkpoint's manifest") as refused:
        read_manifest(tmp_path)
    assert f"files.0.name is {name!r}" in str(refused.value)


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, make_manifest(3))
    manifest = read_manifest(tmp_path)
    assert manifest.quarantine == ((1, 2),)
    assert manifest.step == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 3}', "\xff", "[" * 100_000])
def test_anything_else_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedError, match="not a checkpoint's manifest"):
        read_manifest(tmp_path)


def test_a_number_that_was_changed_is_noticed(tmp_path: Path) -> None:
    change(tmp_path, next_batch=4)
    with pytest.raises(DamagedError, match=r"manifest.json has checksum [0-9a-f]{32}, expected [0-9a-f]{32}"):
        read_manifest(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Or changes nothing but white space between the values."""
    whole = encode_manifest(make_manifest(3))
    write_manifest(tmp_path, make_manifest(3))
    expected = read_manifest(tmp_path)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 7)
        (tmp_path / MANIFEST).write_bytes(content)
        try:
            found = read_manifest(tmp_path)
        except CheckpointError:
            continue
        assert found == expected, place


def test_another_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    change(tmp_path, format=2)
    with pytest.raises(CheckpointError, match="has format 2 and this version reads 3") as refused:
        read_manifest(tmp_path)
    assert not isinstance(refused.value, DamagedError)


def test_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_manifest(tmp_path)


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / FILE
    outside.write_bytes(b"secret")
    directory = tmp_path / "step-00000001"
    directory.mkdir()
    entry = entry_of(outside)
    check_file(tmp_path, entry)
    (directory / FILE).symlink_to(outside)
    with pytest.raises(DamagedError, match=f"{FILE} is a link, which is not followed"):
        check_file(directory, entry)
    (directory / FILE).unlink()
    os.mkfifo(directory / FILE)
    with pytest.raises(DamagedError, match=f"{FILE} is not a regular file"):
        check_file(directory, entry)
    (directory / FILE).unlink()
    (directory / FILE).mkdir()
    with pytest.raises(DamagedError, match=f"{FILE} is not a regular file"):
        check_file(directory, entry)
    (tmp_path / "step-00000002").symlink_to(directory)
    with pytest.raises(DamagedError, match="step-00000002 is a link, which is not followed"):
        read_manifest(tmp_path / "step-00000002")


def test_a_file_that_appears_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind the attribute cache of a network file system: the directory too may not be there yet."""
    (tmp_path / "soon").mkdir()
    (tmp_path / "soon" / FILE).write_bytes(b"{}")
    entry = entry_of(tmp_path / "soon" / FILE)
    directory = tmp_path / "step-00000001"
    with pytest.raises(DamagedError, match=f"{FILE} is missing, expected 2 bytes"):
        check_file(directory, entry, patience=0.2)
    looked: list[Path] = []
    refresh = manifest_module.refresh

    def appear_at_the_third(folder: Path) -> None:
        refresh(folder)
        looked.append(folder)
        if len(looked) == 3:
            (tmp_path / "soon").rename(directory)

    monkeypatch.setattr(manifest_module, "refresh", appear_at_the_third)
    check_file(directory, entry, patience=60)
    assert looked == [tmp_path] * 3
    assert list(tmp_path.iterdir()) == [directory]


def test_exactly_one_shard_of_every_rank_is_listed(tmp_path: Path) -> None:
    def entries(*names: str) -> tuple[FileEntry, ...]:
        return tuple(FileEntry(name=name, num_bytes=1, xxh3=HASH) for name in names)

    directory = tmp_path / "step-00000003"
    tensors = "rank-00000.safetensors"
    check_listing(directory, make_manifest(3, files=entries(FILE, tensors)))
    check_listing(directory, make_manifest(3, files=entries(FILE, tensors), stage=0, world_size=8))
    for wrong, message in (
        ({"files": entries(FILE)}, "lists 1 files, expected 2"),
        ({"files": entries(FILE, FILE)}, f"does not list {tensors} of rank 0"),
        ({"files": entries(FILE, tensors), "world_size": 10**15}, "lists 2 files"),
        ({"files": entries(FILE, tensors, "rank-00001.json", "rank-00001.safetensors")}, "lists 4 files, expected 2"),
    ):
        with pytest.raises(DamagedError, match=message):
            check_listing(directory, make_manifest(3, **wrong))
    with pytest.raises(DamagedError, match="is that of step 4, not of step-00000003"):
        check_listing(directory, make_manifest(4, files=entries(FILE, tensors)))
