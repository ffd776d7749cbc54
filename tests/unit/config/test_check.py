"""Contradictions are refused all at once; options without effect are warned about."""

from typing import Any

import pytest

from trainer.config.check import check_config, unsupported
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError


def config_with(**changes: Any) -> RunConfig:
    """A valid config with `section__option=value` changed; None in place of a section leaves it out."""
    data: dict[str, Any] = {
        "name": "small",
        "data": {"sources": ({"stdlib": True},), "tokenizer": {"train": {}}},
        "model": {"config": {"model_type": "llama"}},
        "batch": {"samples": 16, "micro": 4},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": 100},
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return RunConfig.model_validate(data)


def test_a_valid_config_has_neither_problems_nor_warnings():
    assert check_config(config_with()) == []


ASKED = {"prompt": "q", "answer": "a"}
FOLDERS = {"files": ("*/*.txt",), "label_from_folder": True}
CLASSIFIED = {"sources": ({"hub": "x", "label": "y"},), "tokenizer": {"train": {}}}

NO_SOURCE = "must have exactly one of `stdlib`, `files` and `hub`, but has "


@pytest.mark.parametrize(
    ("changes", "path", "sentence"),
    [
        ({"name": "a/b"}, "name", "holds '/', but names one directory; to put it elsewhere set `runs`"),
        ({"name": "a\nb"}, "name", "holds the character U+000A; a run is named on one line, in printable characters"),
        (
            {"name": "\u202egnp"},
            "name",
            "holds the character U+202E; a run is named on one line, in printable characters",
        ),
        ({"name": ".."}, "name", "begins with '.'; begin it with a letter or a digit"),
        ({"name": "-rf"}, "name", "begins with '-'; begin it with a letter or a digit"),
        ({"name": "a "}, "name", "begins or ends with a space"),
        ({"name": "語" * 90}, "name", "is 270 bytes long; file names take up to 200"),
        ({"data__sources": ({},)}, "data.sources.0", NO_SOURCE + "none of them"),
        (
            {"data__sources": ({"hub": "x"}, {"stdlib": True, "hub": "x"})},
            "data.sources.1",
            NO_SOURCE + "`stdlib` and `hub`",
        ),
        (
            {"guard__clean_steps": 6, "snapshots": {"every": 2, "keep": 3}},
            "guard.clean_steps",
            "no snapshot gets 6 steps old: 3 are kept, one every 2 steps; raise snapshots.keep or snapshots.every",
        ),
        (
            {"data__sources": ({"hub": "x", "column": "a", "template": "b"},)},
            "data.sources.0",
            "has `column` and `template`; give the one that makes the text",
        ),
        (
            {"data__sources": ({"hub": "x", "name": "a"}, {"stdlib": True, "name": "a"})},
            "data.sources",
            "two sources are named 'a'; give each its own name",
        ),
        ({"data__exclude_batches": ((3, 2),)}, "data.exclude_batches.0", "is [first, last], but 3 comes after 2"),
        ({"data__tokenizer": {"train": {}, "path": "x"}}, "data.tokenizer", "has `path` and `train`; give one of them"),
        (
            {"data__tokenizer": {}},
            "data.tokenizer",
            "give `path` or `train`: a model from scratch brings no tokenizer",
        ),
        ({"model__config": None}, "model", "must have exactly one of `config` and `pretrained`, but has neither"),
        ({"model__pretrained": "x"}, "model", "must have exactly one of `config` and `pretrained`, but has both"),
        (
            {"model__config": {"hidden_size": 8}},
            "model.config.model_type",
            "is missing; name the architecture as transformers does (llama, gpt2, bert, …)",
        ),
        (
            {"model__config": {"model_type": "llama", "max_position_embeddings": 512}},
            "data.sequence_length",
            "1024 tokens do not fit the positions (model.config.max_position_embeddings: 512)",
        ),
        (
            {"model__config": {"model_type": "llama", "vocab_size": 1000}},
            "data.tokenizer.train.vocabulary",
            "4096 tokens are more than the model's vocabulary (model.config.vocab_size: 1000)",
        ),
        (
            {"zero__stage": 0, "zero__offload": "optimizer"},
            "zero.offload",
            "needs zero.stage 1, 2 or 3: stage 0 does not shard the optimizer",
        ),
        (
            {"zero__stage": 2, "zero__offload": "all"},
            "zero.offload",
            "`all` needs zero.stage 3: under stage 2 the weights are not sharded",
        ),
        (
            {"zero__offload": "optimizer", "objective__l2": 0.1},
            "objective",
            "l1 and l2 do not work with zero.offload; use optim.weight_decay, or no offload",
        ),
        (
            {"objective__kind": "masked", "data__boundaries": "block"},
            "data.boundaries",
            "`block` needs the causal objective: masked models look across; use `positions`",
        ),
        (
            {"precision": "fp16", "zero__stage": 0, "cluster__device": "cuda"},
            "zero.stage",
            "DeepSpeed does not scale the fp16 loss under stage 0; use stage 1, or bf16",
        ),
        (
            {"data__clean": {"max_characters": 10}},
            "data.clean.max_characters",
            "10 is less than data.clean.min_characters (32): no document fits",
        ),
        (
            {"cluster__ranks_per_node": 3},
            "batch.samples",
            "16 samples do not divide into micro-batches of 4 on 3 ranks (4 × 3 = 12); use 12 or 24, or another "
            "batch.micro",
        ),
        (
            {"schedule__warmup": 101},
            "schedule.warmup",
            "the warm-up of 101 steps is longer than the run of 100; shorten it",
        ),
        (
            {"schedule__kind": "wsd", "schedule__warmup": 60, "schedule__decay": 50},
            "schedule.decay",
            "warm-up (60 steps) and decay (50 steps) are longer than the run of 100",
        ),
        ({"precision": "fp16", "cluster__device": "cpu"}, "precision", "fp16 needs a GPU; use bf16 or fp32 on CPU"),
        (
            {"model__attention": "flash_attention_2", "cluster__device": "cpu"},
            "model.attention",
            "flash_attention_2 needs a GPU; use sdpa or eager on CPU",
        ),
        (
            {"objective__kind": "classification", "data__sources": ({"hub": "x", "label": "y"}, {"hub": "z"})},
            "data.sources.1.label",
            "is needed: name the column of the class (objective.kind is classification)",
        ),
        (
            {"objective__kind": "regression", "data__sources": ({"hub": "x"},)},
            "data.sources.0.label",
            "is needed: name the column of the number (objective.kind is regression)",
        ),
        (
            {"objective__kind": "classification", "data__sources": ({"hub": "x", "label_from_folder": True},)},
            "data.sources.0.label_from_folder",
            "is for `files`; name the column of a hub dataset in `label`",
        ),
        (
            {"objective__kind": "classification", "data__sources": (FOLDERS | {"label": "y"},)},
            "data.sources.0",
            "has `label` and `label_from_folder`; give one of them",
        ),
        (
            {"objective__kind": "seq2seq", "data__sources": ({"hub": "x", "prompt": "it"},)},
            "data.sources.0.answer",
            "is needed: name the column (objective.kind is seq2seq)",
        ),
        (
            {"objective__kind": "question_answering", "data__sources": ({"hub": "x", "template": "t", **ASKED},)},
            "data.sources.0.template",
            "moves the places that labels name; give `column` (objective.kind is question_answering)",
        ),
        (
            {"data__sources": ({"hub": "x", "prompt": "q"},)},
            "data.sources.0.answer",
            "is needed: `prompt` and `answer` go together",
        ),
        (
            {"data__sources": ({"hub": "x", "messages": "m", **ASKED},)},
            "data.sources.0",
            "has `messages` and `prompt`; give the one that makes the conversation",
        ),
        (
            {"data__sources": ({"hub": "x", "messages": "m", "column": "text"},)},
            "data.sources.0.column",
            "makes a text, and the text of this source is made of what is asked and answered",
        ),
        (
            {"data__sources": ({"hub": "x", "messages": "m"}, {"stdlib": True})},
            "data.sources.1",
            "has neither `messages` nor `prompt`, which other sources have: put it into a run of its own",
        ),
        (
            {"objective__kind": "classification"},
            "data.sources.0.label",
            "the standard library's files have no classes; use other sources, or another objective.kind",
        ),
        (
            {"data__sources": ({"hub": "x", "use": "held_out"},)},
            "data.sources",
            "none is trained on: `use` is held_out everywhere",
        ),
        (
            {"data__tokenizer": {"path": "/words", "keep": "used"}},
            "data.tokenizer.keep",
            "`used` is for classifiers, but objective.kind is causal; use `all`",
        ),
        (
            {"data__tokenizer__keep": "used", "objective__kind": "classification"},
            "data.tokenizer.keep",
            "`used` is for tokenizers that exist, and `train` makes one; use `all`",
        ),
        (
            {
                "data": {"sources": CLASSIFIED["sources"], "tokenizer": {"keep": "used"}},
                "objective__kind": "classification",
                "model": {"pretrained": "/models/m.gguf"},
            },
            "data.tokenizer.keep",
            "`used` cannot take rows of embeddings from a .gguf file; use `all`, or another form of the model",
        ),
    ],
)
def test_each_contradiction_is_one_sentence_at_its_path(changes, path, sentence):
    with pytest.raises(ConfigError) as refused:
        check_config(config_with(**changes))
    assert (path, sentence) in refused.value.problems


def test_all_contradictions_come_at_once():
    with pytest.raises(ConfigError) as refused:
        check_config(config_with(name="/", data__tokenizer={}, model__config=None, batch__micro=3), "x.yaml")
    assert [path for path, _ in refused.value.problems] == ["name", "data.tokenizer", "model", "batch.samples"]
    assert str(refused.value).startswith("x.yaml has 4 problems:\n")


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"objective__mask_fraction": 0.3}, "objective.mask_fraction: has no effect: objective.kind is causal"),
        ({"schedule__decay": 10}, "schedule.decay: has no effect: schedule.kind is cosine"),
        (
            {"schedule__kind": "constant", "schedule__floor": 0.5},
            "schedule.floor: has no effect: schedule.kind is constant",
        ),
        (
            {"model__overrides": {"a": 1}},
            "model.overrides: has no effect: the model is made from model.config: write it there",
        ),
        (
            {"model__config": None, "model__pretrained": "x", "model__initialisation": "residual-scaled"},
            "model.initialisation: has no effect: the weights come from model.pretrained",
        ),
        ({"zero__overlap": False, "zero__stage": 0}, "zero.overlap: has no effect: zero.stage is 0"),
        ({"zero__overlap": False, "cluster__device": "cpu"}, "zero.overlap: has no effect: there is no overlap on CPU"),
        ({"zero__bucket_elements": 7, "zero__stage": 0}, "zero.bucket_elements: has no effect: zero.stage is 0"),
        (
            {"cluster__threads_per_rank": 2, "cluster__device": "cuda"},
            "cluster.threads_per_rank: has no effect: cluster.device is cuda",
        ),
        ({"evaluation__every": 7, "data__held_out": 0}, "evaluation.every: has no effect: data.held_out is 0"),
        (
            {"data__sources": ({"stdlib": True, "split": "x"},)},
            "data.sources.0.split: has no effect: it belongs to `hub`",
        ),
        (
            {"data__sources": ({"hub": "x", "label": "y", "classes": ("a", "b")},)},
            "data.sources.0.label: has no effect: objective.kind is causal",
        ),
        (
            {"data__sources": ({"hub": "x", "pair": "y"},)},
            "data.sources.0.pair: has no effect: objective.kind is causal",
        ),
        (
            {"data__sources": ({"hub": "x", "classes": ("a", "b")},)},
            "data.sources.0.classes: has no effect: it belongs to `label`",
        ),
        (
            {"objective__kind": "classification", "data": CLASSIFIED | {"boundaries": "block"}},
            "data.boundaries: has no effect: each text is a sample of its own (objective.kind is classification)",
        ),
        (
            {"data__sources": ({"hub": "x", "use": "train"}, {"hub": "y", "use": "held_out"}), "data__held_out": 0.1},
            "data.held_out: has no effect: every source says where its documents go (`use`)",
        ),
        (
            {"data__sources": ({"hub": "x", "use": "train"},), "evaluation__every": 7},
            "evaluation.every: has no effect: every source is for training (`use`)",
        ),
        (
            {"data__sources": ({"stdlib": True, "column": "x"},)},
            "data.sources.0.column: has no effect: the standard library's files are text, not records",
        ),
        (
            {"guard": {"mode": "watch", "replay": False}},
            "guard.replay: has no effect: guard.mode is watch",
        ),
        ({"guard": {"mode": "off", "spike": 9.0}}, "guard.spike: has no effect: guard.mode is off"),
        ({"guard": {"mode": "off", "drift": 9.0}}, "guard.drift: has no effect: guard.mode is off"),
        (
            {"guard": {"mode": "off", "revisit": True}},
            "guard.revisit: has no effect: guard.mode is off: nothing is quarantined",
        ),
        ({"guard": {"cool": 1.0, "rewarm": 9}}, "guard.rewarm: has no effect: guard.cool is 1"),
        ({"guard": {"max_rollbacks": 0, "cool": 0.1}}, "guard.cool: has no effect: guard.max_rollbacks is 0"),
        (
            {"guard__checksum_every": 7},
            "guard.checksum_every: has no effect: there is one rank, and nothing to compare its weights with",
        ),
        (
            {"guard": {"mode": "off", "checksum_every": 7}, "cluster__ranks_per_node": 2},
            "guard.checksum_every: has no effect: guard.mode is off",
        ),
        ({"guard__mode": "off", "snapshots__every": 7}, "snapshots.every: has no effect: guard.mode is off"),
        ({"snapshots": {"every": None, "keep": 7}}, "snapshots.keep: has no effect: snapshots.every is null"),
        ({"guard__mode": "watch", "snapshots__audit": False}, "snapshots.audit: has no effect: guard.mode is watch"),
        (
            {"optim": {"lr": 1e-3, "clipping": "adagc", "clip": 0.0}},
            "optim.clip: is 0: adagc clips nothing in its first 100 steps, and learns from gradients of any size",
        ),
        (
            {"snapshots__every": None, "checkpoint__every": None},
            "guard.mode: there is no state to go back to: neither snapshots nor checkpoints are taken on the way",
        ),
        (
            {"data__accept_changed": True},
            "data.accept_changed: changed data will be accepted; the run can no longer be repeated exactly",
        ),
    ],
)
def test_each_option_without_effect_is_warned_about(changes, warning):
    assert check_config(config_with(**changes)) == [warning]


def test_an_option_at_its_default_is_not_warned_about():
    config = config_with(objective__mask_fraction=0.15, zero__stage=0, zero__bucket_elements=50_000_000)
    assert check_config(config) == []


def test_snapshots_may_be_as_young_as_they_like_where_nothing_goes_back_to_them():
    young = {"every": 1, "keep": 1}
    assert check_config(config_with(guard__clean_steps=1, snapshots={"every": 1, "keep": 2})) == []
    assert check_config(config_with(guard__mode="watch", snapshots={"every": None})) == []
    for idle in (young, young | {"every": None}):
        warnings = check_config(config_with(guard__mode="watch", snapshots=idle))
        assert all("has no effect" in warning for warning in warnings)


def test_auto_is_left_to_the_plan():
    config = config_with(precision="fp16")
    assert check_config(config) == []
    assert unsupported(config, "cpu", "fp16") == [("precision", "fp16 needs a GPU; use bf16 or fp32 on CPU")]
    assert unsupported(config, "cuda", "fp16") == []


def test_an_option_with_effect_is_not_warned_about():
    config = config_with(
        data__sources=({"hub": "x", "split": "y", "hub_config": "z", "column": "text"},),
        objective={"kind": "masked", "mask_fraction": 0.3},
        schedule={"duration": 100, "kind": "wsd", "decay": 10, "floor": 0.0},
        model__initialisation="residual-scaled",
        zero={"stage": 3, "overlap": False, "bucket_elements": 7, "offload": "all"},
        cluster__threads_per_rank=2,
        evaluation={"every": 7, "max_samples": 8},
        optim__decay_embeddings=True,
        guard={"spike": 9.0, "replay": False, "cool": 0.1, "rewarm": 7, "max_rollbacks": 1, "checksum_every": 7},
        snapshots={"every": 7, "keep": 4, "audit": False},
        cluster__ranks_per_node=2,
    )
    assert check_config(config) == []
    changed = config_with(model={"config": None, "pretrained": "x", "overrides": {"a": 1}}, data__tokenizer={})
    assert check_config(changed) == []
