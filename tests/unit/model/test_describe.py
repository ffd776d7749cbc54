"""Facts against the model itself and against torch's own count of FLOPs; the command that prints them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_configs import LENGTH, TINY, VOCABULARY, run_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config.facts import facts_from_json
from trainer.model.build import build_model
from trainer.model.describe import describe, main
from trainer.model.groups import parameter_facts

CONFIG = """
name: tiny
data: {sources: [{stdlib: true}], sequence_length: 32, tokenizer: {train: {vocabulary: 300}}}
model:
  config: {model_type: llama, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 24}
batch: {samples: 2, micro: 1}
optim: {lr: 0.001}
schedule: {duration: 3}
"""


@pytest.mark.parametrize("name", sorted(TINY))
def test_facts_are_those_of_the_built_model(name):
    config = run_config(name)
    model = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)
    facts = describe(config, VOCABULARY)
    assert facts.parameters == parameter_facts(model)
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (facts.num_layers, facts.hidden_size, facts.vocabulary) == (2, 16, VOCABULARY)
    assert facts.num_attention_heads == (1 if name == "mamba" else 2)
    assert facts.max_positions == {
        "gpt2": 1024, "mamba": None, "bert": 512, "roberta": 510, "olmo2": 2048, "llama": 2048, "llama-tied": 2048,
    }.get(name, facts.max_positions)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen3", "gpt_neox", "bert"])
def test_flops_per_token_are_those_that_torch_counts(name):
    config = run_config(name, attention="eager")
    model = build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float32)
    ids = torch.zeros(3, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    # rotary tables are a product of positions and frequencies, made once a forward pass and counted here too
    rotary = 0 if name in ("gpt2", "bert") else 2 * LENGTH * 4
    assert counter.get_total_flops() == pytest.approx(
        describe(config, VOCABULARY).flops_per_token(LENGTH) * ids.numel() + rotary, rel=2e-3
    )


def test_of_the_experts_the_chosen_ones_count():
    two = describe(run_config("mixtral"), VOCABULARY).matmul_parameters
    four = describe(run_config("mixtral", fields={"num_experts_per_tok": 4}), VOCABULARY).matmul_parameters
    experts = 2 * 4 * 3 * 16 * 24
    assert four - two == experts // 2


def test_no_memory_is_taken_for_a_model_that_no_machine_here_holds():
    fields = {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248}
    fields |= {"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
    facts = describe(run_config("llama", fields=fields), VOCABULARY)
    assert facts.num_parameters == 405_853_388_800  # Llama 3.1 405B


def test_pretrained_is_described_without_its_weights(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    model.config.save_pretrained(tmp_path)  # and no weights
    assert describe(run_config(pretrained=str(tmp_path))).parameters == parameter_facts(model)


class TestCommand:
    def test_prints_the_facts_with_overrides(self, tmp_path: Path):
        path = tmp_path / "tiny.yaml"
        path.write_text(CONFIG)
        command = [sys.executable, "-m", "trainer.model.describe", str(path), "model.config.num_hidden_layers=3"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        facts = facts_from_json(done.stdout)
        assert (facts.num_layers, facts.vocabulary) == (3, 300)

    def test_reads_a_run_directory(self, tmp_path: Path, capsys):
        (tmp_path / "config.yaml").write_text(CONFIG)
        assert main([str(tmp_path)]) == 0
        assert json.loads(capsys.readouterr().out)["vocabulary"] == 300

    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            (["model.config.hidden_sise=3"], "did you mean hidden_size?"),
            (["data.sequence_length=4096"], "4096 tokens are more than the 2048 positions of the model"),
            (["model.config.vocab_size=200"], "has 300 tokens and the model's vocabulary only 200"),
            (["data.tokenizer.train=", "data.tokenizer.path=/nowhere/tokenizer"], "/nowhere/tokenizer is no tokenizer"),
        ],
    )
    def test_says_what_is_wrong_on_stderr_and_exits_with_2(self, overrides, sentence, tmp_path: Path, capsys):
        path = tmp_path / "tiny.yaml"
        path.write_text(CONFIG)
        assert main([str(path), *overrides]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert sentence in printed.err
        assert "Traceback" not in printed.err

    def test_needs_a_config(self, capsys):
        assert main([]) == 2
        assert "name a config file or a run directory" in capsys.readouterr().err
