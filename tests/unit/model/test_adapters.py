"""Low-rank adapters: what they lie beside, what is trained, and that both exports compute what the run computed."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_configs import VOCABULARY, run_config
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trainer.config.finetune import LoraConfig
from trainer.config.schema import RunConfig
from trainer.engine.origin import digest_of
from trainer.errors import CheckpointError, ConfigError, RunDirectoryError
from trainer.model.adapters import lora_layers, merged
from trainer.model.build import build_model, meta_model
from trainer.model.describe import describe
from trainer.model.groups import parameter_facts
from trainer.model.save import save_model
from trainer.model.save_adapter import save_adapter
from trainer.records import Classes
from trainer.stages.trained import trained_model

CLASSES = Classes(("no", "maybe", "yes"), pad_id=1)
LORA = {"rank": 4, "alpha": 6.0}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "a": 2}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """Pretrained models by name."""
    folders = {}
    for name in ("llama", "gpt2", "bert"):
        folders[name] = tmp_path_factory.mktemp(name)
        model = build_model(run_config(name), vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)
        model.save_pretrained(folders[name])
    return folders


def lora_run(published, name: str, kind: str = "causal", freeze: tuple[str, ...] = (), **options) -> RunConfig:
    config = run_config(name)
    model = config.model.model_copy(
        update={"config": None, "pretrained": str(published[name]), "lora": LoraConfig(**(LORA | options))}
    )
    changes = {
        "model": model,
        "objective": config.objective.model_copy(update={"kind": kind}),
        "optim": config.optim.model_copy(update={"freeze": freeze}),
    }
    return config.model_copy(update=changes)


def build(config: RunConfig):
    classes = CLASSES if config.objective.kind == "classification" else None
    return build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32, classes=classes).eval()


def names_of(config: RunConfig) -> list[str]:
    return [name for name, each in build(config).named_parameters() if each.requires_grad]


def moved(config: RunConfig) -> dict[str, torch.Tensor]:
    """Trained weights, as a checkpoint holds them: every one away from its first value."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: each.detach() + 0.3 * torch.randn(each.shape, generator=generator)
        for name, each in build(config).named_parameters()
        if each.requires_grad
    }


def test_only_adapters_are_trained_beside_all_linear_modules_but_the_head(published):
    names = names_of(lora_run(published, "llama"))
    assert len(names) == 2 * 2 * 7
    assert all(".lora_" in name and name.startswith("model.layers.") for name in names)


def test_a_task_trains_its_head_and_its_pooler_whole(published):
    names = names_of(lora_run(published, "bert", "classification", targets=("query", "value")))
    whole = [name for name in names if ".lora_" not in name]
    assert whole == [f"{name}.{kind}" for name in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")]
    assert len(names) == 4 + 2 * 2 * 2


def test_further_modules_are_trained_whole_and_frozen_ones_are_not(published):
    names = names_of(lora_run(published, "llama", train=("norm",), freeze=("layers:1",)))
    assert [name for name in names if ".lora_" not in name] == ["model.norm.weight"]
    assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in names)


def test_the_first_values_are_a_function_of_the_seed_and_change_nothing(published):
    config = lora_run(published, "llama")
    torch.manual_seed(1)
    one, state = build(config), torch.get_rng_state()
    torch.manual_seed(1)
    other = build(config)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, each), again in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(each, again)
        if ".lora_A." in name:
            assert 0 < each.abs().max() <= 1 / each.shape[1] ** 0.5
    ids = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(published["llama"]).eval()
    assert torch.equal(one(input_ids=ids).logits, plain(input_ids=ids).logits)
    another = build(config.model_copy(update={"seed": config.seed + 1}))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), another.parameters(), strict=True))


def test_facts_count_what_is_trained_and_what_is_frozen(published):
    config = lora_run(published, "llama")
    facts = describe(config, VOCABULARY)
    model = build(config)
    assert facts.parameters == parameter_facts(model)
    assert facts.num_parameters == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert facts.num_parameters + facts.frozen_parameters == sum(each.numel() for each in model.parameters())
    assert all(each.is_meta for each in meta_model(config, VOCABULARY).parameters())


@pytest.mark.parametrize(
    ("options", "path", "said"),
    [
        ({"targets": ("q_porj",)}, "model.lora.targets.0", "the nearest is q_proj"),
        ({"train": ("norn",)}, "model.lora.train.0", "the nearest is norm"),
    ],
)
def test_names_of_nothing_are_refused(published, options, path, said):
    with pytest.raises(ConfigError) as caught:
        build(lora_run(published, "llama", **options))
    assert [problem[0] for problem in caught.value.problems] == [path]
    assert said in caught.value.problems[0][1]


def test_weights_from_scratch_are_refused(published):
    config = lora_run(published, "llama")
    scratch = run_config("llama").model.model_copy(update={"lora": config.model.lora})
    with pytest.raises(ConfigError, match=r"needs model\.pretrained"):
        meta_model(config.model_copy(update={"model": scratch}), VOCABULARY)


def test_a_head_that_is_tied_is_refused(published):
    with pytest.raises(ConfigError, match="shares its weight with the embeddings"):
        build(lora_run(published, "gpt2", targets=("lm_head",)))


CASES = [("llama", "causal"), ("gpt2", "causal"), ("bert", "classification")]


# peft's own
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_both_exports_compute_what_was_trained(published, tokenizer_path, tmp_path, name, kind):
    config = lora_run(published, name, kind)
    classes = CLASSES if kind == "classification" else None
    prepared = SimpleNamespace(vocabulary=VOCABULARY, classes=classes, kept=None)
    origin = digest_of(build(config))
    tensors = moved(config)
    model = trained_model(config, prepared, tensors.items(), dtype=torch.float32, origin=origin).eval()
    ids = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    save_model(
        config,
        merged(model),
        tmp_path / "merged",
        tokenizer_path=tokenizer_path,
        vocabulary=VOCABULARY,
        dtype=torch.float32,
        classes=classes,
    )
    save_adapter(config, model, tmp_path / "adapter", tokenizer_path=tokenizer_path, dtype=torch.float32)
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    labels = {"num_labels": len(CLASSES.names), "pad_token_id": CLASSES.pad_id} if classes else {}
    base = auto.from_pretrained(published[name], **labels).eval()
    before = base(input_ids=ids).logits
    whole = auto.from_pretrained(tmp_path / "merged").eval()
    beside = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (before - expected).abs().max() > 0.01
        torch.testing.assert_close(whole(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(beside(input_ids=ids).logits, expected)
    assert not lora_layers(whole)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(published[name])
    assert (written["r"], written["lora_alpha"]) == (LORA["rank"], LORA["alpha"])


def test_another_base_and_tensors_of_another_model_are_refused(published):
    config = lora_run(published, "llama")
    prepared = SimpleNamespace(vocabulary=VOCABULARY, classes=None, kept=None)
    tensors, origin = moved(config), digest_of(build(config))
    with pytest.raises(CheckpointError, match="other weights than those that this run began with"):
        trained_model(config, prepared, tensors.items(), dtype=torch.float32, origin="0" * 32)
    with pytest.raises(CheckpointError, match="has a tensor other"):
        trained_model(config, prepared, {"other": torch.zeros(1)}.items(), dtype=torch.float32, origin=origin)
    with pytest.raises(CheckpointError, match="lacks the parameter"):
        trained_model(config, prepared, [], dtype=torch.float32, origin=origin)


def test_an_adapter_replaces_only_an_adapter(published, tokenizer_path, tmp_path):
    config = lora_run(published, "llama")
    model = build(config)
    for _ in range(2):
        save_adapter(config, model, tmp_path / "adapter", tokenizer_path=tokenizer_path, dtype=torch.float32)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(RunDirectoryError, match="is in the way"):
        save_adapter(config, model, tmp_path / "other", tokenizer_path=tokenizer_path, dtype=torch.float32)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    with pytest.raises(ConfigError, match="no adapter to export"):
        save_adapter(plain, model, tmp_path / "adapter", tokenizer_path=tokenizer_path, dtype=torch.float32)
