"""Each of several tasks is exported as a model of its own, which a pipeline loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import VOCABULARY, run_config
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, pipeline
from transformers.utils import logging

from trainer.config.objective import ObjectiveConfig, Outputs, TaskConfig, outputs_of
from trainer.model.build import build_model
from trainer.model.save import save_model
from trainer.model.save_task import save_task
from trainer.records import Classes

TASKS = (
    TaskConfig(name="films", kind="classification"),
    TaskConfig(name="tags", kind="multi_label"),
    TaskConfig(name="stars", kind="regression"),
)
CLASSES = Classes(("films/fresh", "films/plot", "films/rotten", "tags/a/b", "tags/c", "stars/value"), 1)
OUTPUTS = outputs_of(TASKS, CLASSES.names)
PROBLEMS = {
    "films": "single_label_classification",
    "tags": "multi_label_classification",
    "stars": "regression",
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: Any) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(["<end>", "<pad>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    roles = {"eos_token": "<end>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


def export(name: str, folder: Path, tokenizer_path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model of all tasks, every weight of which has moved, and what was written of it."""
    limit = {"n_positions": 16} if name == "gpt2" else {"max_position_embeddings": 18 if name == "roberta" else 16}
    config = run_config(name, fields=limit).model_copy(
        update={"objective": ObjectiveConfig(kind="several", tasks=TASKS)}
    )
    model = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=dtype, classes=CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.add_(noise, alpha=0.3)
    save_model(config, model.named_parameters(), folder, tokenizer_path=tokenizer_path, vocabulary=VOCABULARY,
               dtype=dtype, classes=CLASSES, **options)  # fmt: skip
    return model


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "llama", "gpt2"])
def test_a_task_has_its_columns_of_the_whole(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    model = export(name, tmp_path / "export", tokenizer_path)
    ids = torch.randint(5, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(3))
    whole, weights = logits_of(model, ids), load_file(tmp_path / "export" / "model.safetensors")
    for task in OUTPUTS:
        folder = tmp_path / "export" / "tasks" / task.name
        save_task(tmp_path / "export", folder, task)
        loaded, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        assert not told["mismatched_keys"]
        torch.testing.assert_close(logits_of(loaded.eval(), ids), whole[:, task.columns], rtol=1e-6, atol=1e-6)
        own = load_file(folder / "model.safetensors")
        assert own.keys() == weights.keys()
        # the body bit for bit, of the outputs the task's rows
        cut = [key for key in own if own[key].shape != weights[key].shape]
        assert {len(weights[key]) for key in cut} == {6}
        assert all(torch.equal(own[key], weights[key][task.columns] if key in cut else weights[key]) for key in own)
        config = json.loads((folder / "config.json").read_text())
        assert config["problem_type"] == PROBLEMS[task.name]


def test_the_type_of_the_weights_stays(tmp_path: Path, tokenizer_path: Path) -> None:
    export("bert", tmp_path / "export", tokenizer_path, torch.bfloat16)
    save_task(tmp_path / "export", tmp_path / "films", OUTPUTS[0])
    assert {tensor.dtype for tensor in load_file(tmp_path / "films" / "model.safetensors").values()} == {torch.bfloat16}


def test_other_files_are_taken_along_and_weights_are_not(tmp_path: Path, tokenizer_path: Path) -> None:
    export("bert", tmp_path / "export", tokenizer_path, max_shard_bytes=6_000)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
    for task in OUTPUTS[:2]:
        save_task(tmp_path / "export", tmp_path / "export" / "tasks" / task.name, task)
    folder = tmp_path / "export" / "tasks" / "tags"
    written = {path.name for path in folder.iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "export" / name).read_bytes()


def asked(folder: Path, text: str) -> dict[str, float]:
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    (found,) = classify([text], truncation=True, top_k=None)
    return {each["label"]: each["score"] for each in found}


@pytest.mark.parametrize("task", OUTPUTS, ids=lambda task: task.name)
def test_a_pipeline_names_the_classes_of_the_task(task: Outputs, tmp_path: Path, tokenizer_path: Path) -> None:
    model = export("bert", tmp_path / "export", tokenizer_path)
    save_task(tmp_path / "export", tmp_path / "task", task)
    text = "longer than the positions of the model allow"
    ids = torch.tensor([AutoTokenizer.from_pretrained(tokenizer_path)(text)["input_ids"][:16]])
    logits = logits_of(model, ids)[0, task.columns]
    expected = {"films": logits.softmax(-1), "tags": logits.sigmoid(), "stars": logits}[task.name]
    names = {"films": ("fresh", "plot", "rotten"), "tags": ("a/b", "c"), "stars": ("LABEL_0",)}[task.name]
    found = asked(tmp_path / "task", text)
    assert found == {name: pytest.approx(value, abs=1e-5) for name, value in zip(names, expected.tolist(), strict=True)}


def test_a_run_goes_on_from_what_another_has_exported(tmp_path: Path, tokenizer_path: Path, caplog: Any) -> None:
    """The whole for the same tasks, one task for that task; outputs that mean something else are drawn anew."""
    model = export("bert", tmp_path / "export", tokenizer_path)
    save_task(tmp_path / "export", tmp_path / "films", OUTPUTS[0])

    def built(folder: str, names: tuple[str, ...], kind: str = "several") -> Any:
        tasks = TASKS if kind == "several" else ()
        config = run_config(pretrained=str(tmp_path / folder), seed=4).model_copy(
            update={"objective": ObjectiveConfig(kind=kind, tasks=tasks)}  # type: ignore[arg-type]
        )
        classes = Classes(names, 1)
        return build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32, classes=classes)

    weight = model.classifier.weight
    with caplog.at_level("WARNING"):
        assert torch.equal(built("export", CLASSES.names).classifier.weight, weight)
        assert torch.equal(built("films", OUTPUTS[0].classes, "classification").classifier.weight, weight[:3])
    assert not caplog.records
    others = (*CLASSES.names[3:], *CLASSES.names[:3])
    for found in (built("export", others), built("export", tuple("abcdef"), "classification")):
        assert not torch.equal(found.classifier.weight, weight)
        assert torch.equal(found.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert caplog.text.count("drawn anew: classifier.bias, classifier.weight") == 2
    assert not hasattr(built("films", OUTPUTS[0].classes, "classification").config, "several_tasks")


def test_no_bars_are_shown(tmp_path: Path, tokenizer_path: Path, capfd: Any) -> None:
    export("bert", tmp_path / "export", tokenizer_path)
    logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    capfd.readouterr()
    save_task(tmp_path / "export", tmp_path / "films", OUTPUTS[0])
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
