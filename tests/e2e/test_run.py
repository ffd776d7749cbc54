"""A run from its config to its export, started in every way, interrupted and gone on with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_trains_evaluates_exports_and_says_what_to_open(uninterrupted: Workspace) -> None:
    run = uninterrupted.run_dir("small")
    outcome = uninterrupted.outcome("small")
    assert (outcome["reason"], outcome["exit_code"], outcome["step"]) == ("completed", 0, 30)
    for name in ("config.yaml", "plan.json", "accelerate.yaml", "deepspeed.json", "model.json", "data.json"):
        assert (run / name).is_file(), name
    records = uninterrupted.ledger("small")
    attempts = [record for record in records if record["kind"] == "attempt"]
    assert [attempt["step"] for attempt in attempts] == list(range(1, 31))
    assert float(attempts[-1]["loss"]) < 0.8 * float(attempts[0]["loss"])  # type: ignore[arg-type]
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [10, 20, 30]
    said = (uninterrupted.root / "output.txt").read_text()
    assert "tensorboard --logdir" in said
    assert "unigram entropy" in said
    assert "export" in said

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.checkpoint.assemble import whole_parameters

    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.decode(tokenizer("the trim tab")["input_ids"]) == "the trim tab"
    exported = dict(model.named_parameters())
    for name, value in whole_parameters(run / "checkpoints" / "step-00000030"):
        if name in exported:
            assert torch.equal(exported[name], value), name


def printed_commands(output: str) -> dict[str, str]:
    """Title → command, as `trimtab prepare` prints them."""
    return dict(re.findall(r"^  # (.+)\n  (.+)$", output, flags=re.MULTILINE))


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun", "deepspeed"])
def test_other_launchers_end_with_the_same_bits(
    prepared: Workspace, uninterrupted: Workspace, launcher: str, unused_port: int
) -> None:
    code, output = prepared.trimtab("prepare", "config.yaml")
    assert code == 0, output
    command = printed_commands(output)[launcher].replace("29500", str(unused_port))
    code, output = prepared.call("bash", "-c", command)
    assert code == 0, output
    assert prepared.outcome("small")["reason"] == "completed"
    assert prepared.final_state("small") == uninterrupted.final_state("small")


def test_srun_variables_end_with_the_same_bits(prepared: Workspace, uninterrupted: Workspace, unused_port: int) -> None:
    """srun sets these variables for every task; there is no agent between it and the ranks."""
    code, output = prepared.trimtab("prepare", "config.yaml")
    assert code == 0, output
    ranks = [
        prepared.start(
            sys.executable,
            "-m",
            "trainer",
            str(prepared.run_dir("small")),
            OMP_NUM_THREADS="1",
            SLURM_JOB_ID="77",
            SLURM_STEP_ID="0",
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_NTASKS="2",
            SLURM_STEP_NODELIST="127.0.0.1",
            MASTER_PORT=str(unused_port),
        )
        for rank in range(2)
    ]
    for rank in ranks:
        text, _ = rank.communicate(timeout=240)
        assert rank.returncode == 0, text
    assert prepared.final_state("small") == uninterrupted.final_state("small")


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the ledger has an attempt of `step`; the ledger is polled, since that is all a user could watch."""
    ledger = run / "ledger.jsonl"
    while process.poll() is None:
        if ledger.exists() and re.search(rf'"kind": ?"attempt".*"step": ?{step},', ledger.read_text()):
            return
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"ended before step {step}: {process.communicate()[0]}")


def test_interrupted_by_a_signal_it_goes_on_with_the_same_bits(prepared: Workspace, uninterrupted: Workspace) -> None:
    process = prepared.start(sys.executable, "-m", "launcher.cli", "run", "config.yaml")
    wait_for_step(process, prepared.run_dir("small"), 7)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    outcome = prepared.outcome("small")
    assert outcome["reason"] == "stopped"
    assert 7 <= int(str(outcome["step"])) < 30
    code, output = prepared.trimtab("run", "config.yaml")
    assert code == 0, output
    assert prepared.final_state("small") == uninterrupted.final_state("small")
    code, output = prepared.trimtab("run", "config.yaml")
    assert code == 0
    assert "complete" in output


@pytest.mark.parametrize(("every", "step", "checkpoint"), [(1000, 4, 0)])
def test_killed_without_warning_it_goes_on_with_the_same_bits(
    prepared: Workspace, uninterrupted: Workspace, every: int, step: int, checkpoint: int
) -> None:
    # written at once: it is there when the next step begins
    command = ("run", "config.yaml", f"checkpoint.every={every}", "checkpoint.background=false")
    process = prepared.start(sys.executable, "-m", "launcher.cli", *command)
    wait_for_step(process, prepared.run_dir("small"), step)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate()
    code, output = prepared.trimtab(*command)
    assert code == 0, output
    assert prepared.final_state("small") == uninterrupted.final_state("small")
    records = prepared.ledger("small")
    assert [record["resumed_step"] for record in records if record["kind"] == "start"] == [0, checkpoint]
    attempts = [int(str(record["attempt"])) for record in records if record["kind"] == "attempt"]
    assert attempts == sorted(set(attempts)), "an attempt has its number for ever"


def test_one_rank_is_a_run_too(prepared: Workspace) -> None:
    code, output = prepared.trimtab("run", "config.yaml", "--ranks", "1", "name=alone", "schedule.duration=6")
    assert code == 0, output
    assert prepared.outcome("alone")["step"] == 6


def test_another_config_in_the_same_directory_is_refused(uninterrupted: Workspace) -> None:
    code, output = uninterrupted.trimtab("run", "config.yaml", "optim.lr=1e-3")
    assert code == 2
    assert "optim.lr: 0.003 → 0.001" in output


def test_too_long_for_the_model_is_one_sentence_before_any_rank_starts(prepared: Workspace) -> None:
    code, output = prepared.trimtab("run", "config.yaml", "name=long", "data.sequence_length=64")
    assert code == 2
    assert "Traceback" not in output
    assert "64" in output
    assert not (prepared.run_dir("long") / "ledger.jsonl").exists()


def test_an_error_of_a_rank_is_the_outcome(prepared: Workspace) -> None:
    """The checkpoint folder is a file: saving fails, training goes on, and the end says what is missing."""
    code, output = prepared.trimtab("prepare", "config.yaml")
    assert code == 0, output
    (prepared.run_dir("small") / "checkpoints").write_text("in the way")
    code, output = prepared.trimtab("run", "config.yaml", "supervision.restarts=0")
    assert code != 0
    outcome = json.loads((prepared.run_dir("small") / "outcome.json").read_text())
    assert outcome["reason"] != "completed"
    assert "checkpoint" in outcome["message"]
