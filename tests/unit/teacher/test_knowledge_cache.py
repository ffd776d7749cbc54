"""Caches on disk: what is written comes back, damage is found and named, and no other run's is taken."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.errors import DataError, RunDirectoryError
from trainer.knowledge import TEACHER_IDS, TEACHER_LOG_PROBABILITIES, LogitTargets, SparseTargets
from trainer.teacher.blocks import Tally, path_of
from trainer.teacher.cache import CacheReader, CacheWriter, open_cache
from trainer.teacher.header import Header, Wanted, find, headers_in
from trainer.teacher.sparse import entries_of, sparse_targets

SAMPLES, LENGTH, VOCABULARY = 200, 8, 30
WANTED = Wanted(
    teacher="t1",
    teacher_precision=None,
    tokenizer="tok",
    data="d1",
    split="train",
    samples=SAMPLES,
    length=LENGTH,
    boundaries="block",
    objective="causal",
    targets="top",
    width=4,
    precision="fp32",
    vocabulary=VOCABULARY,
)
TEACHER = ("t1", "big", "fp32")


def logits_of(samples) -> torch.Tensor:
    rows = [torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(int(one))) for one in samples]
    return torch.stack(rows) * 2


def header_for(wanted: Wanted = WANTED, teacher=TEACHER, vocabulary: int = VOCABULARY) -> Header:
    return Header.of(wanted, teacher, vocabulary, seed=5)


def targets_of(header: Header, ids) -> LogitTargets:
    logits = logits_of(ids)
    return LogitTargets(logits[:, 0] if header.objective == "classification" else logits)


def write(folder: Path, header: Header, blocks=None) -> CacheWriter:
    writer = CacheWriter(folder, header)
    writer.create()
    for block in range(header.grid.blocks) if blocks is None else blocks:
        ids = np.array(header.grid.within(block))
        entries = entries_of(targets_of(header, ids), header.form, ids, header.seed, 16)
        tokens = None if entries.ids is None else entries.ids.numpy()
        writer.write(block, writer.records(tokens, entries.values.numpy()), Tally(samples=len(ids), targets=block))
    return writer


@pytest.fixture(autouse=True)
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time here, and show in no test."""
    monkeypatch.setattr("trainer.teacher.blocks.os.fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = write(tmp_path / "cache", header_for())
    writer.finish()
    return tmp_path / "cache"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("targets", ["top", "sampled"])
def test_cached_targets_are_those_computed_online_to_the_bit(tmp_path: Path, targets: str) -> None:
    header = header_for(replace(WANTED, targets=targets))
    write(tmp_path, header).finish()
    teacher = open_cache(tmp_path, replace(WANTED, targets=targets))
    generator = np.random.default_rng(1)
    assert header.grid.blocks > 60
    for _ in range(5):
        ids = generator.permutation(SAMPLES)[: generator.integers(1, 30)]
        arrays = teacher.annotate(ids, {})
        assert arrays[TEACHER_IDS].dtype == np.int64
        found = teacher.knowledge(as_tensors(arrays)).targets
        expected = sparse_targets(targets_of(header, ids), header.form, ids, header.seed, 1000)
        assert isinstance(found, SparseTargets)
        assert found.kind == expected.kind == targets
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.log_probabilities, expected.log_probabilities)
        assert found.log_probabilities.dtype == torch.float32


def test_all_tokens_come_back_as_log_probabilities(tmp_path: Path) -> None:
    wanted = replace(WANTED, width=1000)
    write(tmp_path, header_for(wanted)).finish()
    teacher = open_cache(tmp_path, wanted)
    ids = np.array([3, 199, 3, 0])
    arrays = teacher.annotate(ids, {})
    assert arrays.keys() == {TEACHER_LOG_PROBABILITIES}
    found = teacher.knowledge(as_tensors(arrays)).targets
    assert isinstance(found, LogitTargets)
    assert torch.equal(found.logits, torch.log_softmax(logits_of(ids), -1))
    # any other number that is all of them will do
    assert open_cache(tmp_path, replace(wanted, width=VOCABULARY))


def test_classifiers_come_back_as_logits(tmp_path: Path) -> None:
    wanted = replace(WANTED, objective="classification", precision="fp16", width=3)
    write(tmp_path, header_for(wanted)).finish()
    teacher = open_cache(tmp_path, wanted)
    ids = np.array([150, 7])
    arrays = teacher.annotate(ids, {})
    # not [n, C]: a micro-batch is cut to its longest sample, in every array that is as wide as its tokens
    assert arrays[TEACHER_LOG_PROBABILITIES].shape == (2, 1, VOCABULARY)
    found = teacher.knowledge(as_tensors(arrays)).targets
    assert torch.equal(found.logits, logits_of(ids)[:, 0])


def test_half_precision_is_near(tmp_path: Path) -> None:
    wanted = replace(WANTED, precision="fp16")
    write(tmp_path, header_for(wanted)).finish()
    ids = np.arange(20)
    found = open_cache(tmp_path, wanted).knowledge(as_tensors(open_cache(tmp_path, wanted).annotate(ids, {}))).targets
    expected = sparse_targets(targets_of(header_for(), ids), header_for().form, ids, 5, 1000)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities, rtol=1e-3, atol=1e-3)


def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    header = header_for()
    other = tmp_path / "other"
    write(other, header, range(10, 40))
    writer = CacheWriter(other, header)
    # a process that was killed while it wrote
    partial = path_of(writer.folder, 3).with_name("block-0000003.bin.there-1")
    partial.write_bytes(b"half")
    missing = [block for block in range(header.grid.blocks) if writer.look_at(block) is None]
    assert missing == [*range(10), *range(40, header.grid.blocks)]
    with pytest.raises(DataError, match="is not complete on this machine: `trimtab teach`"):
        open_cache(other, WANTED)
    write(other, header, reversed(missing)).finish()
    assert bytes_of(other) == bytes_of(folder)


def test_what_a_block_says_of_itself_comes_back(folder: Path) -> None:
    writer = CacheWriter(folder, header_for())
    assert writer.look_at(7) == Tally(samples=len(header_for().grid.within(7)), targets=7)


@pytest.mark.parametrize(
    "where", ["first", "record", "table", "tally", "last", "cut", "longer", "empty", "moved", "gone"]
)
def test_damage_is_found_named_and_mended(folder: Path, where: str) -> None:
    before = bytes_of(folder)
    header = header_for()
    writer = CacheWriter(folder, header)
    path = path_of(writer.folder, 2)
    data = bytearray(path.read_bytes())
    samples = header.grid.within(2)
    places = {"first": 0, "record": len(data) // 3, "table": -80, "tally": -20, "last": -1}
    if where in places:
        data[places[where]] ^= 4
    if where == "moved":
        data = bytearray(path_of(writer.folder, 3).read_bytes())
    sizes = {"cut": len(data) - 5, "empty": 0}
    path.write_bytes(bytes(data[: sizes.get(where, len(data))]) + (b"x" if where == "longer" else b""))
    if where == "gone":
        path.unlink()
    reader = CacheReader(*find(folder, WANTED))
    with pytest.raises(DataError) as refused:
        reader.read(np.array(samples))
    text = str(refused.value)
    assert str(path) in text
    assert "`trimtab teach` with this config writes what is missing or damaged again" in text
    others = np.array([one for one in range(SAMPLES) if one not in samples])
    assert reader.read(others)[0].shape == (len(others), LENGTH, 4)
    missing = [block for block in range(header.grid.blocks) if writer.look_at(block) is None]
    assert missing == [2]
    write(folder, header, missing)
    assert bytes_of(folder) == before


MISMATCHES = {
    "teacher": ({"teacher": "t2"}, "is of another teacher (big)"),
    "teacher_precision": ({"teacher_precision": "bf16"}, "was computed in fp32, and distill.teacher.precision is bf16"),
    "tokenizer": ({"tokenizer": "x"}, "was written with another tokenizer"),
    "data": ({"data": "x"}, "was written for other data"),
    "split": ({"split": "held_out"}, "is of the train split, not of held_out; write it by `trimtab teach` with this "
              "config and --split held_out"),
    "samples": ({"samples": 201}, "has 200 samples, and there are 201"),
    "length": ({"length": 16}, "is for samples of 8 tokens, and data.sequence_length is 16"),
    "boundaries": ({"boundaries": "join"}, "is for data.boundaries: block, not join"),
    "objective": ({"objective": "classification"}, "is for objective.kind: causal, not classification"),
    "targets": ({"targets": "sampled"}, "holds top targets, and distill.cache.targets is sampled"),
    "width": ({"width": 5}, "holds 4 tokens a position, and distill.cache asks for 5"),
    "precision": ({"precision": "fp16"}, "holds fp32, and distill.cache.precision is fp16"),
    "vocabulary": ({"vocabulary": 29}, "knows 30 tokens, and there are 29"),
    "several": ({"data": "x", "length": 16}, "was written for other data and is for samples of 8 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("which", MISMATCHES)
def test_the_cache_of_another_run_is_refused_with_what_differs(folder: Path, which: str) -> None:
    changes, text = MISMATCHES[which]
    with pytest.raises(DataError) as refused:
        open_cache(folder, replace(WANTED, **changes))
    said = str(refused.value)
    assert said.startswith(f"{folder} holds no knowledge for this run: {header_for().key} ")
    assert text in said
    assert "write it by `trimtab teach` with this config" in said


def test_all_that_is_wanted_is_compared() -> None:
    assert {name for changes, _ in MISMATCHES.values() for name in changes} == set(Wanted.__dataclass_fields__)


def test_the_nearest_is_named(folder: Path) -> None:
    write(folder, header_for(replace(WANTED, data="d2", length=4)), [])
    with pytest.raises(DataError, match="was written for other data; write"):
        open_cache(folder, replace(WANTED, data="d3"))


def test_a_run_that_names_no_teacher_takes_the_only_one(folder: Path) -> None:
    assert open_cache(folder, replace(WANTED, teacher=None))
    write(folder, header_for(teacher=("t2", "bigger", "fp32"))).finish()
    assert open_cache(folder, WANTED)
    with pytest.raises(
        DataError, match=r"several teachers: big \(.*\) and bigger \(.*\); set distill.teacher.pretrained"
    ):
        open_cache(folder, replace(WANTED, teacher=None))


def test_a_complete_one_is_preferred(folder: Path) -> None:
    for precision in ("bf16", "fp16"):
        write(folder, header_for(teacher=("t1", "big", precision)), [0])
    assert len(list(headers_in(folder))) == 3
    assert open_cache(folder, WANTED)


def test_an_empty_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere holds no knowledge of a teacher: write it by `trimtab teach`"):
        open_cache(tmp_path / "nowhere", WANTED)


def test_a_header_that_was_changed_is_none(folder: Path) -> None:
    path = folder / header_for().key / "header.json"
    content = json.loads(path.read_text())
    for change in ({"data": "other"}, {"per_block": 0}, {"samples": "../../x"}, {"extra": 1}, {"format": 2}):
        path.write_text(json.dumps(content | change))
        assert list(headers_in(folder)) == []
    path.write_text("{")
    assert list(headers_in(folder)) == []
    CacheWriter(folder, header_for()).create()
    assert open_cache(folder, WANTED)


def test_a_place_that_takes_no_files() -> None:
    with pytest.raises(RunDirectoryError, match=r"distill\.cache\.folder"):
        CacheWriter(Path("/proc/cache"), header_for()).create()
