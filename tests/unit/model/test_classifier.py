"""Classifiers of sequences: built with the data's classes, whole; exported as pipelines load them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import VOCABULARY, run_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from trainer.errors import ConfigError
from trainer.model.build import build_model, meta_model
from trainer.model.configuration import model_configuration
from trainer.model.describe import describe
from trainer.model.save import save_model
from trainer.records import Classes

CLASSES = Classes(("fresh", "plot", "rotten"), 1)
FIVE = Classes(("a", "b", "c", "d", "e"), 1)
NAMES = ["bert", "roberta", "modernbert", "llama", "gpt2"]


def build(config: Any, classes: Classes = CLASSES) -> Any:
    return build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32, classes=classes)


def arrays(lengths: tuple[int, ...], columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (len(lengths), 64), generator=generator)[:, :columns]
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.where(mask, CLASSES.pad_id), "attention_mask": mask.long()}


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_what_is_said_of_a_text(name: str) -> None:
    model = build(run_config(name, kind="classification")).eval()
    assert model.config.id2label == dict(enumerate(CLASSES.names))
    assert model.config.label2id == {"fresh": 0, "plot": 1, "rotten": 2}
    short, long = (model(**arrays((3, 8, 5), columns)).logits for columns in (8, 16))
    assert short.shape == (3, 3)
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)
    alone = model(**{key: value[:1, :3] for key, value in arrays((3, 8, 5), 8).items()}).logits
    torch.testing.assert_close(alone, short[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_facts_are_those_of_the_model(name: str) -> None:
    config = run_config(name, kind="classification")
    facts = describe(config, VOCABULARY, CLASSES)
    assert {p.name: p.shape for p in facts.parameters} == {
        n: tuple(p.shape) for n, p in build(config).named_parameters()
    }
    # before the data is known
    assert describe(config, VOCABULARY).num_parameters < facts.num_parameters


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A pretrained masked model."""
    build_model(run_config("bert"), vocabulary=VOCABULARY, zero3=None, dtype=torch.float32).save_pretrained(
        tmp_path / "encoder"
    )
    return tmp_path / "encoder"


def test_the_head_of_a_pretrained_encoder_is_drawn_from_the_seed(encoder: Path, caplog: Any) -> None:
    def head(seed: int) -> torch.Tensor:
        config = run_config(pretrained=str(encoder), kind="classification", seed=seed)
        torch.manual_seed(torch.seed() % 1000)
        return build(config).classifier.weight.detach().clone()

    with caplog.at_level(logging.WARNING):
        first = head(1)
    assert (
        "drawn anew: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight"
        in caplog.text
    )
    assert torch.equal(first, head(1))
    assert not torch.equal(first, head(2))
    body = AutoModelForSequenceClassification.from_pretrained(encoder).bert.embeddings.word_embeddings.weight
    config = run_config(pretrained=str(encoder), kind="classification")
    assert torch.equal(build(config).bert.embeddings.word_embeddings.weight, body)


def test_a_classifier_keeps_its_head_for_its_own_classes_only(tmp_path: Path, caplog: Any) -> None:
    model = build(run_config("bert", kind="classification"))
    model.save_pretrained(tmp_path / "own")
    config = run_config(pretrained=str(tmp_path / "own"), kind="classification")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(build(config).classifier.weight, model.classifier.weight)
        assert torch.equal(
            build(config, Classes(("Fresh", "Plot", "Rotten"), 1)).classifier.weight, model.classifier.weight
        )
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert torch.equal(build(config, Classes(("a", "b", "c"), 1)).classifier.weight, model.classifier.weight)
    assert "is kept: its classes fresh, plot, rotten become a, b, c" in caplog.text
    with pytest.raises(
        ConfigError, match="has the classes fresh, plot, rotten, which the data numbers as fresh, rotten"
    ):
        build(config, Classes(("fresh", "rotten", "plot"), 1))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        five = build(config, FIVE)
    assert five.classifier.weight.shape == (5, 16)
    assert five.classifier.weight.std() > 0
    assert "drawn anew: classifier.bias, classifier.weight" in caplog.text
    body = build(run_config(pretrained=str(tmp_path / "own"), kind="classification", layers="first:1"), FIVE)
    assert torch.equal(body.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    assert torch.equal(body.classifier.weight, five.classifier.weight)


def test_architectures_without_a_classifier_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"objective\.kind: transformers has no classifier of sequences of type mamba"
    ):
        model_configuration(run_config("mamba", kind="classification"), VOCABULARY, CLASSES)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: Any) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(["<end>", "<pad>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    roles = {"eos_token": "<end>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_pipeline_loads_the_export(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    limit = {"n_positions": 16} if name == "gpt2" else {"max_position_embeddings": 16}
    config = run_config(name, kind="classification", fields=limit)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    save_model(config, model.named_parameters(), tmp_path / "export", tokenizer_path=tokenizer_path,
               vocabulary=VOCABULARY, dtype=torch.float32, classes=CLASSES)  # fmt: skip
    classify = pipeline("text-classification", model=str(tmp_path / "export"), device="cpu")
    texts = ["short", "much longer than the model's positions allow", "mid size"]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    for text, found in zip(texts, classify(texts, truncation=True, top_k=None, batch_size=3), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:16]])
        expected = model(input_ids=ids).logits.softmax(-1)[0]
        assert {each["label"] for each in found} == set(CLASSES.names)
        for each in found:
            assert each["score"] == pytest.approx(expected[CLASSES.names.index(each["label"])].item(), abs=1e-5)


def test_meta_model_reads_no_weights(encoder: Path) -> None:
    (encoder / "model.safetensors").unlink()
    config = run_config(pretrained=str(encoder), kind="classification")
    assert meta_model(config, VOCABULARY, CLASSES).classifier.weight.shape == (3, 16)
