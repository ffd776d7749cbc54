"""`trimtab evaluate` over the held-out data of a config: the same scores as over its file, for every kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluate_command import evaluated, labels, refused, reviews, save, write

TAGS = ("B-X", "I-X", "O")


def rows_of(kind: str, number: int = 13) -> list[dict[str, Any]]:
    rows = reviews(number)
    for n, row in enumerate(rows):
        words = row["text"].split()
        # a text of its own each, also among those that are learned
        row["text"] = f"{row['text']} {n // 10} {n % 10}"
        match kind:
            case "multi_label":
                row["label"] = ["a", "c"][: n % 3] if n else ["b"]
            case "regression":
                row["label"] = n / 7
            case "token_classification":
                row["text"], row["label"] = row["text"].split(), [TAGS[i % 3] for i in range(len(words) + 2)]
            case "question_answering":
                row |= {"label": words[0], "question": f"what of {words[-1]} ?"}
            case "seq2seq":
                row["label"] = " ".join(words[::-1])
            case "masked":
                del row["label"]
    return rows


def config(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """All of the rows held out, beside others that are learned."""
    learned = [
        row | {"text": [*row["text"], "the"] if isinstance(row["text"], list) else f"the {row['text']}"} for row in rows
    ]
    for row in learned:
        if kind == "token_classification":
            row["label"] = [*row["label"], "O"]
    write(folder / "learned.jsonl", learned)
    own = {
        "masked": {},
        "question_answering": {"prompt": "question", "answer": "label"},
        "seq2seq": {"prompt": "text", "answer": "label"},
    }
    columns = own.get(kind, {"label": "label"})
    sources = [
        {"name": name, "files": [f"{name}.jsonl"], "use": use, **columns}
        for name, use in (("learned", "train"), ("rows", "held_out"))
    ]
    clean = {"min_characters": 1, "min_letters": 0, "near_duplicates": None}
    given = {
        "name": "x",
        "data": {"sources": sources, "sequence_length": 32, "clean": clean},
        "objective": {"kind": kind},
        "model": {"pretrained": "model"},
        "stage": "finetune",
        "batch": {"samples": 4, "micro": 4},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": 2, "warmup": 0},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(given))
    return path


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("BertForSequenceClassification", labels("bad", "dull", "good")),
    "multi_label": (
        "BertForSequenceClassification",
        labels("a", "b", "c") | {"problem_type": "multi_label_classification"},
    ),
    "regression": ("BertForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}),
    "token_classification": ("BertForTokenClassification", labels(*TAGS)),
    "question_answering": ("BertForQuestionAnswering", {}),
    "seq2seq": ("BartForConditionalGeneration", {}),
    "masked": ("BertForMaskedLM", {}),
}


@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "masked"])
def test_a_config_and_its_file_give_the_same_scores(tmp_path: Path, kind: str) -> None:
    rows = rows_of(kind)
    name, options = HEADS[kind]
    model, data = save(tmp_path / "model", name, **options), write(tmp_path / "rows.jsonl", rows)
    columns = ["--label=label", *(["--second=question"] if kind == "question_answering" else [])]
    common = ("--batch=4", "--tokens=6", "--length=32")
    (of_file,) = evaluated(tmp_path, model, "--data", data, *columns, *common)["models"]
    (of_config,) = evaluated(tmp_path, model, "--data", config(tmp_path, kind, rows), *common)["models"]
    assert of_config["texts"] == of_file["texts"] == len(rows)
    assert of_config["scores"] == pytest.approx(of_file["scores"], rel=1e-5, abs=1e-7)
    assert of_config.get("generated") == of_file.get("generated")
    assert ("generated" in of_file) == (kind == "seq2seq")


def test_masked_tokens_are_those_of_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("masked", 60)
    model, data = save(tmp_path / "model", "BertForMaskedLM"), write(tmp_path / "rows.jsonl", rows)
    path = config(tmp_path, "masked", rows)
    (found,) = evaluated(tmp_path, model, "--data", path, "--batch=4")["models"]
    (again,) = evaluated(tmp_path, model, "--data", path, "--batch=7")["models"]
    assert found["scores"] == pytest.approx(again["scores"], rel=1e-6)
    assert found["scores"]["perplexity"] == pytest.approx(np.exp(found["scores"]["loss"]))
    assert found["scores"]["loss"] > 1
    capsys.readouterr()
    assert "is a masked model, whose score needs masks: evaluate its run" in refused(capsys, model, "--data", data)
