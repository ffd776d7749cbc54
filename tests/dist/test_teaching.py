"""Several ranks write what a teacher knows: the same bytes however many they are and wherever they were interrupted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import RankPool
from torch import Tensor
from workspace import make_workspace

from trainer.config.files import RunFiles
from trainer.config.load import load_config
from trainer.config.schema import RunConfig
from trainer.config.teaching import writing
from trainer.data.order import Order
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared
from trainer.data.stream import Stream
from trainer.engine.ranks import Ranks
from trainer.errors import DataError
from trainer.knowledge import DenseTargets, Head, Knowledge
from trainer.stages.build import Setting
from trainer.stages.caching import open_knowledge
from trainer.stages.teach import Taught, Teaching
from trainer.stop import StopRequest
from trainer.teacher.sparse import sparse_targets

PADDED = 400
"""Rows of the teacher's head: the tokenizer has 384."""


class TableTeacher:
    """Looks its predictions up by the last two tokens. Its forward pass is a collective, as a sharded teacher's is."""

    def __init__(self, stop_after: int | None, stop: StopRequest, harm: str | None):
        generator = torch.Generator().manual_seed(1)
        self._table = torch.randn(PADDED, 8, generator=generator)
        self._head = Head(torch.randn(PADDED, 8, generator=generator))
        self._head.weight[5] = self._head.weight[7]  # two tokens that are always equally probable
        self._stop_after, self._stop, self._harm = stop_after, stop, harm
        self.asked = 0
        self._sound = self._table.clone()

    def annotate(self, ids: Any, arrays: Any) -> dict[str, Any]:
        return {}

    def knowledge(self, tensors: Mapping[str, Tensor]) -> Knowledge:
        dist.all_reduce(torch.zeros(1))
        self.asked += 1
        if self._stop_after is not None and self.asked > self._stop_after:
            self._stop.signal_name = "SIGTERM"
        # predictions of nobody end all ranks alike; other harm is one rank's
        if self._harm is not None and self.asked in (9, 10) and (self._harm == "nan" or dist.get_rank() == 0):
            self._table *= float(self._harm)
        return Knowledge(self.predict(tensors["input_ids"]))

    def predict(self, ids: Tensor) -> DenseTargets:
        return DenseTargets(self._table[ids] + 0.5 * self._table[ids.roll(1, dims=1)], self._head)

    def mend(self) -> str | None:
        harmed = torch.tensor(float(not torch.equal(self._table, self._sound)))
        dist.all_reduce(harmed)
        self._table = self._sound.clone()
        return "the table was not what was loaded" if harmed.item() else None

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Place:
    root: Path
    config: RunConfig
    prepared: Prepared


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("teaching")
    workspace = make_workspace(root / "workspace")
    teacher = root / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (teacher / "model.safetensors").write_bytes(b"weights")
    overrides = [
        f"data.prepared={root / 'data'}",
        "data.sequence_length=16",
        f"distill={{teacher: {{place: cache, pretrained: {teacher}}}}}",
        f"distill.cache={{folder: {root / 'cache'}, top: 6, precision: fp32}}",
    ]
    config = load_config(workspace.config, overrides)
    prepared = prepare(config.data, base=root, tokenizer_fallback=None, trust_remote_code=False, progress=None)
    return Place(root, config, prepared)


def setting_of(config: RunConfig, rank: int, world_size: int, prepared: Path) -> Setting:
    ranks = Ranks(rank, world_size, rank)
    facts: Any = None
    opened = Prepared.open(prepared)
    return Setting(RunFiles(prepared), config, ranks, "cpu", "fp32", opened, facts, StopRequest())


def teach(
    rank: int,
    world_size: int,
    *,
    config: RunConfig,
    prepared: Path,
    stop_after: int | None = None,
    harm: str | None = None,
) -> tuple[Any, int]:
    """What a rank wrote, or why it did not, and how often its teacher was asked."""
    setting = setting_of(writing(config, sharded=True), rank, world_size, prepared)
    teachers = []

    def open_teacher(setting: Setting) -> TableTeacher:
        # the last rank alone is told to stop
        teachers.append(TableTeacher(stop_after if rank == world_size - 1 else None, setting.stop, harm))
        return teachers[-1]

    stages: list[tuple[str, int, int]] = []
    result: Taught | str | None
    try:
        result = Teaching(setting, "train", open_teacher, lambda *told: stages.append(told)).run()
    except DataError as error:
        result = str(error)
    assert all(0 <= done <= total for _, done, total in stages)
    return result, teachers[0].asked if teachers else 0


def files_in(folder: Path) -> dict[str, bytes]:
    """Of the caches. Which hashes of large files are remembered depends on how old those were."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "hashes.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def moved(config: RunConfig, folder: Path, **cache: Any) -> RunConfig:
    distill = config.distill
    assert distill is not None
    changed = distill.cache.model_copy(update={"folder": str(folder), **cache})
    return config.model_copy(update={"distill": distill.model_copy(update={"cache": changed})})


def test_two_ranks_write_what_is_computed_online(two_ranks: RankPool, place: Place) -> None:
    (taught, asked), (_, other) = two_ranks(teach, config=place.config, prepared=place.prepared.path)
    assert asked == other > 20
    header, samples = taught.header, place.prepared.samples("train", 16, "positions")
    assert header.samples == len(samples) > 100
    assert header.vocabulary == place.prepared.vocabulary < PADDED == header.teacher_vocabulary
    assert taught.tally.samples == len(samples)
    assert taught.tally.tokens == taught.new_tokens == len(samples) * 16
    assert taught.tally.targets == samples.num_targets(np.arange(len(samples)))
    assert taught.tally.entries == 6 * taught.tally.targets
    assert 0 < taught.tally.mass < taught.tally.targets
    assert taught.num_bytes > len(samples) * header.form.record_bytes

    setting = setting_of(place.config, 0, 1, place.prepared.path)
    teacher = open_knowledge(setting)
    online = TableTeacher(None, StopRequest(), None)
    for micro, ranks, rank in [(1, 1, 0), (2, 2, 1), (4, 2, 0)]:
        options = {"batch": 8, "micro": micro, "rank": rank, "ranks": ranks, "objective": place.config.objective}
        order = Order(9, samples.sizes, samples.weights)
        stream = Stream(samples, order, seed=9, prefetch=0, annotate=teacher.annotate, **options)
        for index in (0, 31, 5):
            batch = stream.read(index)
            mine = batch.samples.reshape(-1, ranks, micro)[:, rank]
            for ids, arrays in zip(mine, batch.micro_batches, strict=True):
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                found = teacher.knowledge(tensors).targets
                expected = sparse_targets(online.predict(tensors["input_ids"]), header.form, ids, header.seed, 16)
                assert torch.equal(found.ids, expected.ids)
                torch.testing.assert_close(found.log_probabilities, expected.log_probabilities, rtol=0, atol=1e-6)


def test_the_bytes_are_the_same_however_many_ranks_and_interruptions(
    two_ranks: RankPool, four_ranks: RankPool, place: Place
) -> None:
    arguments: dict[str, Any] = {"prepared": place.prepared.path}
    for targets in ("top", "sampled"):
        whole, parts = place.root / f"whole-{targets}", place.root / f"parts-{targets}"
        config = moved(place.config, whole, targets=targets)
        four_ranks(teach, config=config, **arguments)
        config = moved(place.config, parts, targets=targets)
        counts = []
        for pool, after in ((two_ranks, 30), (four_ranks, 40), (two_ranks, 20)):
            results = pool(teach, config=config, stop_after=after, **arguments)
            assert [taught for taught, _ in results] == [None] * pool.size
            counts.append(len(list(parts.rglob("*.bin"))))
        assert 0 < counts[0] < counts[1] <= counts[2]
        with pytest.raises(DataError, match="is not complete on this machine: `trimtab teach`"):
            open_knowledge(setting_of(config, 0, 1, place.prepared.path))
        left = next(parts.rglob("*.bin"))
        left.with_name(f"{left.name}.host-1").write_bytes(b"of a process that was killed")
        results = two_ranks(teach, config=config, **arguments)
        grid = results[0][0].header.grid
        assert results[0][0].new_tokens < grid.samples * 16
        left.with_name(f"{left.name}.host-1").unlink()
        assert files_in(parts) == files_in(whole)
        # and then there is nothing to do: no teacher is asked
        results = two_ranks(teach, config=config, **arguments)
        assert [(taught.new_tokens, asked) for taught, asked in results] == [(0, 0)] * 2


def test_only_what_is_damaged_is_written_again(two_ranks: RankPool, place: Place) -> None:
    config = moved(place.config, place.root / "damaged")
    arguments: dict[str, Any] = {"config": config, "prepared": place.prepared.path}
    (taught, _), _ = two_ranks(teach, **arguments)
    before = files_in(place.root / "damaged")
    path = sorted((place.root / "damaged").rglob("*.bin"))[3]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    stamps = {one: one.stat().st_mtime_ns for one in path.parent.iterdir()}
    reader = open_knowledge(setting_of(config, 0, 1, place.prepared.path))
    sample = taught.header.grid.within(3)[1]
    with pytest.raises(DataError, match=rf"{path.name}, with sample {sample}: .*`trimtab teach`"):
        reader.annotate(np.array([sample]), {})
    # while it is being mended, nobody takes it for complete
    assert two_ranks(teach, **arguments, stop_after=0)[0][0] is None
    assert not list((place.root / "damaged").rglob("complete"))
    results = two_ranks(teach, **arguments)
    assert results[0][0].new_tokens == len(taught.header.grid.within(3)) * 16
    assert files_in(place.root / "damaged") == before
    assert {one for one in path.parent.iterdir() if one.stat().st_mtime_ns != stamps[one]} == {path}


def test_predictions_that_are_not_finite_end_it(two_ranks: RankPool, place: Place) -> None:
    folder = place.root / "broken"
    config = moved(place.config, folder)
    for text, _ in two_ranks(teach, config=config, prepared=place.prepared.path, harm="nan"):
        assert re.match(r"the teacher's predictions of sample \d+ are not finite", text)
    assert not list(folder.rglob("complete"))


def test_what_harmed_weights_predict_is_predicted_again(two_ranks: RankPool, place: Place) -> None:
    sound, harmed = place.root / "sound", place.root / "harmed"
    (_, asked), _ = two_ranks(teach, config=moved(place.config, sound), prepared=place.prepared.path)
    (_, more), _ = two_ranks(teach, config=moved(place.config, harmed), prepared=place.prepared.path, harm="1.5")
    assert asked < more <= asked + 2 * 4
    assert files_in(harmed) == files_in(sound)
