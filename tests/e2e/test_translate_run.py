"""A model that writes: a small encoder–decoder learns from nothing over two ranks, is exported, and is asked to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from workspace import SENTENCES, Workspace

pytestmark = pytest.mark.timeout(300)

CONFIG: dict[str, Any] = {
    "name": "marian",
    "seed": 5,
    "precision": "fp32",
    "data": {
        "sources": [{"files": ["pairs.jsonl"], "prompt": "from", "answer": "to"}],
        "clean": {"min_characters": 1, "near_duplicates": None},
        "tokenizer": {"train": {"vocabulary": 384}},
        "sequence_length": 32,
        "held_out": 0.2,
    },
    # whose positions are weights that nobody trains
    "model": {
        "config": {
            "model_type": "marian",
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 32,
            "dropout": 0.0,
        }
    },
    "objective": {"kind": "seq2seq"},
    "batch": {"samples": 8, "micro": 2},
    "optim": {"lr": 1e-2},
    "schedule": {"duration": 30, "warmup": 3},
    "zero": {"stage": 2},
    "evaluation": {"every": 30},
    "checkpoint": {"every": 30},
    "cluster": {"ranks_per_node": 2, "device": "cpu"},
}


def test_what_was_learned_is_exported_and_written(workspace: Workspace) -> None:
    pairs = [{"from": f"{n} {SENTENCES[n % 4]}", "to": SENTENCES[n % 4]} for n in range(90)]
    (workspace.root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    workspace.config.write_text(json.dumps(CONFIG))
    code, output = workspace.trimtab("run", "config.yaml")
    assert code == 0, output
    (told,) = [record for record in workspace.ledger("marian") if record["kind"] == "evaluation"]
    code, output = workspace.trimtab("evaluate", str(workspace.run_dir("marian")), "--tokens", "20", "--json", "s.json")
    assert code == 0, output
    (found,) = json.loads((workspace.root / "s.json").read_text())["models"]
    assert found["scores"]["loss"] == pytest.approx(told["loss"], rel=1e-6)
    assert {"bleu", "chrf", "perplexity"} <= set(found["scores"])

    export = workspace.run_dir("marian") / "export"
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForSeq2SeqLM.from_pretrained(export)
    with torch.no_grad():
        asked = tokenizer([pair["from"] for pair in pairs], padding=True, return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=20, num_beams=1, do_sample=False)
    assert len(found["generated"]) == 3
    assert set(found["generated"]) <= {
        text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)
    }
    assert all(found["generated"])
