"""Bad input gets one clear sentence, before any rank is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def refused(workspace: Workspace, *overrides: str) -> str:
    """What is said when the run is refused; nothing was trained and there is no traceback."""
    code, output = workspace.trimtab("run", "config.yaml", *overrides)
    assert code == 2, output
    assert "Traceback" not in output
    assert not (workspace.run_dir("small") / "ledger.jsonl").exists()
    return output


def write(workspace: Workspace, name: str, content: bytes) -> Path:
    path = workspace.root / name
    path.write_bytes(content)
    return path


def test_all_problems_of_a_config_at_once_with_the_nearest_names(workspace: Workspace) -> None:
    said = refused(workspace, "optim.lr=-1", "optim.weigth_decay=1", "batch.samples=7", "zero.stage=4")
    assert "optim.lr: must be greater than 0" in said
    assert "optim.weigth_decay: is not an option; did you mean `optim.weight_decay`" in said
    assert "zero.stage: must be one of" in said


def test_a_batch_that_does_not_divide(workspace: Workspace) -> None:
    assert "7 samples do not divide into micro-batches of 2 on 2 ranks" in refused(workspace, "batch.samples=7")


def test_no_file_matches(workspace: Workspace) -> None:
    assert "texts/*.md" in refused(workspace, "data.sources.0.files=[texts/*.md]")


def test_an_empty_corpus(workspace: Workspace) -> None:
    write(workspace, "empty.txt", b"short")
    assert "min_characters" in refused(workspace, "data.sources.0.files=[empty.txt]")


def test_a_binary_file(workspace: Workspace) -> None:
    write(workspace, "image.txt", bytes(range(256)) * 64)
    assert "image.txt" in refused(workspace, "data.sources.0.files=[image.txt]")


def test_a_missing_column(workspace: Workspace) -> None:
    write(workspace, "records.jsonl", b'{"body": "a text that is long enough to be kept in the corpus"}\n' * 20)
    said = refused(workspace, "data.sources.0.files=[records.jsonl]", "data.sources.0.column=content")
    assert "content" in said
    assert "body" in said


def test_a_tokenizer_larger_than_the_vocabulary(workspace: Workspace) -> None:
    said = refused(workspace, "model.config.vocab_size=300")
    assert "384" in said
    assert "300" in said


def test_offload_without_sharding(workspace: Workspace) -> None:
    assert "needs zero.stage 1, 2 or 3" in refused(workspace, "zero.stage=0", "zero.offload=optimizer")


def test_a_run_directory_that_cannot_be_made(workspace: Workspace) -> None:
    write(workspace, "in-the-way", b"")
    assert "in-the-way" in refused(workspace, "runs=in-the-way")


def test_an_unknown_field_of_the_architecture(workspace: Workspace) -> None:
    said = refused(workspace, "model.config.n_embed=64")
    assert "n_embed" in said
    assert "n_embd" in said
