"""A classifier with the tokens of its data, on two ranks: it learns as one with all tokens, whole and sharded, from a
teacher that has them all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import RankPool
from torch import Tensor

from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig
from trainer.config.teaching import writing
from trainer.engine.ranks import Ranks
from trainer.records import Outcome
from trainer.stages.build import Setting
from trainer.stages.exercise import Unsaved, release
from trainer.stages.prepare import open_run, prepare_run
from trainer.stages.teach import Teaching
from trainer.stages.teachers import open_teacher
from trainer.stop import StopRequest

NAMES = ("bad", "good")
WORDS = {"bad": ["dull", "long", "weak", "story"], "good": ["bright", "short", "strong", "film"]}
BETWEEN = [f"[unused{n}]" for n in range(7)]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
LETTERS = sorted(set("".join("".join(words) for words in WORDS.values())))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews, and a teacher that has learned nothing, most of whose tokens are never used."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("reviews")
    lines = []
    for number in range(64):
        generator = random.Random(number)
        label = NAMES[number % 2]
        text = " ".join([*generator.choices(WORDS[label], k=generator.randint(2, 9)), str(number)])
        lines.append(json.dumps({"text": text, "label": label}) + "\n")
    (folder / "reviews.jsonl").write_text("".join(lines))
    names = BETWEEN + SPECIAL + [f"never{n}" for n in range(60)] + WORDS["bad"] + WORDS["good"]
    names += [*LETTERS, *(f"##{letter}" for letter in LETTERS), "##g", "behind"]
    places = {name: number for number, name in enumerate(dict.fromkeys(names))}
    backend = Tokenizer(models.WordPiece(places, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", places["[SEP]"]), ("[CLS]", places["[CLS]"]))
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder / "teacher")
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=len(places),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        pad_token_id=places["[PAD]"],
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    return folder


def config_of(root: Path, keep: str, *, stage: int = 0, place: str = "replica") -> RunConfig:
    options: dict[str, Any] = {
        "name": "kept",
        "stage": "distill",
        "seed": 3,
        "precision": "fp32",
        "data": {
            "sources": ({"files": (str(root / "reviews.jsonl"),), "label": "label"},),
            "clean": {"min_characters": 1, "min_letters": 0.0, "near_duplicates": None},
            "tokenizer": {"keep": keep},
            "sequence_length": 16,
            "held_out": 0.2,
            "prepared": str(root / "data"),
        },
        "model": {"pretrained": str(root / "teacher"), "layers": "0, 2"},
        "objective": {"kind": "classification"},
        "distill": {
            **({} if place == "cache" else {"hidden": {"layers": ((1, 1), (2, 3))}}),
            "teacher": {"place": place, "pretrained": str(root / "teacher"), "precision": "fp32"},
            "cache": {"folder": str(root / "cache"), "precision": "fp32"},
        },
        "batch": {"samples": 8, "micro": 2},
        "optim": {"lr": 1e-2},
        "schedule": {"duration": 6, "warmup": 1},
        "zero": {"stage": stage},
        "snapshots": {"every": None},
        "evaluation": {"every": None},
        "checkpoint": {"every": None},
        "telemetry": {"tensorboard": False, "console": "quiet", "weights_every": None, "part_norms_every": None},
        "cluster": {"device": "cpu"},
    }
    return RunConfig.model_validate(options)


def files_of(root: Path, config: RunConfig) -> RunFiles:
    tokenizer, place = config.data.tokenizer, config.distill.teacher.place if config.distill else ""
    files = RunFiles(root / f"run-{tokenizer.keep}-{config.zero.stage}-{place}")
    if not files.root.exists():
        files.root.mkdir()
        # the cache is written later
        prepare_run(files, writing(config, sharded=False) if place == "cache" else config)
    return files


def setting_of(rank: int, world_size: int, config: RunConfig, files: RunFiles) -> Setting:
    data, facts = open_run(files, config)
    return Setting(files, config, Ranks(rank, world_size, rank), "cpu", "fp32", data, facts, StopRequest())


def knows(teacher: Any, setting: Setting) -> Tensor:
    """What the teacher says of the first samples, [8, classes]."""
    samples = setting.prepared.samples("train", 16, "join")
    ids = np.arange(8)
    arrays = samples.fetch(ids)
    tensors = {name: torch.from_numpy(each) for name, each in arrays.items()}
    tensors |= {name: torch.from_numpy(each) for name, each in teacher.annotate(ids, arrays).items()}
    logits: Tensor = teacher.knowledge(tensors).targets.logits
    return logits


def train(rank: int, world_size: int, config: RunConfig, files: RunFiles) -> dict[str, Any]:
    setting = setting_of(rank, world_size, config, files)
    training = Unsaved(setting)
    losses = []
    with training.parts() as parts:
        assert training.teacher is not None
        known = knows(training.teacher, setting).numpy()
        model: Any = getattr(training.teacher, "_model", None)
        padding = model and model.config.pad_token_id
        for step in range(4):
            batch = next(parts.stream)
            stats = parts.engine.accumulate(batch, attempt=step, step=step)
            losses.append((stats.loss, stats.grad_norm, *stats.parts.values()))
            parts.engine.apply(1.0, 1e-2)
    training.telemetry.close(Outcome("completed", 0, "", 0, 0, None))
    release(training.engine)
    return {"losses": losses, "known": known, "padding": padding, "parameters": setting.facts.num_parameters}


def trained(pool: RankPool, root: Path, config: RunConfig) -> dict[str, Any]:
    first, second = pool(train, config=config, files=files_of(root, config))
    np.testing.assert_array_equal(first["losses"], second["losses"])
    return first  # type: ignore[no-any-return]


@pytest.mark.parametrize(("stage", "place"), [(0, "replica"), (3, "replica"), (0, "zero3"), (3, "zero3")])
def test_learns_as_with_all_tokens(two_ranks: RankPool, root: Path, stage: int, place: str) -> None:
    used = trained(two_ranks, root, config_of(root, "used", stage=stage, place=place))
    whole = trained(two_ranks, root, config_of(root, "all"))
    np.testing.assert_allclose(used["losses"], whole["losses"], rtol=3e-5)
    np.testing.assert_allclose(used["known"], whole["known"], rtol=1e-5, atol=1e-6)
    assert whole["known"].std() > 1e-3
    # by which a model that reads from left to right finds the end of a text
    assert used["padding"] == whole["padding"] == len(BETWEEN) + SPECIAL.index("[PAD]")
    rows = len(BETWEEN) + 60 + 1  # "behind" is never used either; "##g" is a single character
    assert used["parameters"] == whole["parameters"] - rows * 16


def teach(rank: int, world_size: int, config: RunConfig, files: RunFiles) -> bool:
    setting = setting_of(rank, world_size, writing(config, sharded=False), files)
    return Teaching(setting, "train", open_teacher, lambda *_: None).run() is not None


def test_a_cache_holds_what_the_teacher_says_of_its_own_tokens(two_ranks: RankPool, root: Path) -> None:
    config = config_of(root, "used", place="cache")
    assert all(two_ranks(teach, config=config, files=files_of(root, config)))
    used = trained(two_ranks, root, config)
    whole = trained(two_ranks, root, config_of(root, "all"))
    np.testing.assert_allclose(used["known"], whole["known"], rtol=1e-5, atol=1e-6)
