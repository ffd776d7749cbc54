"""A small classifier with texts of unequal lengths, on ranks and alone in double precision: for adversarial training
and mixup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from workload import DTYPES, make_config, weights

from trainer.config.schema import RunConfig
from trainer.engine.zero import Engine
from trainer.records import DRAWS, PARTNER, SHARE, Batch, Classes

VOCABULARY, LENGTH, SAMPLES, SEED = 61, 12, 8, 5
CLASSES = Classes(("a", "b", "c"), 0)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def config_of(
    stage: int,
    *,
    micro: int = 2,
    dropout: float = 0.0,
    recompute: bool = False,
    precision: str = "fp32",
    **options: Any,
) -> RunConfig:
    base = make_config(
        precision=precision,
        zero={"stage": stage},
        objective={"kind": "classification", **options},
        batch={"samples": SAMPLES, "micro": micro},
    )
    bert = {"model_type": "bert", **SMALL, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = {"config": bert, "activation_checkpointing": recompute}
    return RunConfig.model_validate(base.model_dump() | {"model": model})


def texts(batch_index: int) -> list[dict[str, Any]]:
    """The samples of a global batch, without padding."""
    generator = np.random.default_rng((5, batch_index))
    return [
        {
            "input_ids": generator.integers(1, VOCABULARY, generator.integers(2, LENGTH + 1)),
            "labels": int(generator.integers(len(CLASSES.names))),
            "share": np.float32(generator.uniform()),
            "key": int(generator.integers(1 << 62)),
        }
        for _ in range(SAMPLES)
    ]


def partner_of(place: int) -> int:
    return (place + 3) % SAMPLES


def batch_of(config: RunConfig, batch_index: int, rank: int, world_size: int) -> Batch:
    samples, micro, mixed = texts(batch_index), config.batch.micro, config.objective.mixup > 0
    micro_batches = []
    for first in range(rank * micro, SAMPLES, micro * world_size):
        places = range(first, first + micro)
        rows = {"": [samples[place] for place in places]}
        if mixed:
            rows[PARTNER] = [samples[partner_of(place)] for place in places]
        width = max(len(sample["input_ids"]) for group in rows.values() for sample in group)
        arrays: dict[str, Any] = {}
        for prefix, group in rows.items():
            padded = [np.pad(sample["input_ids"], (0, width - len(sample["input_ids"]))) for sample in group]
            arrays[prefix + "input_ids"] = np.stack(padded)
            arrays[prefix + "attention_mask"] = (arrays[prefix + "input_ids"] > 0).astype(np.int64)
            arrays[prefix + "labels"] = np.array([sample["labels"] for sample in group])
        if mixed:
            arrays[SHARE] = np.array([sample["share"] for sample in rows[""]])
        if config.objective.adversarial is not None:
            arrays[DRAWS] = np.array([sample["key"] for sample in rows[""]])
        micro_batches.append(arrays)
    return Batch(batch_index, 0, np.arange(SAMPLES), SAMPLES, tuple(micro_batches))


def make(rank: int, world_size: int, config: RunConfig) -> Engine:
    from trainer.config.resolve import arithmetic, deepspeed_config
    from trainer.engine.ranks import Ranks
    from trainer.model.build import build_model
    from trainer.model.embeddings import find_embeddings
    from trainer.model.groups import parameter_facts, parameter_groups
    from trainer.objectives import adversarial, make_objective, mixup
    from trainer.optim.build import build_optimizer

    precision: Any = config.precision
    zero3 = deepspeed_config(config, world_size, "cpu", precision) if config.zero.stage == 3 else None
    model = build_model(config, vocabulary=VOCABULARY, zero3=zero3, dtype=DTYPES[precision], classes=CLASSES)
    objective: Any = adversarial.wrap(mixup.wrap(make_objective(config.objective), config.objective), config.objective)

    def all_sharded(*arguments: Any) -> dict[str, Any]:
        """Parameters as small as these would stay whole on every rank."""
        options = deepspeed_config(*arguments)
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return options

    with patch("trainer.engine.zero.deepspeed_config", all_sharded):
        engine = Engine(
            model,
            build_optimizer(parameter_groups(model, config), config, "cpu"),
            objective,
            config=config,
            numbers=arithmetic(config, world_size),
            parameters=parameter_facts(model),
            ranks=Ranks(rank, world_size, rank),
            device="cpu",
            precision=precision,
        )
    embeddings = find_embeddings(engine.module)
    if isinstance(objective, adversarial.Adversarial):
        objective.attach(engine.module, embeddings)
    elif isinstance(objective, mixup.Mixup):
        objective.attach(embeddings)
    return engine


def gradient(rank: int, world_size: int, config: RunConfig, batches: int = 1) -> dict[str, Any]:
    """What this rank holds of the gradient of the last of some batches, and the weights that it is of."""
    engine = make(rank, world_size, config)
    for index in range(batches):
        before = weights(engine)
        stats = engine.accumulate(batch_of(config, index, rank, world_size), attempt=index, step=index)
        found = [
            (fragment.name, fragment.start, part.float().numpy().copy())
            for fragment, part in zip(engine.shards.fragments, engine.shards.gradients(), strict=True)
        ]
        local = [0 if p.grad is None else 1 for p in engine.module.parameters()] if engine.stage else []
        gathered = [p.numel() for p in engine.module.parameters()] if engine.stage == 3 else []
        engine.apply(1.0, 1e-2)
    return {
        "gradient": found,
        "weights": before,
        "loss": stats.loss,
        "parts": stats.parts,
        "kept": sum(local),
        "gathered": sum(gathered),
        "scale": stats.loss_scale,
    }


def whole(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The gradient by name, put together from all ranks."""
    result = {name: np.full(value.size, np.nan) for name, value in results[0]["weights"].items()}
    for each in results:
        for name, start, part in each["gradient"]:
            result[name][start : start + part.size] = part
    return result


Loss = Callable[[Tensor, int], Tensor]
"""(what is added to the embeddings [1, L, H], place of a sample) → its loss."""


def alone(state: Mapping[str, np.ndarray], config: RunConfig, batch_index: int) -> tuple[torch.nn.Module, Loss]:
    """The model in double precision, and its loss of one sample at a time: no padding, no ranks, no hooks."""
    from transformers import BertConfig, BertForSequenceClassification

    fields = {key: value for key, value in config.model.config.items() if key != "model_type"}
    # as the model that was built: without a token whose embedding is never learned
    of_model = BertConfig(vocab_size=VOCABULARY, num_labels=len(CLASSES.names), pad_token_id=None, **fields)
    model = BertForSequenceClassification(of_model)
    own = model.state_dict()
    model.load_state_dict({**own, **{key: torch.from_numpy(value) for key, value in state.items()}})
    model.double().train()
    samples, table = texts(batch_index), model.get_input_embeddings()

    def loss(delta: Tensor, place: int) -> Tensor:
        sample = samples[place]
        ids, targets = torch.from_numpy(sample["input_ids"])[None], [(1.0, sample["labels"])]
        looked_up, mask = table(ids), torch.ones_like(ids)
        if config.objective.mixup:
            other, share = samples[partner_of(place)], float(sample["share"])
            partner = torch.from_numpy(other["input_ids"])[None]
            width = max(ids.shape[1], partner.shape[1])
            pair = [F.pad(each, (0, width - each.shape[1])) for each in (ids, partner)]
            looked_up = share * table(pair[0]) + (1 - share) * table(pair[1])
            mask, targets = torch.ones(1, width), [(share, sample["labels"]), (1 - share, other["labels"])]
        logits = model(inputs_embeds=looked_up + delta, attention_mask=mask).logits
        return sum(weight * F.cross_entropy(logits, torch.tensor([label])) for weight, label in targets)

    return model, loss


def width_of(batch_index: int, place: int, config: RunConfig) -> int:
    samples = texts(batch_index)
    places = (place, partner_of(place)) if config.objective.mixup else (place,)
    return max(len(samples[each]["input_ids"]) for each in places)


def adversarial_loss(loss: Loss, config: RunConfig, batch_index: int, place: int) -> tuple[Tensor, Tensor]:
    """(clean loss, adversarial part as it enters the total) of one sample, as the papers write them."""
    options = config.objective.adversarial
    clean = loss(torch.zeros(()), place)
    if options is None:
        return clean, torch.zeros(())
    radius = options.epsilon
    shape = (1, width_of(batch_index, place, config), SMALL["hidden_size"])

    def ascended(delta: Tensor, length: float) -> Tensor:
        delta = delta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(delta, place), delta)
        moved = delta.detach() + length * slope / slope.norm()
        return moved if moved.norm() <= radius else moved * radius / moved.norm()

    if options.kind == "fgm":
        delta = ascended(torch.zeros(shape, dtype=torch.float64), options.step or radius)
        return clean, options.weight * loss(delta, place)
    length = options.step or 1.5 * radius / options.steps
    if options.kind == "pgd":
        delta = torch.zeros(shape, dtype=torch.float64)
        for _ in range(options.steps):
            delta = ascended(delta, length)
        return clean, options.weight * loss(delta, place)
    key = texts(batch_index)[place]["key"]
    drawn = torch.rand(shape[1:], generator=torch.Generator().manual_seed(key))[None]
    delta = ((2 * drawn - 1) * radius / drawn.numel() ** 0.5).double()
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(options.steps):
        total = total + loss(delta, place) / options.steps
        delta = ascended(delta, length)
    return clean, total
