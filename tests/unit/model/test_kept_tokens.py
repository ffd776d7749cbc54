"""A student with some of the tokens of a pretrained model says of them what the model says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_configs import TINY, run_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from trainer.errors import ConfigError
from trainer.model.build import build_model, meta_model
from trainer.model.describe import describe
from trainer.model.save import save_model
from trainer.records import Classes

SIZE = 90
KEPT = np.array([3, 7, 8, 11, *range(20, 80, 3), 88])
PAD = 7
CLASSES = Classes(("no", "yes"), KEPT.tolist().index(PAD))
KINDS = {"base": AutoModel, "masked": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": TINY["bert"],
    "modernbert": TINY["modernbert"],
    "distilbert": {"model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": TINY["bert"] | {"model_type": "electra", "embedding_size": 8},
    "llama": TINY["llama"],
}


def publish(folder: Path, name: str, kind: str, **fields: Any) -> None:
    given = {key: value for key, value in ARCHITECTURES[name].items() if key != "model_type"} | fields
    ids = {"pad_token_id": PAD, "bos_token_id": 11, "eos_token_id": [3, 5]}
    given = ids | {"initializer_range": 0.4} | given
    torch.manual_seed(2)
    config = AutoConfig.for_model(ARCHITECTURES[name]["model_type"], vocab_size=SIZE, **given)
    KINDS[kind].from_config(config).save_pretrained(folder, max_shard_size="8KB")


def student(folder: Path, kept: Any = KEPT, classes: Classes = CLASSES, **options: Any) -> Any:
    config = run_config(pretrained=str(folder), kind="classification", **options)
    size = SIZE if kept is None else len(kept)
    return build_model(config, vocabulary=size, zero3=None, dtype=torch.float32, classes=classes, kept=kept).eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the student's, and a mask, each [6, 12]."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, len(KEPT), (6, 12), generator=generator)
    mask = torch.arange(12) < torch.tensor([12, 3, 7, 12, 1, 9])[:, None]
    return ids.where(mask, CLASSES.pad_id), mask.long()


@pytest.mark.parametrize("layers", [None, "0"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "base"), ("bert", "masked"), ("bert", "classifier"), ("modernbert", "masked"),
     ("distilbert", "classifier"), ("electra", "masked"), ("llama", "classifier")],
)  # fmt: skip
def test_logits_are_those_of_the_whole_vocabulary(tmp_path: Path, name: str, kind: str, layers: str | None) -> None:
    publish(tmp_path, name, kind)
    small = student(tmp_path, layers=layers)
    whole = student(tmp_path, None, replace(CLASSES, pad_id=PAD), layers=layers)
    ids, mask = texts()
    assert (small.config.vocab_size, whole.config.vocab_size) == (len(KEPT), SIZE)
    assert small.get_input_embeddings().weight.shape[0] == len(KEPT)
    with torch.no_grad():
        ours = small(input_ids=ids, attention_mask=mask).logits
        theirs = whole(input_ids=torch.from_numpy(KEPT)[ids], attention_mask=mask).logits
    assert theirs.std() > 1e-4
    assert torch.equal(ours, theirs)
    facts = describe(
        run_config(pretrained=str(tmp_path), kind="classification", layers=layers), len(KEPT), CLASSES, KEPT
    )
    assert {p.name: p.shape for p in facts.parameters} == {n: tuple(p.shape) for n, p in small.named_parameters()}
    assert facts.vocabulary == len(KEPT)


def test_ids_in_the_configuration_are_those_of_the_student(tmp_path: Path) -> None:
    publish(tmp_path, "llama", "classifier")
    config = student(tmp_path).config
    places = KEPT.tolist()
    assert (config.pad_token_id, config.bos_token_id) == (places.index(7), places.index(11))
    # 5 is known no more
    assert config.eos_token_id == [places.index(3)]


def test_a_classifier_of_other_classes_keeps_its_rows_too(tmp_path: Path) -> None:
    publish(tmp_path, "bert", "classifier")
    small = student(tmp_path, classes=Classes(("a", "b", "c"), CLASSES.pad_id))
    weights: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        weights |= load_file(file)
    rows = weights["bert.embeddings.word_embeddings.weight"][torch.from_numpy(KEPT)]
    assert torch.equal(small.bert.embeddings.word_embeddings.weight, rows)
    assert small.classifier.weight.shape == (3, 16)


def test_positions_that_begin_at_the_id_of_padding(tmp_path: Path) -> None:
    config = AutoConfig.for_model(vocab_size=SIZE, **TINY["roberta"])
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    assert config.pad_token_id == 1
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.keep: the positions of a model of type roberta begin at"):
        student(tmp_path)
    kept = np.array([0, 1, 2, 5, 9])
    small = student(tmp_path, kept, Classes(("no", "yes"), 1))
    assert small.config.pad_token_id == 1


def test_what_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, "bert", "masked")
    config = run_config(pretrained=str(tmp_path), kind="classification")
    with pytest.raises(ConfigError, match="the tokenizer has a token 90 and the model's vocabulary only 90 of them"):
        meta_model(config, 2, CLASSES, np.array([3, 90]))
    folder = tmp_path / "renamed"
    AutoModelForMaskedLM.from_pretrained(tmp_path).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    table = tensors.pop("bert.embeddings.word_embeddings.weight")
    save_file(tensors | {"tokens.weight": table.clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.keep: the model names its embeddings otherwise \(embeddi"):
        student(folder)
    save_file(
        tensors | {"bert.embeddings.word_embeddings.weight": table[:88].clone()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match="has 88 tokens and the tokenizer a token 88"):
        student(folder)


def test_a_pipeline_loads_the_export(tmp_path: Path) -> None:
    publish(tmp_path / "teacher", "bert", "masked", max_position_embeddings=16)
    config = run_config(pretrained=str(tmp_path / "teacher"), kind="classification", layers="1")
    model = student(tmp_path / "teacher", layers="1")
    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(len(KEPT) - 4))]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(tmp_path / "tokenizer")
    save_model(config, model.named_parameters(), tmp_path / "export", tokenizer_path=tmp_path / "tokenizer",
               vocabulary=len(KEPT), dtype=torch.float32, classes=CLASSES, kept=KEPT)  # fmt: skip
    # whatever becomes of the teacher
    (tmp_path / "teacher").rename(tmp_path / "gone")
    written = AutoConfig.from_pretrained(tmp_path / "export")
    assert (written.vocab_size, written.pad_token_id, written.bos_token_id) == (len(KEPT), CLASSES.pad_id, 3)
    classify = pipeline("text-classification", model=str(tmp_path / "export"), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in ("w1 w3 w20", "w7", "w2 w2 other"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            assert torch.equal(classify.model(input_ids=ids).logits, expected)
        for each in classify([text], top_k=None)[0]:
            number = CLASSES.names.index(each["label"])
            assert each["score"] == pytest.approx(expected.softmax(-1)[0, number].item(), abs=1e-6)
