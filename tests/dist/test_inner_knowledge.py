"""Hidden states, attention and projections through the engine: every ZeRO stage takes the step of one whole process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from workload import VOCABULARY, global_batch, make_batch, make_config, weights

from trainer.config.schema import RunConfig
from trainer.terms import Model, See, Terms

WIDE = 40
PAIRS = ((0, 0), (1, 1), (2, 3))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "head_dim": 4},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def config_of(folder: Path, name: str, stage: int, *, checkpointing: bool = False) -> RunConfig:
    model = {"config": MODELS[name], "activation_checkpointing": checkpointing}
    distill = {"teacher": {"pretrained": str(folder)}, "hidden": {"kind": "mse", "layers": PAIRS}}
    options = make_config(zero={"stage": stage}, guard={"mode": "off"}).model_dump()
    return RunConfig.model_validate(options | {"model": model, "stage": "distill", "distill": distill})


def make_student(config: RunConfig, world_size: int) -> Any:
    import torch

    from trainer.config.resolve import deepspeed_config
    from trainer.model.build import build_model

    zero3 = deepspeed_config(config, world_size, "cpu", "fp32") if config.zero.stage == 3 else None
    return build_model(config, vocabulary=VOCABULARY, zero3=zero3, dtype=torch.float32)


def make_inner(inside: bool) -> Any:
    """Cross-entropy, hidden states and relations, against a teacher that is a table; computed in the head's forward
    pass, or after the model's."""
    import torch
    from torch import Tensor

    from trainer.knowledge import AttentionStates
    from trainer.model.capture import Capture
    from trainer.model.projections import projector
    from trainer.objectives import LogitObjective
    from trainer.objectives.hidden import hidden_sum, token_weights
    from trainer.objectives.losses import cross_entropy_sum
    from trainer.objectives.relations import relations_sum

    generator = torch.Generator().manual_seed(1)
    states = {layer: torch.randn(VOCABULARY, WIDE, generator=generator) for _, layer in PAIRS}
    query, key, value = (torch.randn(VOCABULARY, width, generator=generator) for width in (24, 16, 16))

    class Inner(LogitObjective):
        module: Any = None

        def __init__(self) -> None:
            super().__init__(
                lambda logits, labels: {"loss": cross_entropy_sum(logits, labels)}, ("hidden", "relations")
            )

        def inner(self, seen: Capture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            ids = tensors["input_ids"]
            counts = token_weights(tensors["labels"])
            teacher = AttentionStates(query[ids], key[ids], value[ids])
            return {
                "hidden": hidden_sum(
                    seen.states, {n: s[ids] for n, s in states.items()}, PAIRS, "mse", counts, projector(self.module)
                ),
                "relations": relations_sum(seen.attention, teacher, 4, counts),
            }

        def __call__(self, model: Model, tensors: Mapping[str, Tensor], see: See) -> Terms:
            inputs = {name: tensor for name, tensor in tensors.items() if name != "labels"}
            found: dict[str, Tensor] = {}

            def in_head(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
                found["loss"] = cross_entropy_sum(logits, tensors["labels"])
                found.update(self.inner(seen, tensors))
                return logits

            head = self.module.get_output_embeddings()
            with Capture(self.module, [ours for ours, _ in PAIRS], attention=2) as seen:
                handle = head.register_forward_hook(in_head) if inside else None
                logits = model(**inputs).logits
                if handle is not None:
                    handle.remove()
            if not inside:
                found["loss"] = cross_entropy_sum(logits, tensors["labels"])
                found.update(self.inner(seen, tensors))
            return Terms(found["loss"] + found["hidden"] + found["relations"], found)

    return Inner()


def learn(rank: int, world_size: int, config: RunConfig, inside: bool) -> Any:
    from trainer.config.resolve import arithmetic
    from trainer.engine.ranks import Ranks
    from trainer.engine.zero import Engine
    from trainer.model.groups import parameter_facts, parameter_groups
    from trainer.optim.build import build_optimizer

    model, objective = make_student(config, world_size), make_inner(inside)
    engine = Engine(
        model,
        build_optimizer(parameter_groups(model, config), config, "cpu"),
        objective,
        config=config,
        numbers=arithmetic(config, world_size),
        parameters=parameter_facts(model),
        ranks=Ranks(rank, world_size, rank),
        device="cpu",
        precision="fp32",
    )
    objective.module = engine.module
    seen = []
    for index in range(3):
        stats = engine.accumulate(make_batch(config, index, rank, world_size, ragged=True), attempt=index, step=index)
        seen.append((stats.loss, stats.parts["hidden"], stats.parts["relations"], stats.grad_norm))
        engine.apply(1.0, 1e-2)
    return seen, weights(engine)


def in_one_process(rank: int, world_size: int, config: RunConfig) -> Any:
    """Loss, parts and gradient norm of the first batch, whole, and the norm of the projections' gradient."""
    import torch

    model, objective = make_student(config, 1), make_inner(False)
    objective.module = model
    ids, labels = (torch.from_numpy(array) for array in global_batch(config, 0, ragged=True))
    terms = objective(model, {"input_ids": ids, "labels": labels}, lambda _: None)
    count = (labels >= 0).sum()
    (terms.total / count).backward()
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    total = torch.stack(list(norms.values())).norm()
    parts = [(terms.sums[name] / count).item() for name in ("loss", "hidden", "relations")]
    return [*parts, total.item()], min(norm.item() for name, norm in norms.items() if "projections" in name)


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_takes_the_same_steps(two_ranks: RankPool, tmp_path: Path, name: str) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDE, num_hidden_layers=3, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    (first, projected), _ = two_ranks(in_one_process, config=config_of(tmp_path, name, 0))
    assert projected > 1e-3
    expected = None
    for stage, inside, checkpointing in (
        (0, False, False),
        (2, True, True),
        (3, False, False),
        (3, True, False),
        (3, True, True),
    ):
        config = config_of(tmp_path, name, stage, checkpointing=checkpointing)
        (seen, after), (other, _) = two_ranks(learn, config=config, inside=inside)
        assert seen == other
        assert seen[0] == pytest.approx(first, rel=1e-5)
        assert seen[2][1] < seen[0][1]
        expected = expected or (seen, after)
        np.testing.assert_allclose(seen, expected[0], rtol=1e-4, err_msg=f"{stage} {inside} {checkpointing}")
        assert after.keys() == expected[1].keys()
        for parameter, value in after.items():
            np.testing.assert_allclose(value, expected[1][parameter], atol=2e-4, err_msg=parameter)
