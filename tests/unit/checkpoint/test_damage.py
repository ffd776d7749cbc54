"""Every way in which a checkpoint can be damaged: what is said, and what is loaded instead."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import Said, make_state, make_store, same, save_steps

from trainer.checkpoint import store as store_module
from trainer.checkpoint.manifest import MANIFEST, entry_of, read_manifest, write_manifest
from trainer.checkpoint.verify import examine
from trainer.errors import CheckpointError, DamagedError

TENSORS, NUMBERS = "rank-00000.safetensors", "rank-00000.json"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lead_out(directory: Path) -> None:
    content = (directory / MANIFEST).read_text()
    shutil.copy(directory / NUMBERS, directory.parent.parent / "outside.json")
    (directory / MANIFEST).write_text(content.replace(NUMBERS, "../../outside.json"))


def link_out(directory: Path) -> None:
    outside = directory.parent.parent / TENSORS
    (directory / TENSORS).rename(outside)
    (directory / TENSORS).symlink_to(outside)


def link_directory(directory: Path) -> None:
    outside = directory.parent.parent / directory.name
    directory.rename(outside)
    directory.symlink_to(outside)


class Run:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def pickle_in_place(directory: Path) -> None:
    """With a manifest that fits it."""
    path = directory / TENSORS
    path.write_bytes(pickle.dumps(Run(directory.parent.parent / "ran")))
    manifest = read_manifest(directory)
    write_manifest(directory, manifest.model_copy(update={"files": (entry_of(path), manifest.files[1])}))


def other_step(directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(directory.with_name("step-00000001"), directory)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in the tensors": (
        lambda d: flip(d / TENSORS),
        rf"{TENSORS} has hash \w{{32}}, expected \w{{32}}; .*of rank 0",
    ),
    "a flipped bit in the numbers": (
        lambda d: flip(d / NUMBERS),
        rf"{NUMBERS} has hash \w{{32}}, expected \w{{32}}; .*of rank 0",
    ),
    "tensors cut off": (lambda d: cut(d / TENSORS), rf"{TENSORS} has \d+ bytes, expected \d+; .*of rank 0"),
    "numbers cut off": (lambda d: cut(d / NUMBERS), rf"{NUMBERS} has \d+ bytes, expected \d+; .*of rank 0"),
    "no tensors": (lambda d: (d / TENSORS).unlink(), rf"{TENSORS} is missing, expected \d+ bytes; .*of rank 0"),
    "no numbers": (lambda d: (d / NUMBERS).unlink(), rf"{NUMBERS} is missing, expected \d+ bytes; .*of rank 0"),
    "an empty file": (lambda d: (d / TENSORS).write_bytes(b""), rf"{TENSORS} has 0 bytes, expected \d+"),
    "a manifest that is none": (lambda d: (d / MANIFEST).write_text("?"), "not a checkpoint's manifest"),
    "a flipped bit in the manifest": (lambda d: flip(d / MANIFEST), f"{MANIFEST}"),
    "a path out of the directory": (lead_out, r"files.1.name is '../../outside.json'"),
    "a link out of the directory": (link_out, rf"{TENSORS} is a link, which is not followed"),
    "a link to a directory": (link_directory, r"step-00000003 is a link, which is not followed"),
    "a pickle with a fitting manifest": (pickle_in_place, rf"{TENSORS} is no safetensors file, which is refused"),
    "another step's files": (other_step, r"is that of step 1, not of step-00000003"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named_and_the_newest_whole_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(store_module, "_PATIENCE_SECONDS", 0.0)
    folder = tmp_path / "checkpoints"
    save_steps(make_store(folder), 1, 2, 3)
    damage, message = CASES[case]
    damage(folder / "step-00000003")
    with pytest.raises(DamagedError, match=message):
        make_store(folder).load(folder / "step-00000003")
    whole, damaged = [], []
    for examined in examine(folder, lambda start, step: True):
        (damaged if examined.problems else whole).append(examined.step)
    assert (whole, damaged) == ([1, 2], [3])

    said: Said = []
    loaded = make_store(folder, said).load_newest()
    assert loaded is not None
    directory, manifest, state = loaded
    assert (directory.name, manifest.step) == ("step-00000002", 2)
    assert same(state, make_state(2))
    [(level, text)] = said
    assert level == "error"
    assert text.endswith("(renamed to step-00000003.damaged); going back to an older one")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002", "step-00000003.damaged"]
    assert not (tmp_path / "ran").exists()

    # the step is reached and saved again, and damaged again: both stay
    again = make_store(folder)
    save_steps(again, 3)
    cut(folder / "step-00000003" / TENSORS)
    assert again.load_newest() is not None
    assert (folder / "step-00000003.damaged-2").is_dir()


def test_one_without_a_manifest_is_ignored_and_verified_as_none(tmp_path: Path) -> None:
    save_steps(make_store(tmp_path), 1, 2)
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    loaded = make_store(tmp_path).load_newest()
    assert loaded is not None
    assert loaded[1].step == 1
    [whole, other] = examine(tmp_path, lambda start, step: True)
    assert (whole.problems, other.step) == ((), 2)
    assert f"has no {MANIFEST}" in other.problems[0]


def test_a_file_that_does_not_belong_there_is_not_read_but_named(tmp_path: Path) -> None:
    save_steps(make_store(tmp_path), 1)
    (tmp_path / "step-00000001" / "optimizer.pt").write_bytes(pickle.dumps(Run(tmp_path / "ran")))
    loaded = make_store(tmp_path).load_newest()
    assert loaded is not None
    assert same(loaded[2], make_state(1))
    [examined] = examine(tmp_path, lambda start, step: True)
    assert (examined.problems, examined.strange) == ((), ("optimizer.pt",))
    assert not (tmp_path / "ran").exists()


def test_when_all_are_damaged_none_is_loaded(tmp_path: Path) -> None:
    said: Said = []
    save_steps(make_store(tmp_path), 1, 2)
    for step in (1, 2):
        cut(tmp_path / f"step-0000000{step}" / NUMBERS)
    assert make_store(tmp_path, said).load_newest() is None
    assert [text.count(NUMBERS) for _, text in said] == [1, 1]


def test_one_of_another_version_is_not_damaged_but_refused(tmp_path: Path) -> None:
    save_steps(make_store(tmp_path), 1)
    path = tmp_path / "step-00000001" / MANIFEST
    path.write_text(path.read_text().replace('"format": 3', '"format": 9'))
    with pytest.raises(CheckpointError, match="has format 9"):
        make_store(tmp_path).load_newest()
    assert (tmp_path / "step-00000001").is_dir()


def test_what_cannot_be_renamed_is_left_out_all_the_same(tmp_path: Path) -> None:
    """Here, because its name with anything behind it is longer than a file system allows."""
    said: Said = []
    save_steps(make_store(tmp_path), 1, 2)
    long = tmp_path / f"step-{'9' * 245}"
    (tmp_path / "step-00000002").rename(long)
    write_manifest(long, read_manifest(long).model_copy(update={"step": int("9" * 245)}))
    cut(long / TENSORS)
    store = make_store(tmp_path, said)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded[1].step == 1
    assert "it stays under its name" in said[0][1]
    store.abandon_after(1)
    assert store.newest() == tmp_path / "step-00000001"
