"""Several labels, numbers, pairs, folders; balance and leaks; every way in which labels can be wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from trainer.config.objective import ObjectiveConfig
from trainer.config.schema import DataConfig, SourceConfig, TokenizerConfig
from trainer.data.classes import labels_entropy
from trainer.data.labelled import LabelledSamples
from trainer.data.order import Order
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared
from trainer.data.report import table
from trainer.data.stream import Stream, evaluation_batches
from trainer.errors import DataError

TEXT = "the film is a very good long bad dull story of two rivers and one house"
WORDS = TEXT.split()
SETS = ([], ["a"], ["b"], ["b", "a"], ["c"])


def text(number: int, length: int | None = None) -> str:
    generator = np.random.default_rng(number)
    return f"{number} " + " ".join(generator.choice(WORDS, length or int(generator.integers(1, 20))))


def labelled(prepared: Prepared, split: Any = "train", length: int = 16) -> LabelledSamples:
    samples = prepared.samples(split, length, "positions")
    assert isinstance(samples, LabelledSamples)
    return samples


def row_of(samples: LabelledSamples, sample: int) -> int:
    ((_, name, _),) = samples.describe(sample)
    return int(name.split(":")[1].split(" ")[0]) - 1


@pytest.mark.parametrize("written", ["list", "commas"])
def test_several_labels(prepare_rows: Any, word_pieces: Path, written: str) -> None:
    given = [SETS[n % 5] if written == "list" else ", ".join(SETS[n % 5]) for n in range(60)]
    prepared = prepare_rows(
        "multi_label", word_pieces, [{"text": text(n), "label": given[n]} for n in range(60)], label="label"
    )
    assert prepared.classes.names == ("a", "b", "c")
    counts = {}
    for split in ("train", "held_out"):
        samples = labelled(prepared, split)
        arrays = samples.fetch(np.arange(len(samples)))
        assert arrays["labels"].dtype == np.float32
        for sample, labels in enumerate(arrays["labels"]):
            names = {name for name, on in zip("abc", labels, strict=True) if on}
            assert names == set(SETS[row_of(samples, sample) % 5])
        counts[split] = (arrays["labels"].sum(axis=0), len(samples))
        assert samples.class_counts().tolist() == counts[split][0].tolist()
    (train, n), (held_out, m) = counts["train"], counts["held_out"]
    p = (train + 1) / (n + 2)
    expected = -(held_out * np.log(p) + (m - held_out) * np.log(1 - p)).sum() / m / 3
    assert prepared.report["class_entropy"] == pytest.approx(expected)
    assert prepared.classes.rates == pytest.approx(tuple(p))
    assert labels_entropy(train, held_out, n, 0) is None
    shown = io.StringIO()
    Console(file=shown, width=150).print(table(prepared.report_at(16)))
    assert f"{int(train[0])}" in shown.getvalue()


def test_numbers(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [{"text": text(n), "score": n / 7 if n % 2 else str(n / 7)} for n in range(40)]
    prepared = prepare_rows("regression", word_pieces, rows, label="score")
    assert prepared.classes is not None
    assert prepared.classes.names == ()
    samples = labelled(prepared)
    labels = samples.fetch(np.arange(len(samples)))["labels"]
    assert labels.dtype == np.float32
    assert labels.tolist() == [np.float32(row_of(samples, sample) / 7) for sample in range(len(samples))]
    held_out = labelled(prepared, "held_out")
    objective = ObjectiveConfig(kind="regression")
    found = [batch["labels"] for rank in range(2)
             for batch in evaluation_batches(held_out, micro=len(held_out) - 1, rank=rank, ranks=2, max_samples=None,
                                             objective=objective, seed=0)]  # fmt: skip
    values = np.concatenate(found)
    assert np.isfinite(values).sum() == len(held_out)
    assert len(values) > len(held_out)
    assert sorted(values[np.isfinite(values)]) == sorted(held_out.fetch(np.arange(len(held_out)))["labels"])


def test_pairs_are_what_the_tokenizer_makes_of_two_texts(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [{"text": text(n), "other": text(n + 500), "label": "yn"[n % 2]} for n in range(40)]
    prepared = prepare_rows("classification", word_pieces, rows, label="label", pair="other")
    reference: Any = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    samples = labelled(prepared, length=24)
    arrays = samples.fetch(np.arange(len(samples)))
    for sample in range(len(samples)):
        row = rows[row_of(samples, sample)]
        expected = reference(row["text"], row["other"], truncation="longest_first", max_length=24, padding="max_length")
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert arrays[name][sample].tolist() == expected[name], name
    cut = sum(len(reference(rows[row_of(samples, s)]["text"], rows[row_of(samples, s)]["other"]).input_ids) > 24
              for s in range(len(samples)))  # fmt: skip
    assert prepared.report_at(24)["cut"]["train"] == cut > 0


def test_folders_are_classes(tmp_path: Path, word_pieces: Path) -> None:
    for n in range(30):
        path = tmp_path / "texts" / ("bad", "good")[n % 2] / f"{n}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(n, 10))
    config = DataConfig(
        sources=(SourceConfig(files=("texts/**/*.txt",), label_from_folder=True),), held_out=0.3,
        tokenizer=TokenizerConfig(path=str(word_pieces)), prepared=str(tmp_path / "cache"),
    )  # fmt: skip
    prepared = prepare(config, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False, kind="classification")
    assert prepared.classes is not None
    assert prepared.classes.names == ("bad", "good")
    samples = labelled(prepared)
    for sample, label in enumerate(samples.fetch(np.arange(len(samples)))["labels"]):
        name = samples.describe(sample)[0][1]
        assert f"/{('bad', 'good')[label]}/" in name


@pytest.mark.parametrize("shuffle", [True, False])
def test_balance_shows_each_class_equally_often(prepare_rows: Any, word_pieces: Path, shuffle: bool) -> None:
    """Whatever the classes' sizes and the sources' weights, the same for every world size."""
    rows = [{"text": text(n), "label": "a" if n % 10 else ("b" if n % 20 else "c")} for n in range(200)]
    sources = [(rows[:100], {}), (rows[100:], {"weight": 2.0})]
    prepared = prepare_rows("classification", word_pieces, sources, label="label", balance="classes")
    samples = labelled(prepared)
    order = Order(5, samples.sizes, samples.weights, shuffle)
    for epoch in range(2):
        ids = order.samples(epoch * order.epoch_length, order.epoch_length)
        counts = np.bincount(samples.fetch(ids)["labels"])
        assert abs(counts - counts.mean()).max() <= 2
    plain = prepare_rows("classification", word_pieces, sources, label="label")
    assert plain.path == prepared.path
    assert abs(order.epoch_length - Order(5, labelled(plain).sizes, labelled(plain).weights).epoch_length) <= 3
    # every sample once: ids are another numbering of the same
    assert sorted(samples.document_of(np.arange(len(samples)))) == list(range(len(samples)))
    assert samples.class_counts().tolist() == labelled(plain).class_counts().tolist()
    # within a class a source of weight 2 is seen twice as often
    ids = order.samples(0, 10 * order.epoch_length)
    in_a = samples.fetch(ids)["labels"] == 0
    first = len(plain.samples("train", 16, "join").sources[0].offsets) - 1
    of_second = samples.document_of(ids)[in_a] >= first
    number = [np.flatnonzero(samples.fetch(np.arange(len(samples)))["labels"] == 0)]
    documents = samples.document_of(number[0])
    expected = 2 * (documents >= first).sum() / ((documents < first).sum() + 2 * (documents >= first).sum())
    assert of_second.mean() == pytest.approx(expected, abs=0.02)
    objective = ObjectiveConfig(kind="classification")

    def labels(ranks: int, micro: int) -> list[int]:
        streams = [Stream(samples, order, batch=8, micro=micro, rank=rank, ranks=ranks, objective=objective, seed=5,
                          prefetch=0, alike=False) for rank in range(ranks)]  # fmt: skip
        batches = [stream.read(7).micro_batches for stream in streams]
        return [label for step in zip(*batches, strict=True) for arrays in step for label in arrays["labels"].tolist()]

    assert labels(1, 8) == labels(2, 2) == labels(4, 1)
    with pytest.raises(
        DataError, match=r"data\.balance: classes is for objective\.kind classification, not regression"
    ):
        labelled(
            prepare_rows(
                "regression", word_pieces, [{"text": text(n), "y": n} for n in range(20)], label="y", balance="classes"
            )
        )


def test_windows_of_a_text_share_its_label_and_its_number(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [{"text": text(n, 1 + n), "label": "ab"[n % 2]} for n in range(60)]
    prepared = prepare_rows("classification", word_pieces, rows, label="label", too_long="window", stride=3)
    samples = labelled(prepared)
    arrays = samples.fetch(np.arange(len(samples)))
    whole = labelled(prepare_rows("classification", word_pieces, rows, label="label"), length=200)
    lengths = whole.num_ordinary(np.arange(len(whole)))
    texts: dict[int, list[int]] = {}
    documents = samples.document_of(np.arange(len(samples)))
    for sample, document in enumerate(documents.tolist()):
        assert arrays["labels"][sample] == whole.fetch(np.array([document]))["labels"][0]
        tokens = arrays["input_ids"][sample][1 : int(arrays["attention_mask"][sample].sum()) - 1].tolist()
        texts[document] = texts[document] + tokens[3:] if document in texts else tokens
    expected = whole.fetch(np.arange(len(whole)))["input_ids"]
    assert texts == {n: expected[n, 1 : 1 + lengths[n]].tolist() for n in range(len(whole))}
    report = prepared.report_at(16)
    assert report["cut"]["train"] == (lengths > 14).sum() > 0
    assert report["samples"]["train"] == len(samples) == (1 - (-np.maximum(0, lengths - 14) // 11)).sum()
    left = labelled(prepare_rows("classification", word_pieces, rows, label="label", too_long="leave_out"))
    assert left.document_of(np.arange(len(left))).tolist() == np.flatnonzero(lengths <= 14).tolist()
    shown = io.StringIO()
    Console(file=shown, width=150).print(table(report))
    assert "longer than 16 tokens, in windows" in shown.getvalue()


def test_conflicts_and_leaks_are_shown_with_both_names(prepare_rows: Any, word_pieces: Path) -> None:
    train = [{"text": text(n), "label": ["a"] if n % 2 else ["b"]} for n in range(30)]
    test = [{"text": text(n + 100), "label": ["a"]} for n in range(9)] + [{"text": text(3), "label": ["b"]}]
    sources = [([*train, {"text": text(4), "label": []}], {"use": "train"}), (test, {"use": "held_out"})]
    prepared = prepare_rows("multi_label", word_pieces, sources, label="label")
    first, second = prepared.report["sources"]
    assert first["removed"]["also in the held-out split"]["pairs"] == [["rows-0.jsonl:4 (a)", "rows-1.jsonl:10 (b)"]]
    assert first["removed"]["conflicting labels"]["pairs"] == [["rows-0.jsonl:31 (none)", "rows-0.jsonl:5 (b)"]]
    assert second["removed"] == {}
    shown = io.StringIO()
    Console(file=shown, width=150).print(table(prepared.report))
    for pair in ("rows-0.jsonl:4 (a) = rows-1.jsonl:10 (b)", "rows-0.jsonl:31 (none) = rows-0.jsonl:5 (b)"):
        assert pair in shown.getvalue()


WRONG: dict[str, tuple[str, Any, str]] = {
    "infinite": ("regression", "inf", r"rows-0\.jsonl:21: column 'label' holds 'inf', not a finite number"),
    "not a number": ("regression", "high", "holds 'high', not a finite number, which regression needs"),
    "null": ("regression", None, "holds None, not a finite number"),
    "true": ("regression", True, "holds True, not a finite number"),
    "beyond float32": ("regression", 1e39, "holds 1e\\+39, not a finite number"),
    "fraction": ("multi_label", [0.5], "column 'label' is not a list of names, nor names between commas"),
    "empty name": ("multi_label", ["a", " "], "is not a list of names"),
}


@pytest.mark.parametrize(("kind", "value", "problem"), WRONG.values(), ids=WRONG)
def test_wrong_labels_are_one_sentence(
    prepare_rows: Any, word_pieces: Path, kind: str, value: Any, problem: str
) -> None:
    good: Any = 1.5 if kind == "regression" else ["a"]
    rows = [{"text": text(n), "label": good} for n in range(20)] + [{"text": "one", "label": value}]
    with pytest.raises(DataError, match=problem) as raised:
        prepare_rows(kind, word_pieces, rows, label="label")
    assert "\n" not in str(raised.value)


def test_what_the_kind_needs_is_named(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [{"text": text(n), "label": ["a"]} for n in range(20)]
    for kind in ("multi_label", "regression", "token_classification"):
        with pytest.raises(DataError, match=rf"no `label`, which objective\.kind {kind} needs"):
            prepare_rows(kind, word_pieces, rows)
    with pytest.raises(DataError, match=r"rows-0\.jsonl:1 has no column 'labels': did you mean 'label'\?"):
        prepare_rows("multi_label", word_pieces, rows, label="labels")
    with pytest.raises(DataError, match="held-out documents are of 'z', and no training document is"):
        prepare_rows(
            "multi_label",
            word_pieces,
            [(rows, {"use": "train"}), ([{"text": "z", "label": ["a", "z"]}], {"use": "held_out"})],
            label="label",
        )
    with pytest.raises(DataError, match="no training document has a class: classification needs at least one"):
        prepare_rows("multi_label", word_pieces, [{"text": text(n), "label": []} for n in range(20)], label="label")
    pairs = [{"text": text(n), "b": text(n), "label": ["a"]} for n in range(20)]
    prepared = prepare_rows("multi_label", word_pieces, pairs, label="label", pair="b", too_long="window")
    with pytest.raises(DataError, match=r"windows are not for pairs of texts; use cut or leave_out"):
        labelled(prepared)


def test_an_empty_text_is_counted(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [{"text": text(n), "b": text(n + 1), "y": n} for n in range(20)] + [
        {"text": "", "b": "one", "y": 1},
        {"text": "one", "b": " ", "y": 1},
    ]
    prepared = prepare_rows("regression", word_pieces, rows, label="y", pair="b")
    assert prepared.report["sources"][0]["removed"]["empty"]["documents"] == 2


def test_labels_that_are_not_used_change_nothing(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [{"text": text(n), "label": "ab"[n % 2]} for n in range(40)]
    for kind in ("causal", "masked"):
        plain, other = prepare_rows(kind, word_pieces, rows), prepare_rows(kind, word_pieces, rows, label="label")
        assert plain.path == other.path
        assert other.classes is other.kind is None
    both = [prepare_rows(kind, word_pieces, rows, label="label") for kind in (None, "classification")]
    assert both[0].path == both[1].path
    assert "kind" not in both[0].manifest


def test_damage_is_noticed(prepare_rows: Any, word_pieces: Path) -> None:
    prepared = prepare_rows("regression", word_pieces, [{"text": text(n), "y": n} for n in range(20)], label="y")
    before = prepared.fingerprint
    (prepared.path / "train" / "000.labels.npy").unlink()
    with pytest.raises(DataError, match=r"000\.labels\.npy is missing or damaged"):
        Prepared.open(prepared.path)
    other = prepare_rows(
        "regression", word_pieces, [{"text": text(n), "y": n + (n == 3)} for n in range(20)], label="y"
    )
    assert other.fingerprint != before
    assert json.loads((other.path / "manifest.json").read_text())["kind"] == "regression"
