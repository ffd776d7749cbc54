"""Labelled documents: read, numbered, cut, padded; and every way in which they can be wrong."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.config.objective import ObjectiveConfig
from trainer.config.schema import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from trainer.data.classes import class_entropy, settle, sorted_classes
from trainer.data.labelled import LabelledSamples
from trainer.data.order import Order
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared
from trainer.data.report import table
from trainer.data.samples import IGNORED
from trainer.data.stream import Stream, evaluation_batches
from trainer.errors import DataError

TEXT = "the film is a very good long bad dull story of two rivers and one house"
WORDS = TEXT.split()
CLASSIFICATION = ObjectiveConfig(kind="classification")


def review(number: int, length: int | None = None) -> str:
    generator = np.random.default_rng(number)
    return f"{number} " + " ".join(generator.choice(WORDS, length or int(generator.integers(1, 20))))


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": review(first + n), "label": ("good", "bad", "dull")[n % 3]} for n in range(count)]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """As BERT's: [CLS] … [SEP], [PAD]."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(10)), *(f"##{n}" for n in range(10))]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # what a published tokenizer may have left on
    backend.enable_truncation(5)
    backend.enable_padding(length=5, pad_token="[PAD]")
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> Any:
    def prepared(*sources: dict[str, Any], **options: Any) -> Prepared:
        base = {"label": "label", "files": ("rows.jsonl",)}
        config = DataConfig(
            sources=tuple(SourceConfig(**{**base, **source}) for source in sources or ({},)),
            **{
                "clean": CleanConfig(min_characters=1, min_letters=0, near_duplicates=None),
                "tokenizer": TokenizerConfig(path=str(tokenizer)),
                "held_out": 0.3,
                "prepared": str(tmp_path / "cache"),
                **options,
            },
        )
        return prepare(config, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False)

    return prepared


def samples_of(prepared: Prepared, split: Any = "train", length: int = 16) -> LabelledSamples:
    samples = prepared.samples(split, length, "positions")
    assert isinstance(samples, LabelledSamples)
    return samples


def test_samples_are_what_the_tokenizer_makes_of_each_text(run: Any, tmp_path: Path) -> None:
    records = rows(60)
    records[7]["text"] = "it spells [MASK] and [SEP] in the middle"
    write(tmp_path / "rows.jsonl", records)
    prepared = run()
    reference = AutoTokenizer.from_pretrained(prepared.tokenizer_path, split_special_tokens=True)
    seen = 0
    for split in ("train", "held_out"):
        samples = samples_of(prepared, split)
        arrays = samples.fetch(np.arange(len(samples)))
        for sample in range(len(samples)):
            ((source, document, _),) = samples.describe(sample)
            record = records[int(document.split(":")[1].split(" ")[0]) - 1]
            assert (source, document.split(" ", 1)[1]) == ("rows.jsonl", f"(class {record['label']})")
            expected = reference(record["text"], truncation=True, max_length=16, padding="max_length")
            assert arrays["input_ids"][sample].tolist() == expected["input_ids"]
            assert arrays["attention_mask"][sample].tolist() == expected["attention_mask"]
            assert prepared.classes.names[arrays["labels"][sample]] == record["label"]
            seen += 1
    assert seen == 60
    assert prepared.classes.names == ("bad", "dull", "good")
    assert prepared.classes.pad_id == 0
    assert prepared.unigram_entropy is None


def test_the_report_counts_classes_and_what_is_cut(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows(90))
    prepared = run()
    report = prepared.report_at(16)
    (source,) = report["sources"]
    train, held_out = source["train"]["classes"], source["held_out"]["classes"]
    assert sum(train) + sum(held_out) == 90
    assert [a + b for a, b in zip(train, held_out, strict=True)] == [30, 30, 30]
    for split in ("train", "held_out"):
        samples = samples_of(prepared, split, 100)
        lengths = samples.fetch(np.arange(len(samples)))["attention_mask"].sum(axis=1)
        assert report["cut"][split] == (lengths > 16).sum() > 0
        assert samples.num_ordinary(np.arange(len(samples))).tolist() == (lengths - 2).tolist()
        assert samples.num_targets(np.arange(5)) == 5
    assert report["class_entropy"] == pytest.approx(class_entropy(np.array(train), np.array(held_out)))
    shown = io.StringIO()
    from rich.console import Console

    Console(file=shown, width=150).print(table(report))
    text = shown.getvalue()
    assert f"{train[0]} {train[0] / sum(train):4.0%}" in text
    assert "longer than 16 tokens, cut" in text
    assert "padding [PAD]" in text


def test_class_entropy_is_the_loss_of_the_frequencies() -> None:
    assert class_entropy(np.array([3, 1]), np.array([0, 0])) is None
    expected = -(2 * np.log(0.75) + 5 * np.log(0.25)) / 7
    assert class_entropy(np.array([3, 1]), np.array([2, 5])) == pytest.approx(expected)


def test_order_of_classes() -> None:
    assert sorted_classes(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sorted_classes(["10", "9", "a"]) == ("10", "9", "a")
    classes, numbers = settle(["b", "unused", "a"], np.array([1, 0, 2]), np.array([0, 0, 1]))
    assert classes == ("a", "b")
    assert numbers.tolist() == [1, -1, 0]


def test_numbers_truth_values_and_names_are_classes(run: Any, tmp_path: Path) -> None:
    for values, names in (([10, 9], ("9", "10")), ([True, False], ("False", "True")), (["b  b", " a"], ("a", "b b"))):
        write(tmp_path / "rows.jsonl", [{"text": review(n), "label": values[n % 2]} for n in range(30)])
        assert run().classes.names == names


def test_the_label_travels_through_csv_tables_and_templates(run: Any, tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, ["title", "body", "label"])
        writer.writeheader()
        writer.writerows({"title": n, "body": review(n), "label": n % 2} for n in range(30))
    prepared = run({"files": ("rows.csv",), "template": "{{ title }}: {{ body }}"})
    samples = samples_of(prepared)
    assert prepared.classes.names == ("0", "1")
    for sample in range(len(samples)):
        ((_, document, text),) = samples.describe(sample)
        assert document.endswith(f"(class {int(text.split()[0]) % 2})")


def test_a_hub_dataset_brings_the_names_of_its_classes(run: Any, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "other": Value("int64")})
    table = {"text": [review(n) for n in range(30)], "label": [n % 2 for n in range(30)], "other": list(range(30))}
    (tmp_path / "hub").mkdir()
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
    prepared = run({"files": (), "hub": "hub"})
    assert prepared.classes.names == ("no", "yes")
    table["label"][4] = -1
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
    with pytest.raises(DataError, match="hub:5 has no class"):
        run({"files": (), "hub": "hub"})


def test_use_and_classes_choose_documents(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows(30))
    write(tmp_path / "b.jsonl", rows(15, first=100) + rows(3))
    sources = [{"files": ("a.jsonl",), "use": "train"}, {"files": ("b.jsonl",), "use": "held_out"}]
    prepared = run(*sources)
    assert [len(samples_of(prepared, split)) for split in ("train", "held_out")] == [27, 18]
    # what the test split shares with the training split is left out of this one, and told
    leaked = prepared.report["sources"][0]["removed"]["also in the held-out split"]
    assert leaked["documents"] == 3
    assert leaked["pairs"][0] == ["a.jsonl:1 (good)", "b.jsonl:16 (good)"]
    assert prepared.report["sources"][1]["removed"] == {}
    two = run(*({**source, "classes": ("good", "bad")} for source in sources))
    assert two.classes.names == ("bad", "good")
    assert [len(samples_of(two, split)) for split in ("train", "held_out")] == [18, 12]
    removed = two.report["sources"][0]["removed"]
    assert removed["not of the chosen classes"]["documents"] == 10
    with pytest.raises(DataError, match=r"source a\.jsonl: no record is of the class 'goood' .*did you mean 'good'\?"):
        run({"files": ("a.jsonl",), "classes": ("goood", "bad")})


def test_equal_texts_of_two_classes_are_a_conflict(run: Any, tmp_path: Path) -> None:
    write(
        tmp_path / "rows.jsonl", [*rows(30), {"text": review(0), "label": "bad"}, {"text": review(1), "label": "bad"}]
    )
    prepared = run()
    removed = prepared.report["sources"][0]["removed"]
    assert removed["conflicting labels"]["documents"] == 1
    assert removed["exact duplicate"]["documents"] == 1
    assert prepared.manifest["sources"][0]["removed"]["conflicting labels"]["examples"] == ["rows.jsonl:31"]
    # the first stays
    assert {name for split in ("train", "held_out") for name in names_of(prepared, split)} >= {"rows.jsonl:1 good"}


def names_of(prepared: Prepared, split: str) -> list[str]:
    samples = samples_of(prepared, split)
    found = [samples.describe(sample)[0][1] for sample in range(len(samples))]
    return [name.replace("(class ", "").removesuffix(")") for name in found]


WRONG = {
    "empty": ([{"text": "a", "label": " "}], r"rows\.jsonl:31 has no class: column 'label' is empty"),
    "null": ([{"text": "a", "label": None}], r"rows\.jsonl:31 has no class"),
    "missing": ([{"text": "a", "lable": "x"}], r"rows\.jsonl:31 has no column 'label': did you mean 'lable'\?"),
    "fraction": ([{"text": "a", "label": 0.5}], r"rows\.jsonl:31: column 'label' holds float, not a name"),
    "list": ([{"text": "a", "label": ["x"]}], r"rows\.jsonl:31: column 'label' holds list"),
}


@pytest.mark.parametrize(("records", "problem"), WRONG.values(), ids=WRONG)
def test_rows_without_a_class_are_refused(run: Any, tmp_path: Path, records: list[Any], problem: str) -> None:
    write(tmp_path / "rows.jsonl", rows(30) + records)
    with pytest.raises(DataError, match=problem) as raised:
        run()
    assert "\n" not in str(raised.value)


def test_classes_that_cannot_be_learned_are_refused(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{**row, "label": "good"} for row in rows(30)])
    with pytest.raises(DataError, match="all documents are of the class 'good': classification needs at least two"):
        run()
    write(tmp_path / "rows.jsonl", rows(30))
    write(tmp_path / "test.jsonl", [{"text": "awful", "label": "awful"}])
    with pytest.raises(DataError, match="held-out documents are of 'awful', and no training document is"):
        run({"use": "train"}, {"files": ("test.jsonl",), "use": "held_out"})
    with pytest.raises(DataError, match=r"'test\.jsonl': no `label`, which other sources have"):
        run({}, {"files": ("test.jsonl",), "label": None})
    (tmp_path / "plain.txt").write_text("some text")
    with pytest.raises(DataError, match="plain text without columns: leave out `column`, `template` and `label`"):
        run({"files": ("plain.txt",)})


def test_a_sample_has_room_for_text(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows(30))
    prepared = run()
    with pytest.raises(DataError, match=r"data\.sequence_length is 2"):
        prepared.samples("train", 2, "positions")


def test_the_fingerprint_covers_the_labels(run: Any, tmp_path: Path) -> None:
    records = rows(30)
    write(tmp_path / "rows.jsonl", records)
    before = run()
    records[3]["label"] = "dull"
    write(tmp_path / "rows.jsonl", records)
    after = run()
    assert before.fingerprint != after.fingerprint
    (before.path / "train" / "000.labels.npy").unlink()
    with pytest.raises(DataError, match=r"000\.labels\.npy is missing or damaged"):
        Prepared.open(before.path)


def test_a_tokenizer_without_padding_pads_with_end_of_text(run: Any, tmp_path: Path) -> None:
    names = ["<s>", "</s>", "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path / "llama"
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(path)
    write(tmp_path / "rows.jsonl", rows(30))
    prepared = run(tokenizer=TokenizerConfig(path=str(path)))
    saved = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    assert (saved.pad_token, saved.padding_side, prepared.classes.pad_id) == ("</s>", "right", 1)
    assert prepared.report["padding"] == "</s>"
    arrays = samples_of(prepared).fetch(np.arange(5))
    assert (arrays["input_ids"][:, 0] == 0).all()
    assert (arrays["input_ids"][arrays["attention_mask"] == 0] == 1).all()


def test_a_text_of_no_tokens_is_one_of_padding(run: Any, tmp_path: Path) -> None:
    names = ["<pad>", "<end>", *WORDS]
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>").save_pretrained(
        tmp_path / "bare"
    )
    write(tmp_path / "rows.jsonl", [*rows(30), {"text": "  ", "label": "good"}])
    prepared = run({"use": "train"}, tokenizer=TokenizerConfig(path=str(tmp_path / "bare")))
    samples = samples_of(prepared)
    (empty,) = [sample for sample in range(len(samples)) if "jsonl:31 " in samples.describe(sample)[0][1]]
    arrays = samples.fetch(np.array([empty]))
    assert (arrays["input_ids"] == 0).all()
    assert arrays["attention_mask"].sum() == 1


def test_unlabelled_data_keeps_its_key(tmp_path: Path) -> None:
    """Caches that were made before there were labels stay good."""
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(review(number, 60))
    tokenizer = TokenizerConfig.model_validate({"train": {"vocabulary": 300}})
    config = DataConfig(
        sources=(SourceConfig(files=("*.txt",)),), tokenizer=tokenizer, held_out=0.2, prepared=str(tmp_path / "cache")
    )
    prepared = prepare(config, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False)
    assert prepared.classes is None
    assert prepared.manifest["key"] == "fe4fa659a794e6de"
    assert not {"classes", "frame", "class_entropy"} & prepared.manifest.keys()


def test_micro_batches_end_with_their_longest_sample(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows(60))
    samples = samples_of(run(), length=32)
    order = Order(3, samples.sizes, samples.weights)
    whole = samples.fetch(order.batch(2, 8))

    def annotate(ids: np.ndarray, arrays: dict[str, Any]) -> dict[str, Any]:
        assert arrays["input_ids"].shape == (len(ids), 32)
        places = np.broadcast_to(np.arange(32, dtype=np.float32)[None, :, None], (len(ids), 32, 4)).copy()
        return {"places": places, "ids": ids, "one": np.zeros((len(ids), 1, 4), np.float32)}

    def stream(rank: int, ranks: int, micro: int) -> Stream:
        return Stream(samples, order, batch=8, micro=micro, rank=rank, ranks=ranks, objective=CLASSIFICATION, seed=3,
                      prefetch=0, annotate=annotate, alike=False)  # fmt: skip

    for ranks, micro in ((1, 8), (2, 2), (4, 1)):
        seen = []
        for rank in range(ranks):
            batch = stream(rank, ranks, micro).read(2)
            assert batch.num_targets == 8
            for number, arrays in enumerate(batch.micro_batches):
                first = (number * ranks + rank) * micro
                longest = whole["attention_mask"][first : first + micro].sum(axis=1).max()
                columns = min(32, -(-longest // 8) * 8)
                assert arrays["input_ids"].shape == arrays["attention_mask"].shape == (micro, columns)
                assert arrays["places"].shape == (micro, columns, 4)
                assert arrays["one"].shape == (micro, 1, 4)
                assert arrays["labels"].shape == (micro,)
                for name in ("input_ids", "attention_mask"):
                    assert np.array_equal(arrays[name], whole[name][first : first + micro, :columns])
                assert not whole["attention_mask"][first : first + micro, columns:].any()
                seen += list(zip(arrays["ids"].tolist(), arrays["labels"].tolist(), strict=True))
        assert sorted(seen) == sorted(zip(order.batch(2, 8).tolist(), whole["labels"].tolist(), strict=True))


def test_every_held_out_text_is_evaluated_once(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows(60))
    samples = samples_of(run(), "held_out")
    expected = np.bincount(samples.fetch(np.arange(len(samples)))["labels"]).tolist()
    found = []
    for rank in range(2):
        for arrays in evaluation_batches(
            samples, micro=4, rank=rank, ranks=2, max_samples=None, objective=CLASSIFICATION, seed=0
        ):
            assert arrays["input_ids"].shape[1] % 8 == 0
            found += arrays["labels"].tolist()
    assert len(found) % 8 == 0
    labels = [label for label in found if label != IGNORED]
    assert np.bincount(labels).tolist() == expected


def test_classes_and_the_objective_go_together(run: Any, make_samples: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows(60))
    labelled, plain = samples_of(run()), make_samples([50])
    for samples, objective, found in ((labelled, ObjectiveConfig(), "was prepared"), (plain, CLASSIFICATION, "has no")):
        with pytest.raises(DataError, match=f"the data {found}.*objective.kind is {objective.kind}"):
            Stream(samples, Order(1, samples.sizes, samples.weights), batch=2, micro=1, rank=0, ranks=1,
                   objective=objective, seed=1)  # fmt: skip
