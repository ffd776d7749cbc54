"""The teacher of a run, loaded into this process: whole on every rank, or dealt out to them a weight at a time."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from trainer.config.resolve import Device, Precision
from trainer.config.schema import ModelConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.build import frozen_model
from trainer.model.capture import num_layers
from trainer.model.configuration import check_positions, model_configuration
from trainer.model.head import find_head
from trainer.model.heads import own_classes
from trainer.model.inner import Wanted, wanted_of_teacher
from trainer.model.weights import read_weights
from trainer.records import Classes, IntArray
from trainer.teacher.holding import Holders, Holding, Read, nodes
from trainer.teacher.model import TeacherModel
from trainer.terms import Model

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Place(Protocol):
    """Of this process among all."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...


def build_teacher(
    config: RunConfig,
    *,
    ranks: Place,
    device: Device,
    vocabulary: int,
    classes: Classes | None = None,
    kept: IntArray | None = None,
    alive: Callable[[], None] = lambda: None,
) -> TeacherModel:
    """The teacher of `config` at the place `replica` or `zero3`, with its weights. A collective.

    Args:
        vocabulary: tokens of the run's tokenizer.
        classes: of the run, where it classifies.
        kept: the teacher's id for each token of the run, ascending, [vocabulary]; None: the same.
        alive: called with every weight that is loaded.

    Raises:
        ConfigError: it cannot be loaded, does not fit the run, or does something unknown to its logits.
    """
    try:
        return _build(config, ranks, device, vocabulary, classes, kept, alive)
    except ConfigError as error:
        # found in the options of the teacher, by those who know a model's
        problems = [
            (f"distill.teacher{path.removeprefix('model')}" if path.split(".")[0] == "model" else path, text)
            for path, text in error.problems
        ]
        raise ConfigError(problems) from error


def _build(
    config: RunConfig,
    ranks: Place,
    device: Device,
    vocabulary: int,
    classes: Classes | None,
    kept: IntArray | None,
    alive: Callable[[], None],
) -> TeacherModel:
    assert config.distill is not None
    if kept is not None:
        vocabulary = int(kept[-1]) + 1
        classes = classes and replace(classes, pad_id=int(kept[classes.pad_id]))
    teacher = config.distill.teacher
    own = config.model_copy(
        update={
            "model": ModelConfig(
                pretrained=teacher.pretrained,
                overrides=teacher.overrides,
                attention=teacher.attention,
                trust_remote_code=teacher.trust_remote_code,
            )
        }
    )
    # with the run's classes padding is set too
    model_config = model_configuration(own, None, _checked_classes(own, classes))
    check_positions(own, model_config)
    size = model_config.get_text_config().vocab_size
    if config.distill.vocabulary == "same" and size < vocabulary:
        text = f"knows {size} tokens, and the run's tokenizer has {vocabulary}: it is another tokenizer's"
        raise ConfigError([("model.pretrained", text)])
    precision = _precision(config, device)
    dtype = _DTYPES[precision]
    read = partial(read_weights, own, model_config, dtype)
    place = torch.device(device, ranks.local_rank) if device == "cuda" else torch.device("cpu")
    if teacher.place == "replica":
        model = frozen_model(own, model_config, zero3=None, group=None, dtype=dtype)
        model.to(place)  # type: ignore[arg-type]
        holding = Holding(model, None, alive)
        holding.fill(read)
        return _finished(own, model, model, holding, read, place, kept)
    import deepspeed

    holders = _holders(ranks) if teacher.within_node else Holders(None, 0)
    options = _zero3_options(config, device, precision)
    model = frozen_model(own, model_config, zero3=options, group=holders.group, dtype=dtype)
    holding = Holding(model, holders, alive)
    holding.fill(read)
    engine, *_ = deepspeed.initialize(model=model, config=options, dist_init_required=False)
    engine.eval()
    return _finished(own, model, engine, holding, read, place, kept, engine.destroy)


def _finished(
    config: RunConfig,
    model: PreTrainedModel,
    call: Model,
    holding: Holding,
    read: Read,
    device: torch.device,
    kept: IntArray | None,
    release: Callable[[], None] = lambda: None,
) -> TeacherModel:
    assert config.distill is not None
    looks_inside = config.distill.hidden is not None or config.distill.relations is not None
    wanted = wanted_of_teacher(config.distill, num_layers(model)) if looks_inside else Wanted((), None)
    head = None if config.objective.kind == "classification" else find_head(model, call)
    return TeacherModel(
        model, call, head, holding=holding, wanted=wanted, read=read, device=device, release=release, kept=kept
    )


def _precision(config: RunConfig, device: Device) -> Precision:
    assert config.distill is not None
    asked = config.distill.teacher.precision
    if asked != "auto":
        return asked
    return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _checked_classes(config: RunConfig, classes: Classes | None) -> Classes | None:
    """The classes of the run, where they are those of the teacher."""
    if config.objective.kind != "classification" or classes is None:
        return None
    own = own_classes(model_configuration(config, None))
    ours = ", ".join(classes.names)
    if own is None:
        text = f"{config.model.pretrained} is no classifier: a teacher must know the classes {ours}"
    elif len(own) != len(classes.names):
        text = f"tells {len(own)} classes apart ({', '.join(own)}), and the data has {len(classes.names)} ({ours})"
    else:
        return classes
    raise ConfigError([("model.pretrained", text)])


def _holders(ranks: Place) -> Holders:
    """The ranks of this node. A collective."""
    result: Holders | None = None
    for members in nodes(ranks.local_rank, socket.gethostname()):
        if len(members) == 1 and ranks.world_size > 1:
            text = f"rank {members[0]} is alone on its node: nothing can be sharded there; use place: replica"
            raise ConfigError([("model.within_node", text)])
        # every rank takes part in the making of every group
        group = dist.new_group(members)
        if ranks.rank in members:
            result = Holders(group, members[0])
    assert result is not None
    return result


def _zero3_options(config: RunConfig, device: Device, precision: Precision) -> dict[str, Any]:
    bucket = config.zero.bucket_elements
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": config.zero.overlap and device == "cuda",
            # on CPU nothing is won by fetching ahead, and DeepSpeed keeps several buckets for it
            "stage3_prefetch_bucket_size": bucket if device == "cuda" else 0,
            # nothing stays whole: small parameters ride along in the bucket that is fetched ahead
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": bucket,
            # it would exchange torch.nn.functional.linear for the student too
            "memory_efficient_linear": False,
        },
        "steps_per_print": 1_000_000_000,
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
