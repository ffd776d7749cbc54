"""What every stage builds alike from a setting: the engine, the guard, the clock."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from trainer.config.files import RunFiles
from trainer.config.resolve import Arithmetic, Device, Precision, deepspeed_config
from trainer.config.schema import RunConfig
from trainer.data.labelled import LabelledSamples
from trainer.data.prepared import Prepared
from trainer.data.stream import evaluation_batches
from trainer.engine.injection import Injector
from trainer.engine.penalties import Penalty
from trainer.engine.ranks import Ranks
from trainer.engine.zero import Engine
from trainer.heartbeat import Heartbeat, NoHeartbeat
from trainer.model.build import build_model
from trainer.model.configuration import decoder_start
from trainer.model.embeddings import find_embeddings
from trainer.model.groups import parameter_groups
from trainer.objectives import adversarial, mixup
from trainer.objectives.objective import make_objective
from trainer.objectives.penalty import penalty_gradient, penalty_value
from trainer.optim.build import build_optimizer
from trainer.records import Classes, IntArray, ModelFacts
from trainer.stability.guard import Guard
from trainer.starts import Fence, NoFence
from trainer.stop import StopRequest
from trainer.telemetry.timing import StepTimer, memory_bytes, peak_flops
from trainer.terms import Objective

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a start of a run finds itself."""

    files: RunFiles
    config: RunConfig
    ranks: Ranks
    device: Device
    precision: Precision
    prepared: Prepared
    facts: ModelFacts
    stop: StopRequest
    fence: Fence = field(default_factory=NoFence)
    heartbeat: Heartbeat = field(default_factory=NoHeartbeat)


def make_guard(setting: Setting, engine: Engine) -> Guard:
    hosts: list[str] = [""] * setting.ranks.world_size
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    optim = setting.config.optim
    return Guard(
        setting.config.guard,
        clip=optim.clip,
        clipping=optim.clipping,
        parameter_names=engine.names,
        hosts=hosts,
        can_replay=True,
        can_examine=True,
        can_roll_back=True,
    )


def build_engine(
    setting: Setting, numbers: Arithmetic, injector: Injector, objective: Objective | None = None
) -> Engine:
    """The engine of the run's model; `objective` None: what the data alone asks for."""
    config, world_size = setting.config, setting.ranks.world_size
    zero3 = deepspeed_config(config, world_size, setting.device, setting.precision) if config.zero.stage == 3 else None
    prepared, dtype = setting.prepared, _DTYPES[setting.precision]
    model = build_model(
        config,
        vocabulary=prepared.vocabulary,
        zero3=zero3,
        dtype=dtype,
        classes=classes_and_padding(prepared),
        kept=prepared.kept,
    )
    penalty = _make_penalty(config)
    own = make_objective(config.objective, classes=prepared.classes, class_counts=class_counts(setting))
    moved = adversarial.wrap(mixup.wrap(own, config.objective), config.objective)
    engine = Engine(
        model,
        build_optimizer(parameter_groups(model, config), config, setting.device),
        objective or moved,
        config=config,
        numbers=numbers,
        parameters=setting.facts.parameters,
        ranks=setting.ranks,
        device=setting.device,
        precision=setting.precision,
        penalty=penalty,
        penalties=() if penalty is None else ("penalty",),
        injector=injector,
    )
    if isinstance(moved, adversarial.Adversarial):
        moved.attach(engine.module, find_embeddings(engine.module))
    elif isinstance(moved, mixup.Mixup):
        moved.attach(find_embeddings(engine.module))
    return engine


def classes_and_padding(prepared: Prepared) -> Classes | None:
    """What the model is to know of the data; None: of packed samples nothing."""
    if prepared.classes is not None or prepared.pad_id is None:
        return prepared.classes
    return Classes((), prepared.pad_id)


def class_counts(setting: Setting) -> Tensor | None:
    """Training targets of each class, [classes], where they are asked for."""
    config = setting.config
    if config.objective.class_weights == "none":
        return None
    data = config.data
    samples = setting.prepared.samples("train", data.sequence_length, data.boundaries)
    assert isinstance(samples, LabelledSamples)
    return torch.from_numpy(samples.class_counts()).double()


def _make_penalty(config: RunConfig) -> Penalty | None:
    weights = config.objective.l1, config.objective.l2, config.objective.l2_start
    if not any(weights):
        return None

    def penalty(weight: Tensor, start: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return penalty_gradient(weight, *weights, start), {"penalty": penalty_value(weight, *weights, start)}

    return penalty


def held_out_batches(setting: Setting, micro: int) -> Iterator[dict[str, IntArray]]:
    """This rank's micro-batches of an evaluation."""
    config, ranks = setting.config, setting.ranks
    data = config.data
    return evaluation_batches(
        setting.prepared.samples(
            "held_out", data.sequence_length, data.boundaries, decoder_start=decoder_start(config)
        ),
        micro=micro,
        rank=ranks.rank,
        ranks=ranks.world_size,
        max_samples=config.evaluation.max_samples,
        objective=config.objective,
        seed=config.seed,
    )


def make_timer(setting: Setting, numbers: Arithmetic) -> StepTimer:
    """The clock of this run's attempts."""
    name = torch.cuda.get_device_name() if setting.device == "cuda" else "cpu"
    peak = peak_flops(name, setting.precision)
    read_memory: Callable[[], int] = partial(memory_bytes, setting.device)
    return StepTimer(
        numbers.tokens_per_step,
        setting.facts.flops_per_token(setting.config.data.sequence_length),
        None if peak is None else peak * setting.ranks.world_size,
        read_memory,
    )
