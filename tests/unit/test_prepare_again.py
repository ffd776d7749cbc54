"""A run that goes on does not wait for what describes its model, nor does another with the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from workspace import make_workspace

from trainer.config.load import dump_config, load_config

PREPARE = """
import sys
from trainer.stages.prepare import main
code = main([sys.argv[1]])
print(code, "transformers" in sys.modules, "torch" in sys.modules)
"""


def prepare(run: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PREPARE, str(run)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_facts_are_taken_from_before_where_nothing_changed(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    run = tmp_path / "run"
    run.mkdir()

    def configure(*overrides: str) -> None:
        prepared = f"data.prepared={tmp_path / 'data'}"
        (run / "config.yaml").write_text(dump_config(load_config(workspace.config, [prepared, *overrides])))

    configure()
    assert prepare(run) == ["0", "True", "True"]
    facts = (run / "model.json").read_text()
    assert prepare(run) == ["0", "False", "False"]
    assert (run / "model.json").read_text() == facts
    # nor does another run with the same model, unless what was noted is damaged
    (run / "model.json").unlink()
    (run / "data.json").unlink()
    assert prepare(run) == ["0", "False", "False"]
    assert (run / "model.json").read_text() == facts
    (noted,) = (tmp_path / "data" / "models").iterdir()
    noted.write_text("{")
    (run / "data.json").unlink()
    assert prepare(run) == ["0", "True", "True"]
    assert noted.read_text() == (run / "model.json").read_text() == facts
    configure("model.config.n_embd=64")
    assert prepare(run) == ["0", "True", "True"]
    assert json.loads((run / "model.json").read_text())["hidden_size"] == 64
