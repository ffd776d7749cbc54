"""Which checkpoints an export takes, and that what it writes is their weights, or the mean of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import Parameter, cut, make_whole, write_checkpoint
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.manifest import HEALTHY, name_of, read_manifest, write_manifest
from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig
from trainer.errors import CheckpointError
from trainer.records import ModelFacts
from trainer.stages.export import choose, export_run, main
from trainer.stages.prepare import prepare_run
from trainer.starts import begin

PARAMETERS = [Parameter("a", (3, 5), 0)]


def add(
    files: RunFiles,
    step: int,
    parameters: list[Parameter] = PARAMETERS,
    *,
    shape: tuple[int, int] = (2, 2),
    start: int = 1,
    healthy: bool = True,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Write a checkpoint of another content for each step; its weights."""
    whole = make_whole(parameters, seed=step)
    directory = files.checkpoints / name_of(step)
    manifest = write_checkpoint(directory, whole, cut(parameters, *shape), buffers=False)
    write_manifest(directory, manifest.model_copy(update={"step": step, "start": start, "precision": precision}))
    assert read_manifest(directory).step == step
    if healthy:
        (directory / HEALTHY).touch()
    return whole["master"]


def test_the_newest_of_the_history_is_taken(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        choose(files, None, None)
    begin(files).resumed(0, 0)
    for step in (10, 20, 30):
        add(files, step)
    second = begin(files)
    second.resumed(1, 10)
    add(files, 15, start=2)
    # start 1 was cut off and wrote these after start 2 had gone on from step 10
    assert choose(files, None, None) == ("step-00000015",)
    assert choose(files, "step-00000030", None) == ("step-00000030",)
    assert choose(files, None, 2) == ("step-00000010", "step-00000015")
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-7'; it has step-00000010, .*, step-00000030"):
        choose(files, "step-7", None)
    begin(files).resumed(2, 5)
    with pytest.raises(CheckpointError, match="no checkpoint of its present history"):
        choose(files, None, None)


def test_an_average_takes_healthy_checkpoints_only(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    for step in (10, 20, 30, 40):
        add(files, step, healthy=step != 30)
    assert choose(files, None, 1) == ("step-00000040",)
    assert choose(files, None, 3) == ("step-00000010", "step-00000020", "step-00000040")
    assert choose(files, "step-00000030", 2) == ("step-00000010", "step-00000020")
    with pytest.raises(CheckpointError, match=r"an average of 4 .* has 3 healthy ones \(step-00000010, step-0.*40\)"):
        choose(files, None, 4)
    with pytest.raises(CheckpointError, match=r"an average of 3 .* has 2 healthy ones"):
        choose(files, "step-00000030", 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFiles, ModelFacts]:
    """A run whose data and model are ready."""
    root = tmp_path_factory.mktemp("export")
    for index in range(40):
        (root / f"{index:02d}.txt").write_text(f"the trim tab {index} is a small surface on a rudder\n" * 8)
    files = RunFiles(root / "run")
    files.root.mkdir()
    config: dict[str, Any] = {
        "name": "run",
        "data": {
            "sources": [{"files": [str(root / "*.txt")]}],
            "tokenizer": {"train": {"vocabulary": 300}},
            "sequence_length": 16,
            "held_out": 0.2,
            "prepared": str(root / "data"),
            "clean": {"near_duplicates": None},
        },
        "model": {"config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}},
        "batch": {"samples": 4, "micro": 2},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": 5},
    }
    files.config.write_text(json.dumps(config))
    _, facts = prepare_run(files, RunConfig.model_validate_json(json.dumps(config)))
    return files, facts


def parameters_of(facts: ModelFacts) -> list[Parameter]:
    return [Parameter(fact.name, fact.shape, int(not fact.decay)) for fact in facts.parameters]


def written(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_what_is_written_is_the_mean_in_the_training_dtype_or_another(
    run: tuple[RunFiles, ModelFacts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, facts = run
    parameters = parameters_of(facts)
    weights = [
        add(files, 10, parameters, shape=(3, 3), precision="bf16"),
        add(files, 20, parameters, shape=(0, 2), precision="bf16", healthy=False),
        add(files, 30, parameters, shape=(1, 4), precision="bf16"),
        add(files, 40, parameters, shape=(2, 1), precision="bf16"),
    ]
    exported = export_run(files, tmp_path / "newest")
    assert str(exported) == "step-00000040 in bf16"
    found = written(tmp_path / "newest")
    for name, tensor in found.items():
        assert torch.equal(tensor.view(-1), weights[3][name].bfloat16()), name
    assert found.keys() == weights[3].keys()

    arguments = [str(files.root), "--average=3", "--dtype=fp32", f"--output={tmp_path / 'mean'}"]
    assert main(arguments) == 0
    assert "exported the average of 3 checkpoints (step-00000010, step-00000030, step-00000040) in fp32" in (
        capsys.readouterr().out
    )
    for name, tensor in written(tmp_path / "mean").items():
        mean = sum(weights[index][name].double() for index in (0, 2, 3)) / 3
        assert torch.equal(tensor.view(-1), mean.float()), name

    assert main([str(files.root), "--average=9"]) == 2
    assert "9 checkpoints was asked for, and" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(files.root), "--average=0"])
