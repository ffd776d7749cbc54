"""What is exported loads through the auto classes with equal logits."""

import json
from pathlib import Path

import pytest
import torch
from model_configs import MASKED, VOCABULARY, run_config
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from trainer.errors import CheckpointError, RunDirectoryError
from trainer.model.build import build_model
from trainer.model.save import save_model


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", "<mask>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", mask_token="<mask>").save_pretrained(folder)
    return folder


def trained(config, dtype=torch.float32):
    """A model whose every weight has moved from its first value, so that a weight left out of the export shows."""
    model = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())), alpha=0.05
            )
    return model


def save(config, model, output, tokenizer_path, **options):
    options = {"dtype": torch.float32, **options}
    save_model(
        config, model.named_parameters(), output, tokenizer_path=tokenizer_path, vocabulary=VOCABULARY, **options
    )


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-tied", "gpt2", "qwen3", "gemma2", "mixtral", "mamba", "bert", "roberta", "modernbert"],
)
@pytest.mark.parametrize("max_shard_bytes", [2_000_000_000, 6_000])
def test_round_trip_has_equal_logits(name, max_shard_bytes, tmp_path, tokenizer_path):
    config = run_config(name)
    model = trained(config)
    save(config, model, tmp_path / "export", tokenizer_path, max_shard_bytes=max_shard_bytes)

    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    loaded, report = auto.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert type(loaded) is type(model)

    files = sorted(file.name for file in (tmp_path / "export").glob("*.safetensors"))
    if max_shard_bytes < 10_000:
        assert len(files) > 2
        index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(
            tensor.nbytes for file in files for tensor in read(tmp_path / "export" / file).values()
        )
    else:
        assert files == ["model.safetensors"]


def read(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_export_holds_one_copy_of_tied_weights_and_the_asked_type(tmp_path, tokenizer_path):
    config = run_config("llama-tied")
    save(config, trained(config), tmp_path / "export", tokenizer_path, dtype=torch.bfloat16)
    tensors = read(tmp_path / "export" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_experts_are_written_as_they_were_published(tmp_path, tokenizer_path):
    config = run_config("mixtral")
    save(config, trained(config), tmp_path / "export", tokenizer_path)
    names = read(tmp_path / "export" / "model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names


def test_tokenizer_and_its_special_tokens_come_with_the_model(tmp_path, tokenizer_path):
    config = run_config("llama")
    save(config, trained(config), tmp_path / "export", tokenizer_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.decode(tokenizer("def f(): päss")["input_ids"]) == "def f(): päss"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    assert model.config.use_cache is True
    prompt = tokenizer("x = ", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape[1] == prompt.shape[1] + 3


def test_a_wrong_checkpoint_is_refused_and_nothing_is_left_behind(tmp_path, tokenizer_path):
    config = run_config("llama")
    model = trained(config)
    named = list(model.named_parameters())

    def attempt(tensors):
        save_model(
            config,
            tensors,
            tmp_path / "export",
            tokenizer_path=tokenizer_path,
            vocabulary=VOCABULARY,
            dtype=torch.float32,
        )

    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of the model: model\.norm\.weight"):
        attempt([(name, tensor) for name, tensor in named if name != "model.norm.weight"])
    with pytest.raises(CheckpointError, match=r"model\.nrom\.weight, which LlamaForCausalLM does not have"):
        attempt([*named, ("model.nrom.weight", torch.ones(16))])
    with pytest.raises(CheckpointError, match=r"model.norm.weight is \[17\] in the checkpoint and \[16\]"):
        attempt([("model.norm.weight", torch.ones(17))])
    with pytest.raises(CheckpointError, match="twice"):
        attempt([named[0], named[0]])
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_anything_else_is_kept(tmp_path, tokenizer_path):
    config = run_config("llama")
    model = trained(config)
    output = tmp_path / "export"
    save(config, model, output, tokenizer_path, max_shard_bytes=6_000)
    save(config, model, output, tokenizer_path)
    assert [file.name for file in output.glob("*.safetensors*")] == ["model.safetensors"]

    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("the only copy")
    with pytest.raises(RunDirectoryError, match="in the way"):
        save(config, model, notes, tokenizer_path)
    assert (notes / "thesis.txt").read_text() == "the only copy"
