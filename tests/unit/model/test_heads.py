"""Models of every kind of task: built with a head that fits, exported as transformers loads them, refused in words."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_configs import VOCABULARY, run_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from trainer.config.objective import ObjectiveConfig
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.model.build import build_model, meta_model
from trainer.model.configuration import decoder_start, model_configuration
from trainer.model.describe import describe
from trainer.model.heads import check_objective
from trainer.model.save import save_model
from trainer.objectives import make_objective
from trainer.records import Classes

PAD, END = 1, 0
TAGS = Classes(("B-LOC", "I-LOC", "O"), PAD)
NONE = Classes((), PAD)
CLASSES = {
    "multi_label": Classes(("gui", "net", "web"), PAD),
    "regression": NONE,
    "token_classification": TAGS,
    "question_answering": NONE,
    "seq2seq": NONE,
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "bart": {
        "model_type": "bart",
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 32,
    },
}
SEQ2SEQ["marian"] = SEQ2SEQ["bart"] | {"model_type": "marian"}


def config_of(name: str, kind: str, **options: Any) -> RunConfig:
    if name not in SEQ2SEQ:
        return run_config(name, kind=kind, **options)
    given = SEQ2SEQ[name] | options.pop("fields", {})
    config = run_config("llama", kind=kind, **options)
    return RunConfig.model_validate(config.model_dump() | {"model": {"config": given}})


def build(config: RunConfig, classes: Classes | None = None) -> Any:
    classes = classes or CLASSES[config.objective.kind]
    return build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32, classes=classes)


def arrays(kind: str, columns: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 8, 5])
    ids = torch.randint(5, VOCABULARY, (3, 16), generator=generator)[:, :columns]
    mask = torch.arange(columns) < lengths[:, None]
    tensors = {"input_ids": ids.where(mask, PAD), "attention_mask": mask.long()}
    labels = {
        "multi_label": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]),
        "regression": torch.tensor([0.5, -1.0, 2.0]),
        "token_classification": (ids % 3).where(mask, -100),
        "question_answering": torch.tensor([[1, 2], [0, 0], [3, 4]]),
        "seq2seq": torch.tensor([[7, 9, END], [8, END, -100], [10, 11, END]]),
    }[kind]
    if kind == "seq2seq":
        start = torch.full((3, 1), PAD)
        tensors["decoder_input_ids"] = torch.cat([start, labels[:, :-1].where(labels[:, :-1] >= 0, PAD)], 1)
    return {**tensors, "labels": labels}


CASES = [
    *((name, kind) for kind in ("multi_label", "regression") for name in ("bert", "roberta", "llama", "gpt2")),
    *((name, "token_classification") for name in ("bert", "modernbert", "gpt2")),
    *((name, "question_answering") for name in ("bert", "modernbert", "gpt2")),
    *((name, "seq2seq") for name in SEQ2SEQ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_losses_are_those_of_the_model_itself_and_know_no_padding(name: str, kind: str) -> None:
    config = config_of(name, kind)
    model = build(config).eval()
    objective = make_objective(config.objective)
    found, wider = (objective.evaluate(model, arrays(kind, columns)) for columns in (8, 16))
    for key in found:
        torch.testing.assert_close(found[key], wider[key], rtol=1e-5, atol=1e-6)
    tensors = arrays(kind)
    alone = [
        objective.evaluate(model, {key: value[row : row + 1] for key, value in tensors.items()})["loss"]
        for row in range(3)
    ]
    torch.testing.assert_close(sum(alone), found["loss"], rtol=1e-5, atol=1e-6)
    if kind == "question_answering":
        # transformers does not leave the padding out of the softmax
        tensors = {key: value[1:2] for key, value in tensors.items()}
        start, end = tensors.pop("labels").unbind(1)
        theirs = model(**tensors, start_positions=start, end_positions=end).loss
        torch.testing.assert_close(alone[1], theirs, rtol=1e-5, atol=1e-6)
    else:
        num_targets = int(objective.targets(tensors).sum())
        torch.testing.assert_close(found["loss"] / num_targets, model(**tensors).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("bert", "regression"), ("bert", "question_answering"), ("t5", "seq2seq")])
def test_facts_are_those_of_the_model_before_the_data_is_known(name: str, kind: str) -> None:
    config = config_of(name, kind)
    expected = {n: tuple(p.shape) for n, p in build(config).named_parameters()}
    assert {p.name: p.shape for p in describe(config, VOCABULARY).parameters} == expected
    assert describe(config, VOCABULARY).hidden_size == 16


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: Any) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad_token="<pad>")


def write_tokenizer(folder: Path, **roles: str) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(["<end>", "<pad>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **roles).save_pretrained(folder)
    return folder


def export(config: RunConfig, folder: Path, tokenizer: Path, classes: Classes | None = None) -> Any:
    classes = classes or CLASSES[config.objective.kind]
    model = build(config, classes).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.3)
    save_model(config, model.state_dict().items(), folder, tokenizer_path=tokenizer, vocabulary=VOCABULARY,
               dtype=torch.float32, classes=classes)  # fmt: skip
    return model


TEXTS = ["short", "somewhat longer", "mid size"]


def logits_of(model: Any, tokenizer: Path, text: str) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([AutoTokenizer.from_pretrained(tokenizer)(text)["input_ids"]]))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_pipeline_gives_each_label_its_own_probability(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    model = export(config_of(name, "multi_label"), tmp_path / "export", tokenizer_path)
    classify = pipeline("text-classification", model=str(tmp_path / "export"), device="cpu")
    for text, found in zip(TEXTS, classify(TEXTS, top_k=None, batch_size=3), strict=True):
        expected = logits_of(model, tokenizer_path, text).logits.sigmoid()[0]
        named = {each["label"]: each["score"] for each in found}
        assert named == pytest.approx(dict(zip(("gui", "net", "web"), expected.tolist(), strict=True)), abs=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_pipeline_gives_the_number_of_a_regression(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    model = export(config_of(name, "regression"), tmp_path / "export", tokenizer_path)
    classify = pipeline("text-classification", model=str(tmp_path / "export"), device="cpu")
    for text, found in zip(TEXTS, classify(TEXTS, batch_size=3), strict=True):
        expected = logits_of(model, tokenizer_path, text).logits[0, 0].item()
        assert found["score"] == pytest.approx(expected, abs=1e-5)


def test_a_pipeline_names_the_classes_of_tokens(tmp_path: Path, tokenizer_path: Path) -> None:
    model = export(config_of("bert", "token_classification"), tmp_path / "export", tokenizer_path)
    tag = pipeline("token-classification", model=str(tmp_path / "export"), device="cpu", ignore_labels=[])
    found = tag("a text")
    expected = logits_of(model, tokenizer_path, "a text").logits[0].argmax(-1).tolist()
    assert [each["entity"] for each in found] == [TAGS.names[number] for number in expected]


def test_answers_are_found_by_the_export(tmp_path: Path, tokenizer_path: Path) -> None:
    model = export(config_of("bert", "question_answering"), tmp_path / "export", tokenizer_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "export")
    ours, theirs = (logits_of(each, tokenizer_path, "who? me") for each in (model, loaded))
    torch.testing.assert_close(ours.start_logits, theirs.start_logits)
    torch.testing.assert_close(ours.end_logits, theirs.end_logits)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_the_export_writes_as_the_model_does(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    model = export(config_of(name, "seq2seq"), tmp_path / "export", tokenizer_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export").eval()
    assert (loaded.config.decoder_start_token_id, loaded.config.pad_token_id, loaded.config.eos_token_id) == (
        PAD,
        PAD,
        END,
    )
    if name == "bart":
        assert loaded.config.forced_eos_token_id == END
    generation = json.loads((tmp_path / "export/generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == PAD
    tensors = {key: value for key, value in arrays("seq2seq").items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**tensors).logits, loaded(**tensors).logits, rtol=1e-5, atol=1e-5)
        inputs = {key: tensors[key] for key in ("input_ids", "attention_mask")}
        written = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)
        first = loaded(**inputs, decoder_input_ids=torch.full((3, 1), PAD)).logits[:, 0].argmax(-1)
    assert written[:, 0].tolist() == [PAD] * 3
    assert torch.equal(written[:, 1], first)


def test_a_model_without_padding_gets_some_and_says_so(tmp_path: Path, caplog: Any) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    build_model(run_config("gpt2"), vocabulary=VOCABULARY, zero3=None, dtype=torch.float32).save_pretrained(
        tmp_path / "gpt2"
    )
    assert AutoConfig.from_pretrained(tmp_path / "gpt2").pad_token_id is None
    config = run_config(pretrained=str(tmp_path / "gpt2"), kind="multi_label")
    with caplog.at_level(logging.WARNING):
        model = export(config, tmp_path / "export", tokenizer, Classes(("gui", "net", "web"), END))
    assert "gpt2 has no padding token: token 0 fills up short texts" in caplog.text
    assert model.config.pad_token_id == END
    classify = pipeline("text-classification", model=str(tmp_path / "export"), device="cpu")
    assert classify.tokenizer.pad_token == "<end>"
    for text, found in zip(TEXTS, classify(TEXTS, top_k=None, batch_size=3), strict=True):
        expected = logits_of(model, tokenizer, text).logits.sigmoid()[0]
        assert sorted(each["score"] for each in found) == pytest.approx(sorted(expected.tolist()), abs=1e-5)


RATES = (0.25, 0.5, 0.01)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_a_new_classifier_of_many_labels_begins_at_their_frequencies(name: str, tmp_path: Path) -> None:
    build(run_config(name, kind="regression")).save_pretrained(tmp_path / "numbers")
    classes = Classes(CLASSES["multi_label"].names, PAD, RATES)
    for config in (
        run_config(name, kind="multi_label"),
        run_config(pretrained=str(tmp_path / "numbers"), kind="multi_label"),
    ):
        plain, model = build(config).state_dict(), build(config, classes)
        bias = {"bert": "classifier.bias", "roberta": "classifier.out_proj.bias", "llama": None}[name]
        for key, value in model.state_dict().items():
            if key == bias:
                torch.testing.assert_close(value.sigmoid(), torch.tensor(RATES))
                assert not plain[key].any()
            else:
                assert torch.equal(value, plain[key]), key


def test_a_classifier_that_has_learned_keeps_its_bias(tmp_path: Path) -> None:
    names = CLASSES["multi_label"].names
    build(run_config("bert", kind="multi_label"), Classes(names, PAD, RATES)).save_pretrained(tmp_path / "own")
    model = build(
        run_config(pretrained=str(tmp_path / "own"), kind="multi_label"), Classes(names, PAD, (0.5, 0.6, 0.7))
    )
    torch.testing.assert_close(model.classifier.bias.sigmoid(), torch.tensor(RATES))


def test_a_head_for_another_task_is_not_taken_for_this_one(tmp_path: Path, caplog: Any) -> None:
    """Classifiers of texts and of tokens name their heads alike, and those of three classes have the same shapes."""
    texts = build(run_config("bert", kind="multi_label"))
    texts.save_pretrained(tmp_path / "texts")

    def head(kind: str, classes: Classes) -> Any:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            return build(run_config(pretrained=str(tmp_path / "texts"), kind=kind), classes)

    own = head("multi_label", CLASSES["multi_label"])
    assert torch.equal(own.classifier.weight, texts.classifier.weight)
    assert not caplog.records
    for kind, classes in (("token_classification", TAGS), ("classification", Classes(("gui", "net", "web"), PAD))):
        model = head(kind, classes)
        assert model.classifier.weight.shape == texts.classifier.weight.shape
        assert not torch.equal(model.classifier.weight, texts.classifier.weight)
        assert torch.equal(
            model.bert.encoder.layer[1].output.dense.weight, texts.bert.encoder.layer[1].output.dense.weight
        )
        assert "drawn anew" in caplog.text
        assert tuple(model.config.id2label.values()) == classes.names
    answers = head("question_answering", NONE)
    assert answers.qa_outputs.weight.shape == (2, 16)
    assert answers.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    number = head("regression", NONE)
    assert number.classifier.weight.shape == (1, 16)
    assert number.config.problem_type == "regression"
    with pytest.raises(ConfigError, match="has the classes gui, net, web, which the data numbers as net, gui, web"):
        head("multi_label", Classes(("net", "gui", "web"), PAD))


def test_the_start_of_a_text_is_the_model_s_own(tmp_path: Path) -> None:
    config = config_of("bart", "seq2seq", fields={"decoder_start_token_id": END})
    model = build(config)
    assert model.config.decoder_start_token_id == END
    model.save_pretrained(tmp_path / "bart")
    again = run_config(pretrained=str(tmp_path / "bart"), kind="seq2seq")
    assert build(again).config.decoder_start_token_id == END
    assert meta_model(again, VOCABULARY).config.decoder_start_token_id == END
    assert decoder_start(config) == decoder_start(again) == END
    # BART begins with a token that counts in its own vocabulary only
    assert build(config_of("bart", "seq2seq"), Classes((), 3)).config.decoder_start_token_id == 3
    assert decoder_start(config_of("bart", "seq2seq")) is None
    assert decoder_start(run_config("bert")) is None


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_every_token_is_learned_from_scratch(name: str) -> None:
    """The first token of each text is padding, and the architecture's own padding may be a word here."""
    model = build(config_of(name, "seq2seq"), Classes((), 3))
    ids = torch.arange(8)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits[
        ..., 20:
    ].square().sum().backward()
    assert (model.get_input_embeddings().weight.grad[:8].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (run_config("llama", kind="seq2seq"), r"no encoder–decoder language model of type llama \(it has a causal one"),
        (config_of("t5", "causal"), r"no causal language model of type t5 \(it has an encoder–decoder one: obj"),
        (run_config("mamba", kind="token_classification"), "no classifier of tokens of type mamba"),
        (run_config("mamba", kind="question_answering"), "no finder of answers of type mamba"),
        (run_config("mamba", kind="regression"), "no classifier of sequences of type mamba"),
        (config_of("t5", "seq2seq", boundaries="block"), r"data\.boundaries: `block` is for packed samples"),
        (config_of("bart", "seq2seq", length=64), r"64 tokens are more than the 32 positions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(config: RunConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        meta_model(config, VOCABULARY)


@pytest.mark.parametrize("model_type", ["qwen2_audio", "encoder-decoder"])
def test_models_that_listen_or_are_two_are_no_encoder_decoders_of_text(model_type: str) -> None:
    model = SimpleNamespace(model_type=model_type, is_encoder_decoder="-" in model_type)
    with pytest.raises(ConfigError, match=f"has no encoder–decoder language model of type {model_type}"):
        check_objective(config_of("t5", "seq2seq"), model)  # type: ignore[arg-type]


def test_a_stack_of_layers_cannot_be_chosen_from_two(tmp_path: Path) -> None:
    build(config_of("t5", "seq2seq")).save_pretrained(tmp_path / "t5")
    config = run_config(pretrained=str(tmp_path / "t5"), kind="seq2seq", layers="first:1")
    with pytest.raises(ConfigError, match=r"model\.layers: is for models of one stack of layers"):
        model_configuration(config, VOCABULARY)


def test_every_kind_has_a_model() -> None:
    for kind in ObjectiveConfig.model_fields["kind"].annotation.__args__:
        name = {"causal": "llama", "seq2seq": "t5"}.get(kind, "bert")
        assert meta_model(config_of(name, kind), VOCABULARY).config.model_type == name
