"""A teacher on several ranks knows what the same model knows in one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import RankPool
from workload import LENGTH, VOCABULARY, global_batch, make_config, make_model

from trainer.config.resolve import deepspeed_config
from trainer.config.schema import RunConfig
from trainer.engine.ranks import Ranks
from trainer.errors import ConfigError, DataError
from trainer.knowledge import DenseTargets, Head, Knowledge, LogitTargets
from trainer.model.head import find_head, logits_of
from trainer.teacher.build import build_teacher
from trainer.teacher.model import TeacherModel

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("causal", {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": LENGTH}),
    "llama": ("causal", {**_GROUPED, "tie_word_embeddings": False}),
    "gemma2": ("causal", {**_GROUPED, "head_dim": 16, "final_logit_softcapping": 0.1}),
    "cohere": ("causal", {**_GROUPED, "logit_scale": 0.25}),
    "mixtral": ("causal", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bert": ("masked", {**_SIZES, "max_position_embeddings": LENGTH}),
    "roberta": ("masked", {**_SIZES, "max_position_embeddings": LENGTH + 2}),
    "classifier": ("classification", {**_SIZES, "max_position_embeddings": LENGTH, "num_labels": 3}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each model, with dropout in its configuration and no weight left at 0 or 1."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
    )

    folder = tmp_path_factory.mktemp("teachers")
    classes = {
        "causal": AutoModelForCausalLM,
        "masked": AutoModelForMaskedLM,
        "classification": AutoModelForSequenceClassification,
    }
    for name, (kind, fields) in MODELS.items():
        torch.manual_seed(8)
        config = AutoConfig.for_model(
            "bert" if name == "classifier" else name,
            vocab_size=VOCABULARY,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            **fields,
        )
        for field in ("resid_pdrop", "embd_pdrop", "hidden_dropout_prob", "attention_dropout"):
            if hasattr(config, field):
                setattr(config, field, 0.5)
        model = classes[kind].from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # in several files, so that all of them are read
        model.save_pretrained(folder / name, max_shard_size="20KB")
    return folder


def config_of(folder: Path, name: str, place: str, **teacher: Any) -> RunConfig:
    distill = {"teacher": {"place": place, "pretrained": str(folder / name), **teacher}}
    if MODELS[name][0] != "classification":
        distill |= {"hidden": {"layers": ((1, 0), (2, 2))}, "relations": {"heads": 2}}
    return make_config(objective={"kind": MODELS[name][0]}, distill=distill, stage="distill")


def text() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(2, VOCABULARY, (2, 12)))


def logits_in(knowledge: Knowledge) -> torch.Tensor:
    match knowledge.targets:
        case DenseTargets(hidden=hidden, head=head):
            with knowledge.targets.whole():
                return logits_of(hidden, head)
        case LogitTargets(logits=logits):
            return logits
    raise AssertionError


def reference(folder: Path, name: str) -> dict[str, np.ndarray]:
    import transformers

    kind = {"causal": "CausalLM", "masked": "MaskedLM", "classification": "SequenceClassification"}[MODELS[name][0]]
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder / name)
    with torch.no_grad():
        outputs = model(input_ids=text(), output_hidden_states=True)
    return {
        "logits": outputs.logits.numpy(),
        "embeddings": outputs.hidden_states[0].numpy(),
        "second": outputs.hidden_states[2].numpy(),
    }


def build(config: RunConfig, rank: int, world_size: int, node_size: int | None = None) -> TeacherModel:
    ranks = Ranks(rank, world_size, rank % (node_size or world_size))
    return build_teacher(config, ranks=ranks, device="cpu", vocabulary=VOCABULARY)


def ask(
    rank: int, world_size: int, folder: Path, name: str, place: str, node_size: int | None = None, **options: Any
) -> dict[str, Any]:
    """What the teacher knows, and how it is held."""
    teacher = build(config_of(folder, name, place, **options), rank, world_size, node_size)
    tensors = {"input_ids": text(), "labels": text()}
    if name != "classifier":
        # as the stream gives them
        tensors["position_ids"] = torch.arange(12).expand(2, 12)
    random = torch.get_rng_state()
    first, second = teacher.knowledge(tensors), teacher.knowledge(tensors)
    model: Any = teacher._model
    result = {
        "logits": logits_in(first).numpy(),
        "again": bool(torch.equal(logits_in(first), logits_in(second))),
        "states": {layer: state.numpy() for layer, state in first.states.items()},
        "query": None if first.attention is None else first.attention.query.shape,
        "frozen": not any(p.requires_grad for p in model.parameters())
        and not any(module.training for module in model.modules())
        and torch.equal(random, torch.get_rng_state()),
        "held": sum(tensor.numel() for tensor in teacher.tensors()),
        "whole_between": sum(p.numel() for p in model.parameters()),
        "parameters": teacher.num_parameters,
        "found": teacher.mend(),
    }
    teacher.close()
    return result


@pytest.mark.parametrize("place", ["replica", "zero3"])
@pytest.mark.parametrize("name", MODELS)
def test_knows_what_the_model_knows(two_ranks: RankPool, saved: Path, name: str, place: str) -> None:
    expected = reference(saved, name)
    for found in two_ranks(ask, folder=saved, name=name, place=place):
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=2e-6)
        if name != "classifier":
            np.testing.assert_allclose(found["states"][0], expected["embeddings"], rtol=1e-5, atol=2e-6)
            np.testing.assert_allclose(found["states"][2], expected["second"], rtol=1e-5, atol=2e-6)
            assert found["query"] == (2, 12, 32)
        assert found["again"]
        assert found["frozen"]
        assert found["found"] is None


@pytest.mark.parametrize("name", ["llama", "classifier"])
def test_a_sharded_teacher_is_whole_nowhere(two_ranks: RankPool, saved: Path, name: str) -> None:
    # the classifier has parameters that two ranks cannot halve
    whole = two_ranks(ask, folder=saved, name=name, place="replica")
    parts = two_ranks(ask, folder=saved, name=name, place="zero3")
    assert [found["held"] for found in whole] == [whole[0]["parameters"]] * 2
    assert sum(found["held"] for found in parts) == whole[0]["parameters"] == parts[0]["parameters"]
    assert [found["whole_between"] for found in parts] == [0, 0]


def test_shards_within_a_node(four_ranks: RankPool, saved: Path) -> None:
    expected = reference(saved, "llama")["logits"]
    everywhere = four_ranks(ask, folder=saved, name="llama", place="zero3", node_size=2)
    by_node = four_ranks(ask, folder=saved, name="llama", place="zero3", node_size=2, within_node=True)
    for found in (*everywhere, *by_node):
        np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=2e-6)
    parameters = by_node[0]["parameters"]
    assert sum(found["held"] for found in everywhere) == parameters
    assert sum(found["held"] for found in by_node[:2]) == sum(found["held"] for found in by_node[2:]) == parameters


def harm(rank: int, world_size: int, folder: Path, place: str, harmed: list[int], **options: Any) -> dict[str, Any]:
    """A bit of the weights flips on some ranks."""
    teacher = build(config_of(folder, "llama", place, **options), rank, world_size, 2)
    tensors = {"input_ids": text()}
    before = logits_in(teacher.knowledge(tensors))
    if rank in harmed:
        for tensor in teacher.tensors()[1:3]:
            tensor.view(torch.int32)[0] ^= 1 << 30
    harmed_logits = logits_in(teacher.knowledge(tensors))
    sentences = [teacher.mend(), teacher.mend()]
    after = logits_in(teacher.knowledge(tensors))
    teacher.close()
    return {
        "sentences": sentences,
        "changed": not torch.equal(before, harmed_logits),
        "restored": torch.equal(before, after),
    }


@pytest.mark.parametrize("place", ["replica", "zero3"])
def test_harm_is_found_and_mended(two_ranks: RankPool, saved: Path, place: str) -> None:
    results = two_ranks(harm, folder=saved, place=place, harmed=[1])
    for result in results:
        sentence = "weights of the teacher were not what was loaded on rank 1 (2 tensors): loaded again"
        assert result["sentences"] == [sentence, None]
        assert result["restored"]
    # what one rank holds wrong is wrong for all who gather it
    assert [result["changed"] for result in results] == [place == "zero3", True]


def test_harm_in_one_node_is_mended(four_ranks: RankPool, saved: Path) -> None:
    results = four_ranks(harm, folder=saved, place="zero3", harmed=[1, 2], within_node=True)
    assert all(result["restored"] and result["changed"] for result in results)
    assert "rank 1 (2 tensors), rank 2 (2 tensors)" in results[3]["sentences"][0]


def other_files(rank: int, world_size: int, copy: Path) -> str:
    from safetensors.torch import load_file, save_file

    teacher = build(config_of(copy.parent, copy.name, "zero3"), rank, world_size)
    torch.distributed.barrier()
    if rank == 0:
        for file in copy.glob("*.safetensors"):
            save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    torch.distributed.barrier()
    teacher.tensors()[0].view(torch.int32)[0] ^= 1 << 30
    try:
        teacher.mend()
    except DataError as error:
        return str(error)
    finally:
        teacher.close()
    return "nothing was said"


def test_files_that_have_changed_do_not_mend(two_ranks: RankPool, saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "llama"
    shutil.copytree(saved / "llama", copy)
    first, second = two_ranks(other_files, copy=copy)
    assert first == second
    assert "its files have changed" in first


def refused(rank: int, world_size: int, config: RunConfig, node_size: int | None = None) -> list[tuple[str, str]]:
    try:
        build(config, rank, world_size, node_size)
    except ConfigError as error:
        return error.problems
    return []


def test_what_is_refused(two_ranks: RankPool, saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    alone = config_of(saved, "llama", "zero3", within_node=True)
    for problems in two_ranks(refused, config=alone, node_size=1):
        assert problems[0][0] == "distill.teacher.within_node"
        assert "alone on its node" in problems[0][1]
    nowhere = config_of(tmp_path, "llama", "zero3")
    for problems in two_ranks(refused, config=nowhere):
        assert problems[0][0] == "distill.teacher.pretrained"
    lacking = tmp_path / "llama"
    shutil.copytree(saved / "llama", lacking)
    for file in lacking.glob("model-*.safetensors"):
        tensors = load_file(file)
        if tensors.pop("model.layers.1.mlp.up_proj.weight", None) is not None:
            save_file(tensors, file, {"format": "pt"})
    for place in ("zero3", "replica"):
        for problems in two_ranks(refused, config=config_of(tmp_path, "llama", place)):
            assert problems == [
                (
                    "distill.teacher.pretrained",
                    "lacks 1 of the model's weights, model.layers.1.mlp.up_proj.weight among them: "
                    "it can teach nothing",
                )
            ]


def learn(rank: int, world_size: int, folder: Path, place: str, stage: int, first: str, **options: Any) -> Any:
    """Some steps of a student that learns from the teacher's logits: its weights, and the losses of this rank."""
    import deepspeed

    config = config_of(folder, "gpt2", place, **options).model_copy(
        update={"zero": make_config(zero={"stage": stage}).zero}
    )
    teacher = build(config, rank, world_size, 2) if first == "teacher" else None
    student_options = deepspeed_config(config, world_size, "cpu", "fp32")
    student_options["train_batch_size"] = 2 * world_size
    student_options["gradient_accumulation_steps"] = 1
    model = make_model()
    if stage == 3:
        student_options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        deepspeed.zero.Init(module=model, config_dict_or_path=student_options)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        config=student_options,
        dist_init_required=False,
    )
    teacher = teacher or build(config, rank, world_size, 2)
    head = find_head(model.eval(), engine)
    losses = []
    for index in range(4):
        engine.train()
        ids = torch.from_numpy(global_batch(config, index)[0][rank * 2 : rank * 2 + 2])
        targets = teacher.knowledge({"input_ids": ids}).targets
        assert isinstance(targets, DenseTargets)

        def compute(hidden: torch.Tensor, weights: Head, targets: DenseTargets = targets) -> torch.Tensor:
            # the teacher's head is gathered while the student's is
            with targets.whole():
                wanted = logits_of(targets.hidden, targets.head)
            return (logits_of(hidden, weights) - wanted).square().mean()

        loss = head.run(engine, {"input_ids": ids}, compute)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        assert not any(module.training for module in teacher._model.modules())
    assert teacher.mend() is None
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        found = {key: value.detach().numpy().copy() for key, value in parameters.items()}
    engine.destroy()
    teacher.close()
    return losses, found


@pytest.mark.parametrize("first", ["teacher", "student"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_student_learns_the_same_from_a_sharded_teacher(
    two_ranks: RankPool, saved: Path, stage: int, first: str
) -> None:
    results = [two_ranks(learn, folder=saved, place=place, stage=stage, first=first) for place in ("replica", "zero3")]
    for (replica_losses, replica), (sharded_losses, sharded) in zip(*results, strict=True):
        assert replica_losses[-1] < replica_losses[0]
        np.testing.assert_allclose(sharded_losses, replica_losses, rtol=1e-6)
        for name, value in replica.items():
            np.testing.assert_allclose(sharded[name], value, rtol=0, atol=1e-6)


def test_a_student_of_four_ranks_learns_from_a_teacher_in_each_node(four_ranks: RankPool, saved: Path) -> None:
    replica = four_ranks(learn, folder=saved, place="replica", stage=3, first="student")
    by_node = four_ranks(learn, folder=saved, place="zero3", stage=3, first="student", within_node=True)
    for (_, expected), (_, found) in zip(replica, by_node, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)
