"""A small config for the tests of the launcher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import RunConfig


def small_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "runs": str(folder / "runs"),
        "data": {
            "sources": [{"stdlib": True}],
            "tokenizer": {"train": {"vocabulary": 512}},
            "sequence_length": 64,
            "prepared": str(folder / "prepared"),
        },
        "model": {"config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2}},
        "batch": {"samples": 8, "micro": 2},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": 10},
    } | changes


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """A valid config, with top-level options changed."""
    return lambda **changes: RunConfig.model_validate_json(json.dumps(small_config(tmp_path, **changes)))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(small_config(tmp_path)))  # JSON is YAML
    return path
