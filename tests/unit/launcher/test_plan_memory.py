"""Memory of a rank: the figures that can be worked out by hand, and what must hold for any model."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.memory import PARTS, STAGES, activation_bytes, memory_by_stage, rank_memory
from launcher.teacher_memory import TeacherModel, teacher_memory
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.records import ModelFacts, ParameterFacts

MILLION = 1_000_000


def config_with(micro: int = 4, samples: int = 64, length: int = 128, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "data": {"sources": ({"stdlib": True},), "sequence_length": length},
            "model": {"config": {"model_type": "llama"}} | sections.pop("model", {}),
            "batch": {"samples": samples, "micro": micro},
            "optim": {"lr": 1e-3},
            "schedule": {"duration": 1},
            **sections,
        }
    )


def facts_with(millions: int = 100, vocabulary: int = 1000, gate: bool = True) -> ModelFacts:
    name = "mlp.gate_proj.weight" if gate else "mlp.weight"
    return ModelFacts(
        model_type="llama",
        parameters=tuple(ParameterFacts(f"{layer}.{name}", (1000, 100 * millions), True) for layer in range(10)),
        num_layers=10,
        hidden_size=100,
        num_attention_heads=4,
        intermediate_size=300,
        vocabulary=vocabulary,
        max_positions=None,
        matmul_parameters=0,
    )


def in_parameters(config: RunConfig, ranks: int, precision: Any, stage: Any, device: Any = "cuda") -> list[float]:
    """Bytes for each parameter of weights, gradients, optimizer and update."""
    memory = rank_memory(facts_with(), config, ranks, device, precision, stage)
    return [
        part / (100 * MILLION) for part in (memory.weights, memory.gradients, memory.optimizer, memory.update)
    ]  # fmt: skip


ONE_PASS = {"samples": 16, "micro": 4}


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        # fp32 without ZeRO needs no master weights; with it DeepSpeed keeps a second fp32 copy of its partition
        (0, "fp32", [4, 4, 8, 0]),
        (1, "fp32", [4, 4 + 1, 12 / 4, 1]),
        (2, "fp32", [4, 1, 12 / 4, 1]),
        (3, "fp32", [1 + 4, 1, 12 / 4, 1]),
        (0, "bf16", [2, 2, 12, 4]),
        (1, "bf16", [2, 2 + 0.5, 12 / 4, 1]),
        (2, "bf16", [2, 0.5, 12 / 4, 1]),
        (3, "bf16", [0.5 + 2, 0.5, 12 / 4, 1]),
    ],
)
def test_bytes_for_each_parameter_on_four_ranks(stage, precision, expected):
    assert in_parameters(config_with(**ONE_PASS), 4, precision, stage) == pytest.approx(expected)


def test_accumulation_keeps_a_second_partition_of_gradients_under_stage_2():
    once, twice = (in_parameters(config_with(samples=samples), 4, "bf16", 2)[1] for samples in (16, 32))
    assert (once, twice) == (0.5, 1.0)


def test_stage_3_gathers_no_more_than_it_needs_again():
    config = config_with(zero={"stage": 3, "bucket_elements": 10 * MILLION})
    memory = rank_memory(facts_with(2000), config, 16, "cuda", "bf16", 3)
    partition, gathered = 2000 * MILLION // 16, (500 + 10 + 200) * MILLION
    assert memory.weights == 2 * (partition + gathered)


def test_offloading_moves_the_optimizer_and_then_the_weights_off_the_gpu():
    def memory(offload: str, device: Any = "cuda") -> Any:
        config = config_with(zero={"stage": 3, "offload": offload})
        return rank_memory(facts_with(), config, 4, device, "bf16", 3)

    stays, optimizer, everything = memory("none"), memory("optimizer"), memory("all")
    partition = 100 * MILLION // 4
    assert (stays.offloaded, stays.optimizer) == (0, 12 * partition)
    assert (optimizer.offloaded, optimizer.optimizer) == ((12 + 4 + 2) * partition, 0)
    assert everything.offloaded == optimizer.offloaded + 2 * partition
    assert stays.peak > optimizer.peak > everything.peak
    assert memory("all", "cpu").needed == memory("none", "cpu").needed


def test_snapshots_are_kept_in_host_memory_by_every_rank():
    def memory(device: Any = "cuda", stage: Any = 2, **sections: Any) -> Any:
        return rank_memory(facts_with(), config_with(**sections), 4, device, "bf16", stage)

    partition = 100 * MILLION // 4
    # three to go back to, and one that is being saved
    assert memory().snapshots == 4 * 12 * partition
    assert memory(stage=0).snapshots == 4 * 12 * 100 * MILLION
    assert memory(snapshots={"keep": 1}).snapshots == 2 * 12 * partition
    assert memory(snapshots={"every": None}).snapshots == memory(guard={"mode": "watch"}).snapshots == 12 * partition
    nothing: dict[str, Any] = {"snapshots": {"every": None}, "checkpoint": {"background": False}}
    none = memory(**nothing)
    assert none.snapshots == 0

    # a GPU does not hold them, its host does, beside what was offloaded; on CPU they are part of it all
    assert memory().needed == none.needed
    assert (none.host, memory().host) == (0, memory().snapshots)
    offloaded = memory(zero={"stage": 2, "offload": "optimizer"})
    assert offloaded.host == offloaded.offloaded + offloaded.snapshots
    on_cpu, bare = memory("cpu"), memory("cpu", **nothing)
    assert on_cpu.needed - bare.needed == on_cpu.peak - bare.peak == on_cpu.snapshots
    assert on_cpu.host == on_cpu.needed


def test_activations_by_hand():
    facts, config = facts_with(), config_with(micro=2, length=128)
    a_layer = 8 * 100 + 2 * 100 + 4 * 300
    expected = 4 * 256 * (10 * a_layer + 3 * 100 + 4 * 1000)
    assert activation_bytes(facts, config, element=4) == expected

    without_gate = activation_bytes(facts_with(gate=False), config, element=4)
    assert expected - without_gate == 4 * 256 * 10 * 2 * 300

    checkpointed = config_with(micro=2, length=128, model={"activation_checkpointing": True})
    assert expected - activation_bytes(facts, checkpointed, 4) == 4 * 256 * (9 * a_layer - 10 * 100)

    eager = config_with(micro=2, length=128, model={"attention": "eager"})
    assert activation_bytes(facts, eager, 4) - expected == 256 * 10 * 12 * 4 * 128

    assert activation_bytes(facts, config_with(micro=2, objective={"z_loss": 1e-4}), 4) < expected


TEACHER = TeacherModel(facts_with(400, vocabulary=1000), "bf16")


def taught(place: str = "replica", **changes: Any) -> dict[str, Any]:
    """Sections of a distillation."""
    teacher = {"place": place, "pretrained": "large", **changes.pop("teacher", {})}
    return {"stage": "distill", "distill": {"teacher": teacher, **changes}}


def test_the_teacher_by_hand():
    def memory(place: str = "replica", ranks: int = 4, **changes: Any) -> Any:
        sections = {name: changes.pop(name) for name in ("cluster", "zero", "objective") if name in changes}
        return teacher_memory(config_with(micro=2, length=128, **sections, **taught(place, **changes)), TEACHER, ranks)

    tokens, weights, a_layer = 256, 400 * MILLION, 8 * 100 + 2 * 100 + 4 * 300
    logits = tokens * 1000
    whole = memory()
    assert whole.resident == 2 * weights
    assert whole.passing == 2 * (tokens * (a_layer + 2 * 100) + logits)

    # a share of the weights, and while it is asked a bucket and the largest parameter
    sharded = memory("zero3", zero={"stage": 3, "bucket_elements": 10 * MILLION})
    assert sharded.resident == 2 * weights // 4
    assert sharded.passing - whole.passing == 2 * (10 + 40) * MILLION
    within = memory("zero3", 16, teacher={"within_node": True}, cluster={"nodes": 2, "ranks_per_node": 8})
    assert within.resident == 2 * weights // 8

    assert memory(loss={"chunk": 16}).passing == whole.passing - 2 * (tokens - 16) * 1000
    inside = memory(hidden={"layers": ((0, 0), (2, 4), (3, 4))}, relations={"heads": 4})
    assert inside.passing - whole.passing == 2 * tokens * (2 + 3) * 100
    classifier = memory(objective={"kind": "classification"})
    assert whole.passing - classifier.passing == 2 * logits
    eager = memory(teacher={"attention": "eager"})
    assert eager.passing - whole.passing == tokens * (4 + 2 * 2) * 4 * 128


def test_the_student_of_a_distillation_holds_a_chunk_of_logits():
    facts = facts_with()
    alone, distilled = config_with(micro=2, length=128), config_with(micro=2, length=128, **taught(loss={"chunk": 16}))
    expected = activation_bytes(facts, alone, 4) - 4 * 256 * 4 * 1000
    gradients = 4 * (256 * 100 + 1000 * 100)
    assert activation_bytes(facts, distilled, 4) == expected + 4 * 16 * 1000 + gradients
    in_bf16 = activation_bytes(facts, distilled, 2)
    assert in_bf16 == expected // 2 + 2 * (16 * 1000 + 256 * 100) + (4 + 2) * 1000 * 100
    # a classifier's logits are few, with a teacher and without
    classifier = config_with(micro=2, length=128, objective={"kind": "classification"})
    assert activation_bytes(facts, classifier, 4) == expected


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_teacher_adds_what_it_takes(stage, device):
    config = config_with(**taught("zero3"))
    own = teacher_memory(config, TEACHER, 4)
    without = rank_memory(facts_with(), config, 4, device, "bf16", stage)
    beside = rank_memory(facts_with(), config, 4, device, "bf16", stage, TEACHER)
    assert (without.teacher, beside.teacher) == (0, own.resident + own.passing)
    assert own.resident <= beside.peak - without.peak <= beside.teacher
    assert own.resident <= beside.needed - without.needed <= beside.teacher
    # where the backward pass is the fullest moment, all of it is there
    large = config_with(micro=16, length=8192, **taught("zero3"))
    without, beside = (rank_memory(facts_with(), large, 4, device, "bf16", stage, who) for who in (None, TEACHER))
    assert without.moment == beside.moment == "backward"
    assert beside.peak - without.peak == beside.teacher


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError):
        memory_by_stage(facts_with(), config_with(samples=10), 4, "cpu", "fp32")


@given(
    millions=st.integers(1, 3000),
    log_ranks=st.integers(1, 6),
    device=st.sampled_from(["cpu", "cuda"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    accumulation=st.integers(1, 3),
    bucket=st.integers(1, 10**9),
)
def test_what_holds_for_any_model(millions, log_ranks, device, precision, accumulation, bucket):
    ranks = 2**log_ranks
    config = config_with(samples=4 * ranks * accumulation, zero={"bucket_elements": bucket})
    facts = facts_with(millions)
    stages = memory_by_stage(facts, config, ranks, device, precision)
    assert [memory.stage for memory in stages] == list(STAGES)
    for memory in stages:
        total = sum(getattr(memory, part) for part in PARTS)
        assert max(memory.activations, memory.optimizer) < memory.peak <= memory.needed <= total + memory.update
        assert all(getattr(memory, part) >= 0 for part in PARTS)
    # what ZeRO shards, it shards: never more of it in a higher stage
    assert stages[1].optimizer == stages[2].optimizer == stages[3].optimizer
    assert stages[2].gradients <= stages[1].gradients
    assert stages[0].optimizer * (1.5 if precision == "fp32" else 1) <= stages[1].optimizer * ranks + 12
    # on more ranks, never more
    more = memory_by_stage(
        facts,
        config_with(samples=8 * ranks * accumulation, zero={"bucket_elements": bucket}),
        2 * ranks,
        device,
        precision,
    )
    for fewer, many in zip(stages, more, strict=True):
        assert many.needed <= fewer.needed
