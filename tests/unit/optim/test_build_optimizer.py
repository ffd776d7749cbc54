"""The optimizer's arithmetic, its independence of threads and shards, and a machine without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from trainer.config.schema import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    ZeroConfig,
)
from trainer.optim.build import build_optimizer


def run_config(offload: str = "none") -> RunConfig:
    return RunConfig(
        name="x",
        data=DataConfig(sources=(SourceConfig(stdlib=True),)),
        model=ModelConfig(config={"model_type": "llama"}),
        batch=BatchConfig(samples=1, micro=1),
        optim=OptimConfig(lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3),
        schedule=ScheduleConfig(duration=1),
        zero=ZeroConfig(offload=offload),
    )


def adamw_reference(weight, gradients, decay):
    """Algorithm 2 of https://arxiv.org/abs/1711.05101 with the update of the paper's decoupled decay, in fp64."""
    weight = weight.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        step = (first / (1 - 0.8**t)) / ((second / (1 - 0.9**t)).sqrt() + 1e-6)
        weight = weight - 0.02 * step - 0.02 * decay * weight
    return weight


def test_each_group_has_its_own_decay():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, generator=generator)
    gradients = torch.randn(4, 6, generator=generator)
    decayed, spared = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    groups = [
        {"name": "decay", "params": [decayed], "weight_decay": 0.3},
        {"name": "spared", "params": [spared], "weight_decay": 0.0},
    ]
    optimizer = build_optimizer(groups, run_config(), "cpu")
    for gradient in gradients:
        decayed.grad, spared.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    torch.testing.assert_close(decayed.detach().double(), adamw_reference(start, gradients, 0.3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(spared.detach().double(), adamw_reference(start, gradients, 0.0), rtol=1e-6, atol=1e-6)


def test_bits_depend_neither_on_threads_nor_on_shards():
    generator = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(70_003, generator=generator), torch.randn(3, 70_003, generator=generator)

    def train(cuts: list[int], threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            shards = [torch.nn.Parameter(s.clone()) for s in start.split(cuts)]
            optimizer = build_optimizer([{"name": "decay", "params": shards, "weight_decay": 0.3}], run_config(), "cpu")
            for gradient in gradients:
                for shard, piece in zip(shards, gradient.split(cuts), strict=True):
                    shard.grad = piece.clone()
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return torch.cat([shard.detach() for shard in shards])

    whole = train([70_003], 1)
    assert torch.equal(train([70_003], 3), whole)
    assert torch.equal(train([35_005, 34_998], 2), whole)


WITHOUT_COMPILER = """
import torch
from test_build_optimizer import run_config
from trainer.errors import LaunchError
from trainer.optim.build import build_optimizer
try:
    build_optimizer([{"params": [torch.nn.Parameter(torch.ones(3))]}], run_config("optimizer"), "cuda")
except LaunchError as error:
    print(error)
"""


def test_offload_without_a_compiler_is_refused_in_one_sentence(tmp_path):
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PATH": str(tmp_path),
        "CXX": "/bin/false",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "zero.offload=optimizer needs DeepSpeed's CPU Adam" in done.stdout
    assert "install ninja and g++" in done.stdout


def test_offload_on_the_cpu_is_said_to_have_no_effect(caplog):
    groups = [{"name": "decay", "params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.3}]
    assert isinstance(build_optimizer(groups, run_config("optimizer"), "cpu"), torch.optim.AdamW)
    assert "zero.offload=optimizer has no effect on the optimizer" in caplog.text
