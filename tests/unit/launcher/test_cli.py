"""The command line as a user meets it: a process, its output and its exit code."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.run_directory import locked
from trainer.config.load import dump_config, load_config

VERBS = (
    *("run", "plan", "prepare", "teach", "status", "watch", "verify", "export", "evaluate", "drill", "quarantine"),
    *("judge", "doctor", "submit", "cancel", "logs", "results", "nodes"),
)


def trimtab(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launcher.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "COLUMNS": "200", "TERM": "dumb"}
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def refused(*arguments: str, cwd: Path) -> str:
    """What is said where the command is wrong: exit code 2, no traceback, nothing on standard output."""
    done = trimtab(*arguments, cwd=cwd)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def begin(config_file: Path, *overrides: str) -> Path:
    """A run directory of the config in which something was trained."""
    config = load_config(config_file, overrides)
    root = Path(config.runs) / config.name
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(dump_config(config))
    (root / "ledger.jsonl").write_text("")
    return root


def test_help_is_there_at_once(tmp_path: Path) -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = trimtab("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - began)
    assert done.returncode == 0
    listed = re.findall(r"^[│ ]+([a-z]+)  ", done.stdout, re.MULTILINE)
    assert tuple(listed) == VERBS
    # the fastest of five: the others say how busy the machine is
    assert min(seconds) < 0.5


def test_help_imports_nothing_big(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launcher import cli\nsys.argv = ['trimtab', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "big = {'torch', 'transformers', 'datasets', 'deepspeed', 'accelerate', 'numpy', 'pydantic', 'yaml'}\n"
        "print('imported:', sorted(big & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, tmp_path: Path) -> None:
    done = trimtab(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"trimtab {verb}" in done.stdout or f"{verb} [OPTIONS]" in done.stdout


def test_the_version(tmp_path: Path) -> None:
    done = trimtab("--version", cwd=tmp_path)
    assert re.fullmatch(r"trimtab \d+\.\d+\.\d+\n", done.stdout)


def test_an_unexpected_error_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launcher import cli\n"
        "@cli.app.command()\ndef boom() -> None:\n    raise ValueError('a bug')\n"
        "sys.argv = ['trimtab', 'boom']\ncli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: a bug" in done.stderr


def test_a_config_that_is_not_there(tmp_path: Path, config_file: Path) -> None:
    said = refused("run", "smal.yaml", cwd=tmp_path)
    assert "did you mean" in said
    assert not (tmp_path / "runs").exists()


def test_all_that_is_wrong_with_a_config_is_said_before_anything_starts(tmp_path: Path, config_file: Path) -> None:
    said = refused("run", str(config_file), "optim.lrr=1", "batch.samples=0", cwd=tmp_path)
    assert "2 problems" in said
    assert "optim.lrr" in said
    assert "batch.samples" in said
    assert not (tmp_path / "runs").exists()


def test_ranks_enter_the_batch_arithmetic(tmp_path: Path, config_file: Path) -> None:
    assert "8 samples do not divide into micro-batches of 2 on 3 ranks" in refused(
        "run", str(config_file), "--ranks", "3", cwd=tmp_path
    )


def test_several_machines_are_not_started_from_one(tmp_path: Path, config_file: Path) -> None:
    said = refused("run", str(config_file), "cluster.nodes=2", cwd=tmp_path)
    assert "2 machines" in said
    assert "trimtab prepare" in said


def test_a_directory_of_another_run_is_refused_with_what_differs(tmp_path: Path, config_file: Path) -> None:
    root = begin(config_file)
    before = (root / "config.yaml").read_text()
    said = refused("run", str(config_file), "optim.lr=0.5", "telemetry.norms_every=9", cwd=tmp_path)
    assert "optim.lr: 0.001 → 0.5" in said
    assert "norms_every" not in said
    assert "--fresh" in said
    assert (root / "config.yaml").read_text() == before


def test_a_completed_run_says_so(tmp_path: Path, config_file: Path) -> None:
    root = begin(config_file)
    outcome = {
        "reason": "completed", "exit_code": 0, "message": "trained 10 steps", "step": 10, "steps": 10,
        "checkpoint": None, "held_out_loss": 2.25,
    }  # fmt: skip
    (root / "outcome.json").write_text(json.dumps(outcome))
    (root / "tensorboard").mkdir()
    done = trimtab("run", str(config_file), cwd=tmp_path)
    assert done.returncode == 0
    assert "complete" in done.stdout
    assert "10 of 10" in done.stdout
    assert "2.2500 nats" in done.stdout
    assert "tensorboard --logdir runs/small/tensorboard" in done.stdout
    assert "nothing left to do" in done.stderr
    assert trimtab("run", str(root), cwd=tmp_path).stdout == done.stdout


def test_a_second_start_of_a_run_is_refused(tmp_path: Path, config_file: Path) -> None:
    with locked(begin(config_file)):
        assert f"is being run by process {os.getpid()}" in refused("run", str(config_file), cwd=tmp_path)
        assert f"is being run by process {os.getpid()}" in refused("run", str(config_file), "--fresh", cwd=tmp_path)


def test_a_place_that_takes_no_files(tmp_path: Path, config_file: Path) -> None:
    said = refused("run", str(config_file), "runs=/proc/runs", cwd=tmp_path)
    assert re.fullmatch(r"trimtab: the run directory /proc/runs/small is not writable .*\n", said)


@pytest.mark.parametrize("name", ["../x", "a/b", "-m", "a\nb", "a\x1b[31m"])
def test_names_that_are_no_names(tmp_path: Path, config_file: Path, name: str) -> None:
    said = refused("run", str(config_file), f"name={json.dumps(name)}", cwd=tmp_path)
    assert "name" in said
    assert "\x1b" not in said
    assert not (tmp_path / "runs").exists()


def test_a_hostile_name_is_only_a_name(tmp_path: Path, config_file: Path) -> None:
    name = "$(touch x)`touch x`'; touch x #\"[red]"
    root = begin(config_file, f"name={json.dumps(name)}")
    (root / "outcome.json").write_text('{"reason": "completed", "exit_code": 0}')
    assert name in trimtab("status", "runs", cwd=tmp_path).stdout
    done = trimtab("run", str(root), cwd=tmp_path)
    assert done.returncode == 0
    shown = done.stdout.rpartition("run directory  ")[2].strip()
    echoed = subprocess.run(
        ["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert echoed.stdout == f"runs/{name}"
    assert not list(tmp_path.rglob("x"))


def test_verbs_that_need_a_run_say_when_there_is_none(tmp_path: Path) -> None:
    assert "no folder" in refused("status", "nowhere", cwd=tmp_path)
    assert "not a run directory" in refused("watch", str(tmp_path), cwd=tmp_path)
    assert "not a run directory" in refused("export", str(tmp_path), cwd=tmp_path)
    done = trimtab("status", str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "there are no runs" in done.stderr


def test_data_that_cannot_be_used_is_refused_before_any_rank(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)) * 64)
    done = trimtab(
        "run", str(config_file), f"data.sources=[{{files: [{tmp_path}/picture.txt]}}]", "name=binary", cwd=tmp_path
    )
    assert done.returncode == 2, done
    assert "picture.txt" in done.stderr
    assert "Traceback" not in done.stderr
    root = tmp_path / "runs" / "binary"
    assert not (root / "accelerate.yaml").exists()
    assert not (root / "ledger.jsonl").exists()
