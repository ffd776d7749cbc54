"""The plan of a run, as data and as text."""

import dataclasses
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from launcher.plan import as_bytes, make_plan, render_plan
from launcher.resources import Gpu, Resources
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.records import ModelFacts, ParameterFacts

GIB = 2**30
LAPTOP = Resources(cores=8, memory_bytes=16 * GIB)
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, True)
V100 = Gpu("Tesla V100", 32 * GIB, False)
FACTS = ModelFacts(
    model_type="llama",
    parameters=(ParameterFacts("w", (4000, 1000), True),),
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=128,
    vocabulary=512,
    max_positions=256,
    matmul_parameters=0,
)
HUGE = dataclasses.replace(FACTS, parameters=(ParameterFacts("w", (20_000_000, 1000), True),))


def config_with(length: int = 128, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "name": "small",
        "data": {"sources": ({"stdlib": True},), "sequence_length": length},
        "model": {"config": {"model_type": "llama"}},
        "batch": {"samples": 16, "micro": 4},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": 100, "warmup": 10},
        "cluster": {"ranks_per_node": 2},
    }
    return RunConfig.model_validate(base | sections)


def text_of(*arguments: Any, width: int = 80) -> str:
    output = io.StringIO()
    Console(width=width, file=output).print(render_plan(make_plan(*arguments)))
    return output.getvalue()


@pytest.mark.parametrize(
    ("sections", "resources", "device", "precision"),
    [
        ({}, LAPTOP, "cpu", "fp32"),
        ({}, Resources(8, GIB, (H100, H100)), "cuda", "bf16"),
        ({}, Resources(8, GIB, (H100,)), "cpu", "fp32"),
        ({}, Resources(8, GIB, (V100, V100)), "cuda", "fp32"),
        ({}, Resources(8, GIB, (H100, V100)), "cuda", "fp32"),
        ({"precision": "fp16"}, Resources(8, GIB, (V100, V100)), "cuda", "fp16"),
        ({"precision": "bf16"}, LAPTOP, "cpu", "bf16"),
        ({"cluster": {"device": "cuda"}}, LAPTOP, "cuda", "bf16"),
        ({"cluster": {"device": "cpu"}}, Resources(8, GIB, (H100,)), "cpu", "fp32"),
    ],
)
def test_auto_takes_gpus_where_every_rank_can_have_one_and_bf16_where_all_have_it(
    sections, resources, device, precision
):
    plan = make_plan(config_with(**sections), FACTS, resources)
    assert (plan.device, plan.precision) == (device, precision)


def test_the_figures_of_a_plan():
    plan = make_plan(config_with(), FACTS, LAPTOP, num_samples=800)
    assert (plan.ranks, plan.arithmetic.accumulation, plan.threads_per_rank) == (2, 2, 4)
    assert plan.tokens == 100 * 16 * 128
    assert plan.epochs == 2.0
    assert plan.num_parameters == 4_000_000
    assert plan.rank_bytes == 8 * GIB
    assert [memory.stage for memory in plan.memory] == [0, 1, 2, 3]
    assert plan.notes == ()


def test_a_plan_is_json():
    plan = make_plan(config_with(), FACTS, LAPTOP)
    data = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert data["arithmetic"]["samples"] == 16
    assert data["memory"][2]["stage"] == 2
    assert data["memory"][2]["needed"] == plan.memory[2].needed


def test_the_text_of_a_plan():
    text = text_of(config_with(), FACTS, LAPTOP, 800)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[:9] == [
        "run      small",
        "model    llama, 4,000,000 parameters, 0.1 tokens for each",
        "ranks    2 = 1 node × 2, CPU, 8 cores a node, fp32",
        "threads  4 a rank",
        "batch    16 samples = 4 micro × 2 accumulation × 2 ranks",
        "         2,048 tokens a step, in samples of 128",
        "steps    100, of these 10 warm-up and 90 decay",
        "tokens   204,800 (2.00 epochs)",
        "",
    ]
    assert "▸ ZeRO 2" in text
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "snapshots",
        "at the fullest moment",
        "fits in 8.0 GiB",
    ):
        assert part in text


def test_without_facts_the_rest_is_still_planned():
    plan = make_plan(config_with(), None, LAPTOP)
    assert plan.memory == ()
    assert "stage 2; memory is not known, since the model is not" in text_of(config_with(), None, LAPTOP)


@pytest.mark.parametrize(
    ("sections", "facts", "resources", "note"),
    [
        (
            {"cluster": {"ranks_per_node": 8, "device": "cuda"}, "batch": {"samples": 8, "micro": 1}},
            FACTS,
            Resources(8, GIB, (H100,)),
            "the run needs 8 GPUs a node, and this machine has 1: it is planned, not started, here",
        ),
        ({}, FACTS, Resources(8, 16 * GIB, (H100,)), "2 ranks a node and 1 GPUs here: the run uses the CPU"),
        ({}, FACTS, Resources(1, 16 * GIB), "2 ranks share 1 cores: expect it to be slow"),
        ({}, FACTS, Resources(8, 16 * GIB, (), ("a note",)), "a note"),
        (
            {},
            HUGE,
            LAPTOP,
            "no stage fits: lower batch.micro, or set model.activation_checkpointing",
        ),
    ],
)
def test_what_should_be_known_before_starting_is_said(sections, facts, resources, note):
    plan = make_plan(config_with(**sections), facts, resources)
    assert any(note in found for found in plan.notes), plan.notes
    assert any(note[:40] in line for line in text_of(config_with(**sections), facts, resources, width=200).splitlines())


def test_a_stage_that_does_not_fit_is_answered_with_those_that_do():
    sections = {"cluster": {"ranks_per_node": 8}, "batch": {"samples": 8, "micro": 1}}
    facts = dataclasses.replace(
        FACTS, parameters=tuple(ParameterFacts(f"{i}", (1000, 50_000), True) for i in range(99))
    )

    def note(stage: int, memory_bytes: int) -> tuple[str, ...]:
        gpus = (dataclasses.replace(H100, memory_bytes=memory_bytes),) * 8
        return make_plan(config_with(zero={"stage": stage}, **sections), facts, Resources(8, 4096 * GIB, gpus)).notes

    roomy = make_plan(config_with(**sections), facts, Resources(8, GIB, (H100,) * 8))
    needed = [memory.needed for memory in roomy.memory]
    assert needed[0] > needed[1] > needed[2] > needed[3]
    assert note(0, needed[0]) == ()
    said = f"a rank needs about {as_bytes(needed[0])} under zero.stage 0, and has {as_bytes(needed[2])}; "
    assert note(0, needed[2]) == (said + "zero.stage 2 or 3 would fit",)
    assert note(3, needed[3]) == ()
    assert note(3, needed[3] - 1)[0].endswith("no stage fits: lower batch.micro, or set model.activation_checkpointing")


@pytest.mark.parametrize("gpus", [(), (H100, H100)])
def test_snapshots_that_do_not_fit_the_host_are_said_and_nothing_else_fails_for_them(gpus):
    roomy = make_plan(config_with(), FACTS, Resources(8, 64 * GIB, gpus))
    memory = roomy.memory[2]
    assert roomy.notes == ()

    tight = Resources(8, 2 * (memory.host - 1), gpus)
    plan = make_plan(config_with(), FACTS, tight)
    assert plan.host_bytes == memory.host - 1
    assert plan.notes == (
        f"the snapshots of a rank take {as_bytes(memory.snapshots)} of host memory, and it has "
        f"{as_bytes(memory.snapshots - 1)} left: the run will "
        "go back to checkpoints on disk instead; lower snapshots.keep, or set checkpoint.every to what you can lose",
    )
    assert ("without snapshots" in text_of(config_with(), FACTS, tight)) == (gpus == ())
    assert make_plan(config_with(snapshots={"every": None}), FACTS, tight).notes == ()


def test_the_host_of_other_machines_is_not_known():
    plan = make_plan(config_with(cluster={"device": "cuda", "ranks_per_node": 2}), FACTS, Resources(8, 1, (H100,)))
    assert plan.host_bytes is None
    assert not any("snapshots" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"batch": {"samples": 15, "micro": 4}}, "batch.samples"),
        ({"data": {"sources": ({"stdlib": True},), "sequence_length": 512}}, "data.sequence_length"),
        ({"precision": "fp16"}, "precision"),
        ({"model": {"config": {}, "attention": "flash_attention_2"}}, "model.attention"),
    ],
)
def test_what_cannot_run_here_is_refused(sections, path):
    with pytest.raises(ConfigError) as refused:
        make_plan(config_with(**sections), FACTS, LAPTOP)
    assert path in [where for where, _ in refused.value.problems]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "–"), (2**20, "1 MiB"), (GIB - 2**20, "1,023 MiB"), (GIB, "1.0 GiB"), (1536 * GIB, "1,536.0 GiB")],
)
def test_bytes_are_read_at_a_glance(number, text):
    assert as_bytes(number) == text


def test_planning_is_free_of_torch():
    code = "import sys, launcher.plan, launcher.resources; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
