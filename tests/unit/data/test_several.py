"""Several tasks read together: whose column holds what, how often each is seen, and that nothing of one is lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from trainer.config.objective import ObjectiveConfig, TaskConfig
from trainer.config.schema import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from trainer.data.labelled import LabelledSamples, trimmed
from trainer.data.order import Order
from trainer.data.prepare import prepare
from trainer.data.report import table
from trainer.data.several import SeveralPrepared, SeveralSamples, open_several, prepare_several
from trainer.data.stream import Stream, evaluation_batches
from trainer.errors import DataError
from trainer.records import PARTNER, SHARE

TEXT = "the film is a very good long bad dull story of two rivers and one house"
WORDS = TEXT.split()
SETS = ([], ["a"], ["b"], ["b", "a"], ["c"])
FILMS = TaskConfig(name="films", kind="classification")
TAGS = TaskConfig(name="tags", kind="multi_label", weight=0.5)
NEAR = TaskConfig(name="near", kind="regression", weight=2.0)
TASKS = (FILMS, TAGS, NEAR)
NAMES = ("films/bad", "films/good", "tags/a", "tags/b", "tags/c", "near/value")
LENGTH = 24
_FIRST = {"films": 0, "tags": 1000, "near": 2000}


def text(number: int) -> str:
    generator = np.random.default_rng(number)
    return f"{number} " + " ".join(generator.choice(WORDS, int(generator.integers(1, 20))))


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in range(count):
        row: dict[str, Any] = {"text": text(_FIRST[task] + n)}
        if task == "near":
            row["other"] = text(5000 + n)
        label: dict[str, Any] = {"films": ("good", "bad")[n % 3 == 0], "tags": SETS[n % 5], "near": n / 7}
        rows.append({**row, "label": label[task]})
    return rows


@pytest.fixture
def make(tmp_path: Path, word_pieces: Path) -> Any:
    """`make(tasks, rows={task: rows}, task={option of its source: …}, option of the data=…)`: config and folder."""

    def config_of(
        tasks: tuple[TaskConfig, ...] = TASKS, rows: dict[str, list[Any]] | None = None, **options: Any
    ) -> DataConfig:
        given = {
            "films": rows_of("films", 90),
            "tags": rows_of("tags", 40),
            "near": rows_of("near", 20),
            **(rows or {}),
        }
        own = {task.name: options.pop(task.name, {}) for task in tasks}
        sources = []
        for task in tasks:
            path = tmp_path / f"{task.name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in given[task.name]))
            fields = {"files": (path.name,), "label": "label", "task": task.name}
            fields |= {"pair": "other"} if task.name == "near" else {}
            sources.append(SourceConfig(**fields | own[task.name]))
        return DataConfig(
            sources=tuple(sources), tokenizer=TokenizerConfig(path=str(word_pieces)),
            clean=CleanConfig(min_characters=1, min_letters=0, near_duplicates=None),
            **{"held_out": 0.3, "prepared": str(tmp_path / "cache"), **options},
        )  # fmt: skip

    def result(tasks: tuple[TaskConfig, ...] = TASKS, **options: Any) -> tuple[SeveralPrepared, DataConfig]:
        config = config_of(tasks, **options)
        prepared = prepare_several(
            config, tasks, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False, progress=None
        )
        return prepared, config

    return result


def samples_of(prepared: SeveralPrepared, split: Any = "train", length: int = LENGTH) -> SeveralSamples:
    samples = prepared.samples(split, length, "positions")
    assert isinstance(samples, SeveralSamples)
    return samples


def own_of(prepared: SeveralPrepared, task: str, split: Any = "train") -> LabelledSamples:
    samples = prepared.parts[task].samples(split, LENGTH, "positions")
    assert isinstance(samples, LabelledSamples)
    return samples


def whose(samples: LabelledSamples, sample: int) -> tuple[str, int]:
    """(task, row in its file) of a sample."""
    file, line = samples.describe(sample)[0][1].split(" ")[0].split(":")
    return file.removesuffix(".jsonl"), int(line) - 1


def all_of(samples: LabelledSamples) -> np.ndarray:
    return np.arange(len(samples))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_labels_stand_in_the_columns_of_their_task(make: Any, split: Any) -> None:
    prepared, _ = make()
    assert prepared.kind == "several"
    assert prepared.classes is not None
    assert prepared.classes.names == NAMES
    tags = prepared.parts["tags"].classes
    assert tags is not None
    assert len(tags.rates) == 3
    assert prepared.classes.rates == (0.5, 0.5, *tags.rates, 0.5)
    assert [(task.name, task.columns, task.classes, task.weight) for task in prepared.outputs] == [
        ("films", slice(0, 2), ("bad", "good"), 1.0),
        ("tags", slice(2, 5), ("a", "b", "c"), 0.5),
        ("near", slice(5, 6), ("value",), 2.0),
    ]
    samples = samples_of(prepared, split)
    mixed = np.random.default_rng(0).permutation(len(samples))
    labels = samples.fetch(mixed)["labels"]
    assert (labels.dtype, labels.shape) == (np.float32, (len(samples), 6))
    seen = dict.fromkeys(_FIRST, 0)
    for sample, found in zip(mixed.tolist(), labels, strict=True):
        task, row = whose(samples, sample)
        seen[task] += 1
        expected = np.full(6, np.nan, dtype=np.float32)
        if task == "films":
            expected[:2] = [1, 0] if row % 3 == 0 else [0, 1]
        elif task == "tags":
            expected[2:5] = [name in SETS[row % 5] for name in "abc"]
        else:
            expected[5] = np.float32(row / 7)
        np.testing.assert_array_equal(found, expected)
    assert all(seen.values())
    assert seen == {task: len(own_of(prepared, task, split)) for task in _FIRST}


def test_texts_are_those_that_each_task_makes_alone(make: Any) -> None:
    """A pair has two types; beside pairs a single text has one, and without pairs none is told."""
    prepared, _ = make()
    samples, reference = samples_of(prepared), AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    rows = {"films": rows_of("films", 90), "tags": rows_of("tags", 40), "near": rows_of("near", 20)}
    arrays = samples.fetch(all_of(samples))
    assert arrays.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for sample in range(len(samples)):
        task, number = whose(samples, sample)
        row = rows[task][number]
        given = (row["text"], row["other"]) if task == "near" else (row["text"],)
        expected = reference(*given, truncation="longest_first", max_length=LENGTH, padding="max_length")
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert arrays[name][sample].tolist() == expected[name], (task, name)
        assert bool(arrays["token_type_ids"][sample].any()) == (task == "near")
    # the types are there whichever texts a rank holds of a batch
    films = samples.fetch(np.arange(3))
    assert films.keys() == arrays.keys()
    assert not films["token_type_ids"].any()
    single = samples_of(make((FILMS, TAGS))[0])
    assert "token_type_ids" not in single.fetch(all_of(single))


def test_places_documents_and_descriptions_are_those_of_each_task(make: Any) -> None:
    prepared, _ = make()
    samples = samples_of(prepared)
    ids = np.random.default_rng(1).permutation(len(samples))
    places, documents = dict(zip(ids.tolist(), samples.places(ids), strict=True)), np.empty(len(ids), dtype=np.int64)
    documents[ids] = samples.document_of(ids)
    assert documents.tolist() == list(range(len(samples)))
    ordinary = samples.num_ordinary(all_of(samples))
    first = 0
    for number, task in enumerate(_FIRST):
        own = own_of(prepared, task)
        for local, place in enumerate(own.places(all_of(own))):
            assert places[first + local] == place._replace(source=place.source + number)
            assert samples.describe(first + local) == own.describe(local)
            np.testing.assert_array_equal(samples.text_tokens(places[first + local]), own.text_tokens(place))
        np.testing.assert_array_equal(ordinary[first : first + len(own)], own.num_ordinary(all_of(own)))
        first += len(own)
    assert first == len(samples)
    assert samples.num_cut == sum(own_of(prepared, task).num_cut for task in _FIRST) > 0
    assert samples.num_targets(ids[:7]) == 7


def test_windows_of_a_text_keep_its_number(make: Any) -> None:
    prepared, _ = make((FILMS, TAGS), too_long="window", stride=3)
    samples = samples_of(prepared, length=12)
    films = prepared.parts["films"].samples("train", 12, "positions")
    assert isinstance(films, LabelledSamples)
    texts = len(films.sources[0].offsets) - 1
    assert len(films) > texts
    documents = samples.document_of(all_of(samples))
    assert documents[: len(films)].tolist() == films.document_of(all_of(films)).tolist()
    assert documents[len(films)] == texts
    assert len(samples) == prepared.report_at(12)["samples"]["train"]


SHARES = [1.0, 1.5, 2.0, 5.0, 1e9]


@pytest.mark.parametrize("temperature", SHARES)
def test_an_epoch_holds_each_task_in_proportion(make: Any, temperature: float) -> None:
    prepared, _ = make(temperature=temperature)
    samples = samples_of(prepared)
    sizes = np.array([len(own_of(prepared, task)) for task in _FIRST])
    order = Order(5, samples.sizes, samples.weights)
    assert abs(order.epoch_length - sizes.sum()) <= len(sizes) / 2
    ids = order.samples(0, order.epoch_length)
    found = np.bincount(np.searchsorted(np.cumsum(sizes), ids, side="right"), minlength=3)
    share = sizes ** (1 / temperature)
    assert abs(found - share / share.sum() * sizes.sum()).max() <= 0.5 + 1e-6
    # evaluations see every text once
    assert samples_of(prepared, "held_out").weights == (1.0, 1.0, 1.0)


def test_temperature_acts_beside_the_weights_of_sources(make: Any) -> None:
    films, tags = {"weight": 3.0}, {"weight": 0.5}
    prepared, config = make((FILMS, TAGS), films=films, tags=tags)
    assert samples_of(prepared).weights == (3.0, 0.5)
    sizes = np.array([len(own_of(prepared, task)) for task in ("films", "tags")])
    prepared = open_several(
        config.model_copy(update={"temperature": 3.0}), (FILMS, TAGS),
        {name: str(part.path) for name, part in prepared.parts.items()},
    )  # fmt: skip
    masses = sizes * [3.0, 0.5]
    seen = sizes * samples_of(prepared).weights
    assert seen.sum() == pytest.approx(masses.sum())
    assert seen[0] / seen[1] == pytest.approx((masses[0] / masses[1]) ** (1 / 3))


def test_at_one_nothing_changes_to_the_last_digit(make: Any) -> None:
    """Half a pass over an odd number of texts is rounded: a weight that is a digit less would lose one."""
    rows = {"films": rows_of("films", 67), "tags": rows_of("tags", 31)}
    prepared, _ = make(rows=rows, films={"weight": 0.5}, tags={"weight": 0.1}, near={"weight": 0.7})
    assert samples_of(prepared).weights == (0.5, 0.1, 0.7)


def test_a_task_without_held_out_texts_is_left_out_of_them(make: Any) -> None:
    prepared, _ = make(tags={"use": "train"})
    held_out = samples_of(prepared, "held_out")
    labels = held_out.fetch(all_of(held_out))["labels"]
    assert labels.shape[1] == 6
    assert np.isnan(labels[:, 2:5]).all()
    assert {whose(held_out, sample)[0] for sample in range(len(held_out))} == {"films", "near"}
    assert len(held_out) == prepared.total("documents", "held_out")
    assert {whose(samples_of(prepared), sample)[0] for sample in range(len(samples_of(prepared)))} == set(_FIRST)
    # the number of outputs, and so the model, is the same
    assert prepared.classes is not None
    assert prepared.classes.names == NAMES


def test_nothing_held_out_is_said(make: Any) -> None:
    prepared, _ = make(**{task: {"use": "train"} for task in _FIRST})
    with pytest.raises(DataError, match="task films: "):
        prepared.samples("held_out", LENGTH, "positions")


def test_every_held_out_text_is_evaluated_once(make: Any) -> None:
    held_out = samples_of(make()[0], "held_out")
    objective, rows = ObjectiveConfig(kind="several", tasks=TASKS), []
    micro = len(held_out) // 2 - 1
    for rank in range(2):
        for arrays in evaluation_batches(
            held_out, micro=micro, rank=rank, ranks=2, max_samples=None, objective=objective, seed=0
        ):
            assert arrays["labels"].shape == (micro, 6)
            rows += [row.tobytes() for row in arrays["labels"] if not np.isnan(row).all()]
    assert sorted(rows) == sorted(row.tobytes() for row in held_out.fetch(all_of(held_out))["labels"])


def test_a_partner_may_be_of_another_task(make: Any) -> None:
    """A pair and a single text have the same arrays, whichever texts a micro-batch holds."""
    samples = samples_of(make()[0])
    objective = ObjectiveConfig(kind="several", tasks=TASKS, mixup=0.4)
    order, mixed = Order(5, samples.sizes, samples.weights), 0
    stream = Stream(samples, order, batch=4, micro=1, rank=1, ranks=2, objective=objective, seed=5, prefetch=0)
    own = {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for index in range(40):
        for arrays in stream.read(index).micro_batches:
            assert arrays.keys() == {SHARE, *own, *(PARTNER + name for name in own)}
            assert len({arrays[name].shape for name in arrays if "labels" not in name and name != SHARE}) == 1
            mixed += bool((np.isnan(arrays["labels"]) != np.isnan(arrays[PARTNER + "labels"])).any())
    assert mixed > 10


def test_as_many_outputs_as_columns_are_not_cut() -> None:
    arrays = {"input_ids": np.ones((2, 16), np.int64), "attention_mask": np.ones((2, 16), np.int64)}
    arrays["attention_mask"][:, 5:] = 0
    found = trimmed({**arrays, "labels": np.zeros((2, 16), np.float32)}, "several")
    assert {name: array.shape for name, array in found.items()} == {
        "input_ids": (2, 8), "attention_mask": (2, 8), "labels": (2, 16),
    }  # fmt: skip


def test_the_report_adds_up(make: Any) -> None:
    prepared, _ = make()
    report = prepared.report_at(LENGTH)
    parts = {task: prepared.parts[task].report_at(LENGTH) for task in _FIRST}
    for split in ("train", "held_out"):
        for what in ("cut", "samples"):
            assert report[what][split] == sum(part[what][split] for part in parts.values()) > 0
        assert len(samples_of(prepared, split)) == report["samples"][split]
        for what in ("documents", "tokens"):
            own = [sum(source[split][what] for source in part["sources"]) for part in parts.values()]
            assert prepared.total(what, split) == sum(own)
        counts = np.array([source[split]["classes"] for source in report["sources"]])
        labels = samples_of(prepared, split).fetch(all_of(samples_of(prepared, split)))["labels"]
        assert counts[:, :5].sum(axis=0).tolist() == np.nansum(labels[:, :5], axis=0).tolist()
        assert counts[:, 5].tolist() == [0, 0, len(own_of(prepared, "near", split))]
    assert [source["task"] for source in report["sources"]] == list(_FIRST)
    assert (report["kind"], report["classes"]) == ("several", list(NAMES))
    # there are no frequencies of a number
    assert report["class_entropy"] is None
    shown = io.StringIO()
    Console(file=shown, width=150).print(table(report))
    assert all(name in shown.getvalue() for name in NAMES)


def test_entropy_is_weighed_as_the_loss_is(make: Any) -> None:
    prepared, _ = make((FILMS, TAGS))
    counts = [prepared.parts[task].total("documents", "held_out") for task in ("films", "tags")]
    own = [prepared.parts[task].report["class_entropy"] for task in ("films", "tags")]
    expected = (counts[0] * own[0] + 0.5 * counts[1] * own[1]) / sum(counts)
    assert prepared.report["class_entropy"] == pytest.approx(expected)
    # a task of which nothing is held out is no part of that loss
    alone, _ = make((FILMS, TAGS), tags={"use": "train"})
    assert alone.report["class_entropy"] == pytest.approx(alone.parts["films"].report["class_entropy"])


def test_a_change_of_one_task_changes_the_fingerprint(make: Any) -> None:
    first, _ = make()
    again, _ = make()
    assert again.fingerprint == first.fingerprint
    changed, _ = make(rows={"tags": [*rows_of("tags", 39), {"text": text(1039), "label": ["c", "b"]}]})
    assert changed.fingerprint != first.fingerprint
    assert changed.parts["films"].path == first.parts["films"].path
    assert changed.parts["tags"].path != first.parts["tags"].path
    other, _ = make((TAGS, FILMS, NEAR))
    assert other.fingerprint != first.fingerprint
    assert other.classes is not None
    assert other.classes.names == (*NAMES[2:5], *NAMES[:2], NAMES[5])


def test_each_task_is_prepared_as_alone(make: Any, tmp_path: Path) -> None:
    prepared, config = make()
    for source, task in zip(config.sources, TASKS, strict=True):
        own = config.model_copy(update={"sources": (source.model_copy(update={"task": None}),)})
        alone = prepare(own, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False, kind=task.kind)
        assert alone.path == prepared.parts[task.name].path


def test_opened_it_is_what_was_prepared(make: Any) -> None:
    prepared, config = make(temperature=2.0, films={"weight": 2.0})
    paths = {name: str(part.path) for name, part in prepared.parts.items()}
    opened = open_several(config, TASKS, paths)
    assert opened.manifest == prepared.manifest
    assert (opened.fingerprint, opened.classes, opened.outputs) == (
        prepared.fingerprint, prepared.classes, prepared.outputs,
    )  # fmt: skip
    assert opened.report_at(LENGTH) == prepared.report_at(LENGTH)
    for split in ("train", "held_out"):
        one, other = samples_of(prepared, split), samples_of(opened, split)
        assert (one.sizes, one.weights) == (other.sizes, other.weights)
        for name, array in one.fetch(all_of(one)).items():
            np.testing.assert_array_equal(array, other.fetch(all_of(one))[name])
    (Path(paths["tags"]) / "train" / "000.labels.npy").unlink()
    with pytest.raises(DataError, match=r"000\.labels\.npy is missing or damaged"):
        open_several(config, TASKS, paths)


def test_errors_name_the_task(make: Any) -> None:
    with pytest.raises(DataError, match=r"^task near: near\.jsonl:3: column 'label' holds 'high', not a finite number"):
        make(rows={"near": [*rows_of("near", 2), {"text": "one", "other": "two", "label": "high"}]})
    with pytest.raises(DataError, match=r"^task films: all documents are of the class 'good'"):
        make(rows={"films": [row | {"label": "good"} for row in rows_of("films", 30)]})
    with pytest.raises(DataError, match=r"^task near: data\.too_long: windows are not for pairs of texts"):
        samples_of(make(too_long="window")[0])
    prepared, _ = make()
    with pytest.raises(DataError, match=r"^task films: data\.sequence_length is 2, all of which"):
        samples_of(prepared, length=2)
    with pytest.raises(DataError, match="no classes of one kind"):
        samples_of(prepared).class_counts()
