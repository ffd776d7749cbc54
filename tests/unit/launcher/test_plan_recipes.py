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
    "pretrain-125m": (120, 130, NODE, 16, 2, "cuda"),
    "pretrain-1b": (1000, 1300, NODE, 16, 3, "cuda"),
}


@pytest.fixture
def pretrained(tmp_path):
    """A directory as `save_pretrained` leaves it, for the recipe that goes on from one."""
    from transformers import GPT2Config

    GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path)
    return tmp_path


def test_every_recipe_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_plans(name, pretrained):
    from trainer.model.describe import describe

    overrides = [f"model.pretrained={pretrained}"] if name == "continue-pretrained" else []
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    at_least, at_most, machine, ranks, stage, device = RECIPES[name]
    assert check_config(config) == []
    assert config.name == name
    facts = describe(config, 512 if overrides else None)
    plan = make_plan(config, facts, machine)
    assert at_least * 1e6 <= facts.num_parameters <= at_most * 1e6
    assert (plan.ranks, plan.stage, plan.device) == (ranks, stage, device)
    assert plan.notes == ()
    assert plan.memory[stage].needed < plan.rank_bytes
