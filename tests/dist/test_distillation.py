"""A distillation through the real loop: its gradients, its promises, and what it learns from after a rollback."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import RankPool
from serving import Serving

from tests.unit.objectives.dense import divergence
from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig
from trainer.config.teaching import writing
from trainer.engine.ranks import Ranks
from trainer.faults import parse_fault
from trainer.records import Outcome
from trainer.stages.build import Setting
from trainer.stages.exercise import Unsaved, exercise, release, rungs
from trainer.stages.prepare import open_run, prepare_run
from trainer.stages.teach import Teaching
from trainer.stages.teachers import open_teacher
from trainer.stop import StopRequest

STEPS = 26
VOCABULARY = 300
SENTENCES = (
    "the trim tab is a small surface on a rudder",
    "a large ship is kept on course by a small force",
    "what a teacher knows is learned from its predictions",
)


@dataclass(frozen=True)
class Place:
    root: Path
    teacher: Path
    foreign: Path
    """A teacher with another tokenizer."""


def make_config(place: Place, *, stage: int = 2, boundaries: str = "positions", **distill: Any) -> RunConfig:
    teacher = {"pretrained": str(place.teacher)} | distill.pop("teacher", {})
    # a cache that leaves nothing out
    cache = {"folder": str(place.root / "cache"), "top": VOCABULARY, "precision": "fp32"}
    options: dict[str, Any] = {
        "name": "distil",
        "stage": "distill",
        "seed": 3,
        "precision": "fp32",
        "data": {
            "sources": ({"files": (str(place.root / "texts/*.txt"),)},),
            "tokenizer": {"path": str(place.teacher)},
            "sequence_length": 32,
            "held_out": 0.1,
            "boundaries": boundaries,
            "prepared": str(place.root / "data"),
            "clean": {"near_duplicates": None},
        },
        "model": {"pretrained": str(place.teacher), "layers": "0, 2"},
        "distill": {"teacher": teacher, "cache": cache} | distill,
        "batch": {"samples": 8, "micro": 2},
        "optim": {"lr": 3e-3},
        "schedule": {"duration": STEPS, "warmup": 5},
        "zero": {"stage": stage},
        "guard": {"cool": 1.0, "verify": 5, "checksum_every": 5},
        "snapshots": {"every": 5, "keep": 4},
        "evaluation": {"every": None},
        "checkpoint": {"every": None},
        "telemetry": {"tensorboard": False, "console": "quiet", "weights_every": None, "part_norms_every": None},
        "cluster": {"device": "cpu"},
    }
    return RunConfig.model_validate(options)


def save_teacher(folder: Path, size: int, end: str = "<end>") -> None:
    """A model that has learned nothing, and a tokenizer of so many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    assert tokenizer.get_vocab_size() == size
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    torch.manual_seed(size)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Text, its tokenizer, and a teacher that has learned nothing: its predictions are as good as any."""
    root = tmp_path_factory.mktemp("distil")
    (root / "texts").mkdir()
    for index in range(60):
        lines = random.Random(index).choices(SENTENCES, k=12)
        (root / "texts" / f"{index:02d}.txt").write_text("\n".join(lines))
    save_teacher(root / "teacher", VOCABULARY)
    save_teacher(root / "foreign", 320, "<stop>")
    made = Place(root, root / "teacher", root / "foreign")
    for name, boundaries in (("run", "positions"), ("block", "block")):
        files = RunFiles(root / name)
        files.root.mkdir()
        prepare_run(files, make_config(made, boundaries=boundaries))
    return made


def setting_of(rank: int, world_size: int, config: RunConfig, place: Place) -> Setting:
    files = RunFiles(place.root / ("block" if config.data.boundaries == "block" else "run"))
    data, facts = open_run(files, config)
    return Setting(files, config, Ranks(rank, world_size, rank), "cpu", "fp32", data, facts, StopRequest())


def taught(rank: int, world_size: int, config: RunConfig, place: Place) -> bool:
    """Write the cache of the run; whether it is complete."""
    setting = setting_of(rank, world_size, writing(config, sharded=False), place)
    return Teaching(setting, "train", open_teacher, lambda *_: None).run() is not None


def with_cache(pool: RankPool, config: RunConfig, place: Place) -> None:
    """See that the knowledge that the config reads is there."""
    if config.distill is not None and config.distill.teacher.place == "cache":
        assert all(pool(taught, config=config, place=place))


def first_look(rank: int, world_size: int, config: RunConfig, place: Place, name: str) -> Any:
    """What the engine finds in the first batch, the batch of this rank, and the gradient norm of each part."""
    setting = setting_of(rank, world_size, config, place)
    setting = replace(setting, files=RunFiles(setting.files.root / name))
    setting.files.root.mkdir(exist_ok=True)
    torch.distributed.barrier()
    training = Unsaved(setting)
    with training.parts() as parts:
        batch = next(parts.stream)
        norms = parts.engine.part_norms(batch)
        stats = parts.engine.accumulate(batch, attempt=1, step=1)
        parts.engine.discard()
        probe = parts.engine.probe(batch)
        samples = parts.engine.sample_losses(batch)
        names = parts.engine.names
    training.telemetry.close(Outcome("completed", 0, "", 0, 0, None))
    release(training.engine)
    return stats, names, list(batch.micro_batches), norms, probe, samples


def dense_student(place: Place) -> Any:
    """The student as it begins, in double precision."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(place.teacher, dtype=torch.float64)
    student.model.layers = torch.nn.ModuleList([student.model.layers[0], student.model.layers[2]])
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = 2
    return student


def dense(place: Place, config: RunConfig, arrays: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """The same in double precision, on whole logits, in one process."""
    from transformers import AutoModelForCausalLM

    assert config.distill is not None
    options = config.distill.loss
    teacher = AutoModelForCausalLM.from_pretrained(place.teacher, dtype=torch.float64)
    student = dense_student(place)
    names = ["cross-entropy", "distillation"]
    sums = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))
    targets = 0
    keys = ("input_ids", "labels", "position_ids", "attention_mask")
    for micro in arrays:
        tensors = {name: torch.from_numpy(micro[name]) for name in keys if name in micro}
        labels = tensors.pop("labels")
        valid = labels >= 0
        with torch.no_grad():
            theirs = teacher(**tensors, use_cache=False).logits[valid]
        ours = student(**tensors, use_cache=False).logits[valid]
        sums["cross-entropy"] = sums["cross-entropy"] + F.cross_entropy(ours, labels[valid], reduction="sum")
        p, q = ((logits / options.temperature).softmax(-1) for logits in (theirs, ours))
        distance = divergence(options, p, q)
        sums["distillation"] = sums["distillation"] + options.temperature**2 * distance.sum()
        targets += int(valid.sum())
    weights = {"cross-entropy": options.cross_entropy, "distillation": options.weight}
    parameters = dict(student.named_parameters())
    gradients = {
        name: torch.autograd.grad(weights[name] * sums[name] / targets, list(parameters.values()), retain_graph=True)
        for name in names
    }
    both = [a + b for a, b in zip(*gradients.values(), strict=True)]
    return {
        "loss": sums["cross-entropy"].item() / targets,
        "distillation": options.weight * sums["distillation"].item() / targets,
        "norms": {name: gradient.norm().item() for name, gradient in zip(parameters, both, strict=True)},
        "parts": {name: torch.stack([g.norm() for g in gradients[name]]).norm().item() for name in names},
        "targets": targets,
    }


CASES = [
    # every divergence, temperature, place, stage and kind of packing, each with others in turn
    (kind, temperature, stage, where, boundaries, chunk)
    for kind, temperature, stage, where, boundaries, chunk in [
        ("forward_kl", 1.0, 2, "replica", "positions", 1024),
        ("forward_kl", 2.0, 3, "zero3", "block", 7),
        ("forward_kl", 2.0, 2, "cache", "positions", 50),
        ("reverse_kl", 2.0, 2, "zero3", "positions", 50),
        ("reverse_kl", 1.0, 3, "cache", "block", 1024),
        ("js", 1.5, 3, "replica", "block", 13),
        ("js", 1.0, 2, "cache", "block", 50),
        ("skew_forward_kl", 1.0, 2, "zero3", "block", 1024),
        ("skew_forward_kl", 2.0, 3, "replica", "positions", 50),
        ("skew_reverse_kl", 1.5, 3, "zero3", "positions", 50),
        ("skew_reverse_kl", 1.0, 0, "replica", "block", 7),
        ("total_variation", 2.0, 3, "cache", "positions", 13),
        ("total_variation", 1.0, 2, "replica", "positions", 1024),
    ]
]


@pytest.mark.parametrize(("kind", "temperature", "stage", "where", "boundaries", "chunk"), CASES)
def test_loss_and_gradient_equal_a_dense_reference(
    two_ranks: RankPool,
    place: Place,
    kind: str,
    temperature: float,
    stage: int,
    where: str,
    boundaries: str,
    chunk: int,
) -> None:
    loss = {"kind": kind, "temperature": temperature, "weight": 0.7, "cross_entropy": 0.4, "chunk": chunk}
    config = make_config(place, stage=stage, boundaries=boundaries, loss=loss, teacher={"place": where})
    with_cache(two_ranks, config, place)
    name = f"look-{kind}-{temperature}-{stage}-{where}"
    results = two_ranks(first_look, config=config, place=place, name=name)
    expected = dense(place, config, [micro for result in results for micro in result[2]])
    for stats, names, _, norms, probe, samples in results:
        assert stats.num_targets == expected["targets"]
        assert stats.loss == pytest.approx(expected["loss"], rel=2e-6)
        assert stats.parts["distillation"] == pytest.approx(expected["distillation"], rel=2e-5)
        found = dict(zip(names, stats.parameter_norms, strict=True))
        assert found == {name: pytest.approx(norm, rel=2e-4) for name, norm in expected["norms"].items()}
        assert norms == {name: pytest.approx(norm, rel=2e-4) for name, norm in expected["parts"].items()}
        assert probe == stats.loss
        assert np.mean(samples) == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.parametrize("on_policy", [None, {"fraction": 1.0, "tokens": 5}])
def test_a_server_that_tells_of_every_token_teaches_as_the_model_itself(
    two_ranks: RankPool, place: Place, on_policy: dict[str, Any] | None
) -> None:
    """Of the student's own text it is asked while the ranks compute."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(place.teacher / "tokenizer.json"))
    options: dict[str, Any] = {"stage": 3, "boundaries": "join", "on_policy": on_policy}
    with Serving(AutoModelForCausalLM.from_pretrained(place.teacher), tokenizer, max_logprobs=VOCABULARY) as serving:
        server = {"url": serving.url, "model": serving.name, "top": VOCABULARY}
        config = make_config(place, **options, teacher={"place": "server", "pretrained": None, "server": server})
        served = two_ranks(first_look, config=config, place=place, name="served")
    asked = serving.num_requests
    present = two_ranks(first_look, config=make_config(place, **options), place=place, name="present")
    assert asked > 0
    for (stats, *_), (expected, *_) in zip(served, present, strict=True):
        assert stats.loss == expected.loss
        assert stats.parts["distillation"] == pytest.approx(expected.parts["distillation"], rel=1e-4)
        assert stats.parameter_norms == pytest.approx(expected.parameter_norms, rel=1e-3)
        for name in ("teacher_entropy", "agreement", "covered"):
            assert stats.measures[name] == pytest.approx(expected.measures[name], rel=1e-4)


@pytest.mark.parametrize(("stage", "where"), [(2, "zero3"), (3, "replica")])
def test_a_teacher_with_another_tokenizer_is_compared_where_both_have_read_the_same(
    two_ranks: RankPool, place: Place, stage: int, where: str
) -> None:
    """Σ of the distances of sorted probabilities, from whole logits."""
    from transformers import AutoModelForCausalLM

    teacher = {"pretrained": str(place.foreign), "place": where}
    config = make_config(place, stage=stage, boundaries="block", vocabulary="uld", teacher=teacher)
    results = two_ranks(first_look, config=config, place=place, name=f"foreign-{stage}")
    theirs = AutoModelForCausalLM.from_pretrained(place.foreign, dtype=torch.float64)
    ours = dense_student(place)
    total, compared = 0.0, 0
    for micro in (micro for result in results for micro in result[2]):
        tensors = {name: torch.from_numpy(array) for name, array in micro.items()}
        with torch.no_grad():
            q = ours(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False).logits
            ids, positions = tensors["teacher_input_ids"], tensors["teacher_position_ids"]
            p = theirs(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row, column in (tensors["teacher_place"] >= 0).nonzero().tolist():
            there = p[row, tensors["teacher_place"][row, column]].softmax(-1).sort(descending=True).values
            here = q[row, column].softmax(-1).sort(descending=True).values
            here = F.pad(here, (0, len(there) - len(here)))
            total += (there - here).abs().sum().item()
            compared += 1
    for stats, _, _, _, _, _ in results:
        assert stats.num_targets / 3 < compared < stats.num_targets
        assert stats.parts["distillation"] == pytest.approx(total / stats.num_targets, rel=1e-5)


def runs(rank: int, world_size: int, config: RunConfig, place: Place, sentences: list[list[str]], name: str) -> Any:
    setting = setting_of(rank, world_size, config, place)
    told = []
    for index, faults in enumerate(sentences):
        run = exercise(setting, [parse_fault(fault) for fault in faults], name=f"{name}-{index}")
        told.append(
            {
                "ended": run.ended,
                "message": run.message,
                "digest": run.digest,
                "rungs": rungs(run),
                "struck": run.struck,
                "quarantine": run.quarantine,
                "decisions": run.decisions(),
                "texts": [event.text for event in run.events],
            }
        )
    return told


def exercised(pool: RankPool, config: RunConfig, place: Place, sentences: list[list[str]], name: str) -> Any:
    """What rank 0 tells of a run with each list of faults, after a look at whether the others tell the same."""
    with_cache(pool, config, place)
    results = pool(runs, config=config, place=place, sentences=sentences, name=name)
    for other in results[1:]:
        assert other == results[0]
    return results[0]


NAN, FLIP = "at(step=12, rank=1).gradient_is_nan()", "at(step=16).flip_bit_in_weight()"
TEACHER_FLIP = "at(step=14, rank=1).flip_bit_in_teacher()"


@pytest.mark.parametrize(("stage", "where"), [(2, "replica"), (3, "zero3"), (2, "cache")])
def test_a_transient_fault_in_a_distillation_never_happened(
    two_ranks: RankPool, place: Place, stage: int, where: str
) -> None:
    """That of a teacher's weight too; and a cache gives the right targets when the same steps are done again."""
    loss = {"cross_entropy": 0.5, "weight": 0.5}
    config = make_config(place, stage=stage, loss=loss, teacher={"place": where})
    sentences = [[], [NAN, FLIP], *([] if where == "cache" else [[TEACHER_FLIP]])]
    clean, *harmed = exercised(two_ranks, config, place, sentences, f"transient-{where}")
    assert clean["ended"] == "completed"
    assert clean["rungs"] == ()
    for run in harmed:
        assert (run["ended"], run["message"]) == ("completed", "")
        assert run["struck"] is not None
        assert run["digest"] == clean["digest"], run["rungs"]
    assert harmed[0]["rungs"] == ("replay", "rollback")
    if where != "cache":
        assert harmed[1]["rungs"] == ("rollback",)
        assert any("weights of the teacher were not what was loaded on rank 1" in text for text in harmed[1]["texts"])


def test_cached_knowledge_gives_the_bits_of_the_teacher_that_wrote_it(two_ranks: RankPool, place: Place) -> None:
    loss = {"cross_entropy": 0.5, "weight": 0.5, "temperature": 2.0}
    digests = [
        exercised(two_ranks, make_config(place, loss=loss, teacher={"place": where}), place, [[]], f"bits-{where}")[0][
            "digest"
        ]
        for where in ("replica", "cache")
    ]
    assert digests[0] == digests[1]


def test_poisoned_data_is_left_out_and_what_follows_learns_from_its_own_targets(
    two_ranks: RankPool, place: Place
) -> None:
    """The bits of a run from whose data the quarantined batches were left out from the start."""
    for where in ("replica", "cache"):
        config = make_config(place, loss={"cross_entropy": 1.0, "weight": 0.02}, teacher={"place": where})
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e-2})})
        (run,) = exercised(two_ranks, config, place, [["batches(19, 20).random_tokens()"]], f"poison-{where}")
        assert run["ended"] == "completed"
        assert run["quarantine"] == ((19, 20),)
        data = config.data.model_copy(update={"exclude_batches": run["quarantine"]})
        without = config.model_copy(update={"data": data})
        (excluded,) = exercised(two_ranks, without, place, [[]], f"excluded-{where}")
        assert run["digest"] == excluded["digest"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_students_own_text_is_written_again_when_a_step_is_done_again(
    two_ranks: RankPool, place: Place, stage: int
) -> None:
    on_policy = {"fraction": 0.5, "tokens": 6}
    config = make_config(place, stage=stage, loss={"kind": "reverse_kl"}, on_policy=on_policy)
    clean, harmed = exercised(two_ranks, config, place, [[], [NAN, FLIP]], f"own-text-{stage}")
    assert (clean["ended"], harmed["ended"]) == ("completed", "completed")
    assert harmed["rungs"] == ("replay", "rollback")
    assert harmed["digest"] == clean["digest"]
