"""`trimtab teach` with a real teacher, then a run that reads what it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def make_teacher(workspace: Workspace) -> Path:
    """A teacher with the tokenizer of the run, whose vocabulary is padded."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    folder = workspace.root / "teacher"
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    for path in workspace.root.glob("data-cache/*/tokenizer/*"):
        shutil.copy(path, folder)
    return folder


def test_taught_once_then_read(prepared: Workspace) -> None:
    teacher = make_teacher(prepared)
    options = ["stage=distill", "distill.teacher={place: cache, pretrained: teacher}", "distill.cache.top=8"]
    code, output = prepared.trimtab("teach", "config.yaml", *options)
    assert code == 0, output
    assert "the 8 most probable tokens, fp16" in output
    (cache,) = (prepared.root / "teacher-cache").glob("*/complete")
    stamps = {path: path.stat().st_mtime_ns for path in cache.parent.rglob("*.bin")}
    assert len(stamps) > 60
    code, output = prepared.trimtab("teach", "config.yaml", *options, "--sharded")
    assert code == 0, output
    assert "nothing was missing" in output
    assert {path: path.stat().st_mtime_ns for path in cache.parent.rglob("*.bin")} == stamps
    # only what it knows is needed from here on
    shutil.rmtree(teacher)
    code, output = prepared.trimtab("run", "config.yaml", *options, "distill.teacher.pretrained=")
    assert code == 0, output
    assert prepared.outcome("small")["step"] == 30
