"""A fine-tuning run with all that is drawn at random: killed in the middle of an epoch, it ends with the same bits."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
from workspace import SENTENCES, Workspace

pytestmark = pytest.mark.timeout(300)

CONFIG = {
    "name": "whole",
    "seed": 5,
    "precision": "fp32",
    "data": {
        "sources": [{"files": ["labelled.jsonl"], "label": "side", "pair": "more"}],
        "clean": {"min_characters": 1, "near_duplicates": None},
        "tokenizer": {"train": {"vocabulary": 384}},
        "sequence_length": 48,
        "held_out": 0.2,
        "augment": {"delete": 0.1, "swap": 0.1, "typos": 0.05, "mask": 0.1},
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
        "kind": "classification",
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "mixup": 0.4,
        "adversarial": {"kind": "freelb", "steps": 2},
        "l2_start": 0.01,
    },
    "batch": {"samples": 8, "micro": 2},
    "optim": {"lr": 1e-3, "layer_decay": 0.8, "ema": 0.9},
    "schedule": {"duration": 14, "warmup": 2},
    "zero": {"stage": 2},
    "evaluation": {"every": 5, "best": "f1_macro"},
    "checkpoint": {"every": 4, "background": False},
    "cluster": {"ranks_per_node": 2, "device": "cpu"},
}


def scores_of_texts(workspace: Workspace) -> int:
    """Texts that the newest evaluation predicted."""
    return int(pyarrow.parquet.read_metadata(workspace.run_dir("whole") / "predictions.parquet").num_rows)


def test_killed_in_the_middle_of_an_epoch_it_ends_with_the_same_bits(workspace: Workspace) -> None:
    texts = [
        {"text": f"{SENTENCES[n % 4]} {n}", "more": f"note {n * 31}", "side": "left" if n % 4 < 1 else "right"}
        for n in range(90)
    ]
    (workspace.root / "labelled.jsonl").write_text("\n".join(map(json.dumps, texts)))
    workspace.config.write_text(json.dumps(CONFIG))
    code, output = workspace.trimtab("run", "config.yaml")
    assert code == 0, output
    code, output = workspace.trimtab("run", "config.yaml", "name=killed", 'faults=["at(step=7, rank=1).kill()"]')
    assert code == 0, output
    attempts = {
        name: [record for record in workspace.ledger(name) if record["kind"] == "attempt"]
        for name in ("whole", "killed")
    }
    # the best evaluation so far was at step 5, and is kept
    assert [record["start"] for record in attempts["killed"]].count(2) == 14 - 5
    last = {record["step"]: (record["loss"], record["parts"]) for record in attempts["killed"]}
    assert last == {record["step"]: (record["loss"], record["parts"]) for record in attempts["whole"]}
    assert set(last[14][1]) == {"adversarial", "penalty"}
    assert len({record["epoch"] for record in attempts["whole"]}) == 2
    assert workspace.final_state("killed") == workspace.final_state("whole")
    scores = [[r["scores"] for r in workspace.ledger(name) if r["kind"] == "evaluation"] for name in attempts]
    assert scores[0][-1] == scores[1][-1]
    assert {"accuracy", "f1_macro", "matthews", "auc"} <= set(scores[0][-1])  # type: ignore[arg-type]
    looked = [record for record in workspace.ledger("whole") if record["kind"] == "predictions"]
    assert [record["step"] for record in looked] == [5, 10, 14]
    confusion = looked[-1]["confusion"]
    assert sum(map(sum, confusion)) == scores_of_texts(workspace)  # type: ignore[call-overload]
    page = (workspace.run_dir("whole") / "report.html").read_text()
    assert "best by f1_macro" in page
    assert all(heading in page for heading in ("<h2>Confusion</h2>", "<h2>Worst errors</h2>", "<h2>Augmentation"))
    for changed in ("delete", "swap", "typos", "mask"):
        assert changed in (workspace.run_dir("whole") / "augmentation.md").read_text()

    asked = (str(workspace.run_dir("whole")), "--noise", "typos=0.1", "--json")
    code, output = workspace.trimtab("evaluate", *asked, "one.json")
    assert code == 0, output
    assert json.loads((workspace.root / "one.json").read_text())["models"][0]["noisy"]
    ranks = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "trainer.evaluate")
    code, output = workspace.call(*ranks, *asked, "two.json")
    assert code == 0, output
    assert (workspace.root / "two.json").read_bytes() == (workspace.root / "one.json").read_bytes()
