"""Several tasks from the command line: one killed run ends with the bits of a whole one; scores and models by task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast
from workspace import SENTENCES, Workspace

pytestmark = pytest.mark.timeout(400)

CONFIG = {
    "name": "whole",
    "seed": 5,
    "precision": "fp32",
    "data": {
        "sources": [
            {"task": "sides", "files": ["sides.jsonl"], "label": "side"},
            {"task": "notes", "files": ["notes.jsonl"], "label": "notes", "weight": 2.0},
            {"task": "near", "files": ["near.jsonl"], "label": "near", "pair": "other"},
        ],
        "clean": {"min_characters": 1, "min_letters": 0.0, "near_duplicates": None},
        "tokenizer": {"path": "words"},
        "temperature": 2.0,
        "sequence_length": 48,
        "held_out": 0.2,
        "augment": {"delete": 0.1, "mask": 0.1},
    },
    "model": {
        "config": {
            "model_type": "bert",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 48,
        }
    },
    "objective": {
        "kind": "several",
        "tasks": [
            {"name": "sides", "kind": "classification"},
            {"name": "notes", "kind": "multi_label", "weight": 0.5},
            {"name": "near", "kind": "regression"},
        ],
        "label_smoothing": 0.1,
        "mixup": 0.4,
        "adversarial": {"kind": "freelb", "steps": 2},
    },
    "batch": {"samples": 8, "micro": 2},
    "optim": {"lr": 1e-3},
    "schedule": {"duration": 14, "warmup": 2},
    "zero": {"stage": 2},
    "evaluation": {"every": 5, "best": "sides/f1_macro"},
    "checkpoint": {"every": 4, "background": False},
    "cluster": {"ranks_per_node": 2, "device": "cpu"},
}
NAMES = {"sides": ["left", "right"], "notes": ["big", "odd"], "near": ["LABEL_0"]}


def write(root: Path) -> None:
    """Tokens, and three files of unequal size."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *map(str, range(200))]
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(root / "words")
    rows = {
        "sides": [{"text": f"{SENTENCES[n % 4]} {n}", "side": "left" if n % 4 < 1 else "right"} for n in range(90)],
        "notes": [{"text": f"{SENTENCES[n % 4]} {n} note", "notes": ["odd"] * (n % 2) + ["big"] * (n > 20)}
                  for n in range(40)],
        "near": [{"text": f"{n} {SENTENCES[n % 4]}", "other": f"note {n * 3}", "near": n / 40} for n in range(40)],
    }  # fmt: skip
    for name, records in rows.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (root / "config.yaml").write_text(json.dumps(CONFIG))


def test_killed_it_ends_with_the_same_bits_and_each_task_has_scores_and_a_model(workspace: Workspace) -> None:
    write(workspace.root)
    code, output = workspace.trimtab("run", "config.yaml")
    assert code == 0, output
    assert "Loading weights" not in output
    assert "Writing model shards" not in output
    code, killed = workspace.trimtab("run", "config.yaml", "name=killed", 'faults=["at(step=7, rank=1).kill()"]')
    assert code == 0, killed
    # after a restart there is less to go back to than before: only without an incident the bits are the same
    assert not any(record["kind"] == "incident" for record in workspace.ledger("whole"))
    assert workspace.final_state("killed") == workspace.final_state("whole")
    scores = [
        [record["scores"] for record in workspace.ledger(name) if record["kind"] == "evaluation"]
        for name in ("whole", "killed")
    ]
    assert scores[0][-1] == scores[1][-1]
    assert {"sides/f1_macro", "notes/f1_micro", "near/mae"} <= set(scores[0][-1])  # type: ignore[call-overload]
    assert "accuracy" not in scores[0][-1]  # type: ignore[operator]
    root = workspace.run_dir("whole")
    predicted = parquet.read_table(root / "predictions.parquet").to_pylist()
    report = json.loads((root / "data.json").read_text())["report"]
    assert len(predicted) == report["samples"]["held_out"]
    assert {row["truth"].split(":")[0] for row in predicted} == set(NAMES)
    assert all(row["prediction"].split(":")[0] == row["truth"].split(":")[0] for row in predicted)

    for task, names in NAMES.items():
        config = AutoConfig.from_pretrained(root / "export" / "tasks" / task)
        assert list(config.id2label.values()) == names
    # a second export takes the place of the first, tasks and all
    code, output = workspace.trimtab("export", str(root))
    assert code == 0, output
    assert {path.name for path in (root / "export" / "tasks").iterdir()} == set(NAMES)

    code, output = workspace.trimtab(
        "evaluate", str(root), str(workspace.run_dir("killed")), "--compare", "--resamples", "50", "--json", "s.json"
    )
    assert code == 0, output
    found = json.loads((workspace.root / "s.json").read_text())
    assert found["models"][0]["scores"] == found["models"][1]["scores"]
    assert {name.split("/")[0] for name in found["models"][0]["scores"]} == set(NAMES)
    code, output = workspace.trimtab(
        "evaluate", str(root / "export" / "tasks" / "sides"), "--data", "sides.jsonl", "--label", "side"
    )
    assert code == 0, output
    assert "f1_macro" in output
