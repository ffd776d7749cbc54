"""Entering a run directory with a config, and what is said at the end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.start import Request, entered, generated_files, num_samples, plan_of, read_request
from launcher.words import closing
from trainer.config.files import RunFiles
from trainer.config.load import load_config, read_run_config
from trainer.config.objective import ObjectiveConfig
from trainer.config.schema import RunConfig
from trainer.errors import LaunchError, RunDirectoryError

MakeConfig = Callable[..., RunConfig]


def enter(config_file: Path, *overrides: str, fresh: bool = False) -> tuple[Request, list[str]]:
    request = read_request(config_file, overrides)
    said: list[str] = []
    with entered(request, fresh, said.append) as lock:
        assert lock is not None
    return request, said


def test_the_resolved_config_lands_in_the_run_directory_and_reads_back_equal(config_file: Path) -> None:
    request, said = enter(config_file, "optim.lr=0.25")
    assert said == []
    assert read_run_config(request.root) == request.config == load_config(config_file, ["optim.lr=0.25"])
    again = read_request(request.root)
    assert (again.config, again.root) == (request.config, request.root)


def test_ranks_are_an_option_like_any_other(config_file: Path) -> None:
    assert read_request(config_file, (), ranks=4).config.cluster.ranks_per_node == 4


def test_before_anything_was_trained_a_config_may_be_replaced(config_file: Path) -> None:
    request, _ = enter(config_file)
    _, said = enter(config_file, "optim.lr=0.5")
    assert said == ["nothing was trained with the config in the run directory: replacing it"]
    assert read_run_config(request.root).optim.lr == 0.5


def test_after_that_only_harmless_options_may_change_and_are_said(config_file: Path) -> None:
    request, _ = enter(config_file)
    RunFiles(request.root).ledger.touch()
    _, said = enter(config_file, "telemetry.norms_every=9", "data.prefetch=0")
    assert said == ["changed since the last start: data.prefetch: 2 → 0, telemetry.norms_every: 1 → 9"]
    assert read_run_config(request.root).telemetry.norms_every == 9
    with pytest.raises(RunDirectoryError, match=r"seed: 0 → 3\n.*--fresh"):
        enter(config_file, "seed=3")
    assert read_run_config(request.root).seed == 0


def test_fresh_moves_a_run_aside_and_begins_anew(config_file: Path) -> None:
    request, _ = enter(config_file)
    RunFiles(request.root).ledger.write_text("precious")
    _, said = enter(config_file, "seed=3", fresh=True)
    old = request.root.with_name("small.old-1")
    assert said == [f"moved the earlier run to {old}"]
    assert RunFiles(old).ledger.read_text() == "precious"
    assert read_run_config(old).seed == 0
    assert read_run_config(request.root).seed == 3
    assert not RunFiles(request.root).ledger.exists()


def test_a_trained_run_with_a_config_of_another_version_is_refused(config_file: Path) -> None:
    request, _ = enter(config_file)
    files = RunFiles(request.root)
    files.config.write_text("an_option_of_the_future: 1\n")
    enter(config_file)
    files.ledger.touch()
    files.config.write_text("an_option_of_the_future: 1\n")
    with pytest.raises(RunDirectoryError, match="does not read"):
        enter(config_file)


def test_generated_files_are_what_the_trainer_passes_on(make_config: MakeConfig) -> None:
    config = make_config(cluster={"ranks_per_node": 2, "device": "cpu"}, zero={"stage": 3})
    files = generated_files(config, plan_of(config, None))
    deepspeed = json.loads(files["deepspeed.json"])
    assert deepspeed["train_batch_size"] == 8
    assert deepspeed["gradient_accumulation_steps"] == 2
    assert deepspeed["zero_optimization"]["stage"] == 3
    assert json.loads(files["plan.json"])["ranks"] == 2
    assert "num_processes: 2\n" in files["accelerate.yaml"]


def test_gpus_that_are_not_here_and_machines_that_are_elsewhere(make_config: MakeConfig) -> None:
    from launcher.start import require_startable

    with pytest.raises(LaunchError, match="1000 ranks need a GPU each"):
        require_startable(
            make_config(cluster={"device": "cuda", "ranks_per_node": 1000}, batch={"samples": 1000, "micro": 1})
        )
    with pytest.raises(LaunchError, match="2 machines"):
        require_startable(make_config(cluster={"nodes": 2}))


def test_samples_of_an_epoch_follow_the_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    data = make_config().data.model_dump(mode="json")
    config = make_config(data=data | {"sources": [{"stdlib": True}, {"files": ["/x"], "weight": 2.0}]})
    files = RunFiles(tmp_path)
    assert num_samples(files, config) is None
    report = {"sources": [{"train": {"tokens": 640}}, {"train": {"tokens": 6400}}]}
    files.data.write_text(json.dumps({"report": report}))
    assert num_samples(files, config) == (640 + 2 * 6400) // 64
    classified = config.model_copy(update={"objective": ObjectiveConfig(kind="classification")})
    report = {"sources": [{"train": {"documents": 64}}, {"train": {"documents": 6}}]}
    files.data.write_text(json.dumps({"report": report}))
    assert num_samples(files, classified) == 64 + 2 * 6


def test_the_end_shows_the_loss_beside_the_entropy_and_only_what_is_there(tmp_path: Path) -> None:
    outcome = {"reason": "completed", "exit_code": 0, "step": 9, "steps": 9, "held_out_loss": 2.5}
    assert "TensorBoard" not in closing(tmp_path, outcome)
    assert "entropy" not in closing(tmp_path, outcome)
    (tmp_path / "data.json").write_text(json.dumps({"report": {"unigram_entropy": 5.75}}))
    for name in ("tensorboard", "export"):
        (tmp_path / name).mkdir()
    text = closing(tmp_path, outcome)
    assert "2.5000 nats a token (unigram entropy of that text: 5.7500)" in text
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in text or "tensorboard --logdir ../" in text
    report = {"unigram_entropy": None, "classes": ["a", "b"], "class_entropy": 0.5}
    (tmp_path / "data.json").write_text(json.dumps({"report": report}))
    assert "2.5000 nats a text (class entropy: 0.5000)" in closing(tmp_path, outcome)
    halted = closing(tmp_path, {"reason": "halted", "exit_code": 3, "message": "ten NaNs in a row"})
    assert "The guard halted the run: ten NaNs in a row" in halted
