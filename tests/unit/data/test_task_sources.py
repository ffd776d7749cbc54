"""Labels from hub datasets, tables and several processes; what is unknown or nearly the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config.schema import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from trainer.data import parts
from trainer.data.prepare import prepare
from trainer.data.questions import QuestionSamples
from trainer.errors import DataError

TEXT = "the film is a very good long bad dull story of two rivers and one house"


def words(seed: int, count: int) -> str:
    return f"{seed} " + " ".join(np.random.default_rng(seed).choice(TEXT.split(), count))


@pytest.fixture
def from_hub(tmp_path: Path, word_pieces: Path) -> Any:
    def make(kind: Any, table: dict[str, Any], features: Any = None, **source: Any) -> Any:
        from datasets import Dataset

        (tmp_path / "hub").mkdir()
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
        config = DataConfig(
            sources=(SourceConfig(hub="hub", **source),), held_out=0.3, prepared=str(tmp_path / "cache"),
            tokenizer=TokenizerConfig(path=str(word_pieces)), clean=CleanConfig(min_characters=1, min_letters=0),
        )  # fmt: skip
        return prepare(config, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False, kind=kind)

    return make


def test_tags_of_a_hub_dataset_have_names(from_hub: Any) -> None:
    from datasets import ClassLabel, Features, List, Value

    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-X"]))})
    tokens = [words(n, 6).split() for n in range(30)]
    prepared = from_hub(
        "token_classification", {"tokens": tokens, "tags": [[0, 1, 0, 0, 0, 0, n % 2] for n in range(30)]}, features,
        column="tokens", label="tags",
    )  # fmt: skip
    assert prepared.classes.names == ("B-X", "O")
    counts = sum(np.array(prepared.report["sources"][0][split]["classes"]) for split in ("train", "held_out"))
    assert counts.tolist() == [45, 165]


def test_questions_of_a_hub_dataset(from_hub: Any) -> None:
    contexts = [words(n, 9) for n in range(30)]
    answers = [{"text": [text.split()[1]], "answer_start": [text.index(" ") + 1]} for text in contexts]
    table = {"context": contexts, "question": ["what is good?"] * 30, "answers": answers}
    prepared = from_hub("question_answering", table, column="context", prompt="question", answer="answers")
    samples = prepared.samples("train", 32, "join")
    assert isinstance(samples, QuestionSamples)
    for sample, (first, last) in enumerate(samples.fetch(np.arange(len(samples)))["labels"].tolist()):
        assert samples.passage(sample, first, last) == samples.answers_of(sample)[0] != ""


def test_a_table_spells_lists_in_json(tmp_path: Path, prepare_rows: Any, word_pieces: Path) -> None:
    rows = [(words(n, 5).split(), ["O", "B-X", "O", "O", "O", "O"]) for n in range(30)]
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "tags"])
        writer.writerows((json.dumps(own), json.dumps(tags)) for own, tags in rows)
    jsonl = prepare_rows("token_classification", word_pieces, [{"text": a, "tags": b} for a, b in rows], label="tags")
    table = prepare_rows("token_classification", word_pieces, [], files=("rows.csv",), label="tags")
    for split in ("train", "held_out"):
        mine, its = (each.samples(split, 32, "join") for each in (table, jsonl))
        one, other = (each.fetch(np.arange(len(each))) for each in (mine, its))
        assert all(np.array_equal(one[name], other[name]) for name in one)


def contents(prepared: Any) -> dict[str, bytes]:
    files = sorted(path for path in prepared.path.rglob("*") if path.is_file())
    return {str(path.relative_to(prepared.path)): path.read_bytes() for path in files}


def test_workers_do_not_change_a_byte(
    prepare_rows: Any, word_pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": words(n, 9), "q": "what?", "a": words(n, 9).split()[3]} for n in range(60)]
    options = {"prompt": "q", "answer": "a"}
    whole = prepare_rows("question_answering", word_pieces, rows, prepared=str(tmp_path / "1"), workers=1, **options)
    monkeypatch.setattr(parts, "CHUNK_CHARACTERS", 900)
    monkeypatch.setattr("trainer.data.build._BYTES_WORTH_A_WORKER", 1000)
    two = prepare_rows("question_answering", word_pieces, rows, prepared=str(tmp_path / "2"), workers=2, **options)
    assert contents(whole) == contents(two)
    assert {path.rsplit(".", 1)[1] for path in contents(two)} == {
        "tokens", "npy", "names", "texts", "answers", "json",
    }  # fmt: skip


def test_what_only_held_out_words_are_tagged_with_is_named(prepare_rows: Any, word_pieces: Path) -> None:
    def row(n: int, tag: str) -> dict[str, Any]:
        return {"text": words(n, 3).split(), "t": ["O", "B-X", "O", tag]}

    sources = [([row(n, "O") for n in range(9)], {"use": "train"}), ([row(50, "B-Y")], {"use": "held_out"})]
    with pytest.raises(DataError, match="held-out documents are of 'B-Y', and no training document is"):
        prepare_rows("token_classification", word_pieces, sources, label="t")
    spans = [{"start": 0, "end": 1, "label": "X"}]
    sources = [([{"text": words(1, 9), "t": spans}], {"use": "train"}),
               ([{"text": words(2, 9), "t": [{**spans[0], "end": 9}]}], {"use": "held_out"})]  # fmt: skip
    # an entity of several words, where all that were learned are of one
    prepared = prepare_rows("token_classification", word_pieces, sources, label="t")
    assert prepared.classes.names == ("B-X", "I-X", "O")
    labels = prepared.samples("held_out", 32, "join").fetch(np.arange(1))["labels"][0]
    assert [prepared.classes.names[n] for n in labels[labels >= 0]].count("I-X") >= 1


def test_what_is_nearly_held_out_is_a_leak(prepare_rows: Any, word_pieces: Path) -> None:
    clean = CleanConfig(min_characters=1, min_letters=0, near_duplicates=0.8)
    long = words(1, 60)
    train = [{"text": words(n, 40), "label": "ab"[n % 2]} for n in range(20)] + [{"text": f"{long} one", "label": "a"}]
    sources = [(train, {"use": "train"}), ([{"text": long, "label": "a"}], {"use": "held_out"})]
    prepared = prepare_rows("classification", word_pieces, sources, label="label", clean=clean)
    leaked = prepared.report["sources"][0]["removed"]["also in the held-out split"]
    assert leaked["pairs"] == [["rows-0.jsonl:21 (a)", "rows-1.jsonl:1 (a)"]]
    # many questions about one text are no duplicates
    rows = [{"text": long, "q": f"what {n}?", "a": "one" if "one" in long else "the"} for n in range(30)]
    prepared = prepare_rows("question_answering", word_pieces, rows, prompt="q", answer="a", clean=clean)
    assert sum(prepared.total("documents", split) for split in ("train", "held_out")) == 30
    # all of one text are in one split
    assert 30 in [prepared.total("documents", split) for split in ("train", "held_out")]


def test_a_smaller_tokenizer_knows_all_texts_of_pairs(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [{"text": f"{n} the film", "b": "xyz good" if n % 2 else "dull", "y": n} for n in range(30)]
    whole = prepare_rows("regression", word_pieces, rows, label="y", pair="b")
    tokenizer = TokenizerConfig(path=str(word_pieces), keep="used")
    small = prepare_rows("regression", tokenizer, rows, label="y", pair="b")
    assert small.vocabulary < whole.vocabulary
    for split in ("train", "held_out"):
        one, other = (each.samples(split, 32, "join").fetch(np.arange(3)) for each in (whole, small))
        assert np.array_equal(small.kept[other["input_ids"]], one["input_ids"])
        assert np.array_equal(one["labels"], other["labels"])
