"""Memory of one rank under ZeRO 0–3, by part. Pure arithmetic on what DeepSpeed 0.19.8 allocates.

The formulas follow DeepSpeed's source, not the paper: stages 1 and 2 keep a separate fp32 master partition even when
they train in fp32, gradients have the type of the model, buckets are as large as the whole gradient of a small model,
the update flattens its gradients into a copy, and stage 3 keeps what it gathered as long as it is needed again within
`max_reuse_distance`. docs/plan.md compares them with measured peaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from launcher.teacher_memory import TeacherModel, chunk_of, largest_parameter, layer_bytes, teacher_memory
from trainer.config.memory import snapshot_bytes
from trainer.config.objective import TEXTS
from trainer.config.resolve import Device, Precision, arithmetic
from trainer.config.schema import RunConfig
from trainer.records import ModelFacts

Stage = Literal[0, 1, 2, 3]
Moment = Literal["backward", "reduction", "update"]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)

DENSE_BUCKET_ELEMENTS = 500_000_000
"""Stage 0 reduces so many elements at once (DeepSpeed: MEMORY_OPT_ALLREDUCE_SIZE)."""
MAX_REUSE_DISTANCE = 1_000_000_000
"""Stage 3 keeps a gathered parameter that is needed again within so many elements (DeepSpeed's default)."""
PROCESS_BYTES: dict[Device, int] = {"cpu": 500 * 2**20, "cuda": 2**30}
"""Interpreter and libraries (CPU: measured, host memory); CUDA context and NCCL (GPU: an estimate, device memory)."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank, each part at its own largest."""

    stage: Stage
    weights: int
    """The model's weights; under stage 3 this rank's partition and what is gathered at once."""
    gradients: int
    optimizer: int
    """Master weights and Adam's two moments."""
    activations: int
    """What the backward pass needs, logits and loss included: an estimate."""
    teacher: int
    """Of a distillation: the teacher's weights and what asking it takes; 0 where it is not loaded here."""
    communication: int
    """Buckets of reduction and gathering."""
    update: int
    """Copies within the update."""
    snapshots: int
    """Copies of the training state to go back to. On GPU they lie in host memory, which `needed` does not count."""
    process: int
    """What a process takes before it holds any model."""
    offloaded: int
    """What offloading moves from the device to host memory."""
    host: int
    """What the host must have for a rank: on GPU what was offloaded and the snapshots; on CPU all that is needed."""
    peak: int
    """Tensors and process at the fullest moment: the parts are not all there at once."""
    moment: Moment
    """When that is."""
    needed: int
    """What the device, or the host for a rank on CPU, must have. On CPU the C library keeps most of what was freed, so
    that the parts add up."""


PARTS = (
    *("weights", "gradients", "optimizer", "activations", "teacher"),
    *("communication", "update", "snapshots", "process"),
)


def memory_by_stage(
    facts: ModelFacts,
    config: RunConfig,
    ranks: int,
    device: Device,
    precision: Precision,
    teacher: TeacherModel | None = None,
) -> tuple[RankMemory, ...]:
    """:func:`rank_memory` for stages 0 to 3, all else as in the config."""
    return tuple(rank_memory(facts, config, ranks, device, precision, stage, teacher) for stage in STAGES)


def rank_memory(
    facts: ModelFacts,
    config: RunConfig,
    ranks: int,
    device: Device,
    precision: Precision,
    stage: Stage,
    teacher: TeacherModel | None = None,
) -> RankMemory:
    """Memory of the fullest rank.

    Args:
        teacher: of a distillation, where the ranks load it.

    Raises:
        ConfigError: the batch does not divide.
    """
    element = 4 if precision == "fp32" else 2
    parameters = facts.num_parameters
    partition = math.ceil(parameters / ranks) if stage else parameters
    largest = largest_parameter(facts)
    accumulates = arithmetic(config, ranks).accumulation > 1
    on_gpu = device == "cuda"
    overlaps = on_gpu and config.zero.overlap
    offload = config.zero.offload if stage and on_gpu else "none"

    # On a CPU, pages of a bucket that were never written to take no memory.
    bucket = config.zero.bucket_elements if on_gpu else min(config.zero.bucket_elements, parameters)
    if stage == 0:
        bucket = min(parameters, DENSE_BUCKET_ELEMENTS)

    # Stage 3 keeps the layers that it needs again before `max_reuse_distance` elements have gone by, there and back.
    weights = parameters + facts.frozen_parameters
    kept = element * (math.ceil(weights / ranks) if stage == 3 else weights)
    gathered = min(weights, MAX_REUSE_DISTANCE // 2 + bucket + largest) if stage == 3 else 0
    master = 0 if stage == 0 and precision == "fp32" else 4
    # the moving average and the weights that the run began with are as large as master weights
    copies_of_weights = (config.optim.ema is not None) + (config.objective.l2_start > 0)
    optimizer = (master + 8 + 4 * copies_of_weights) * partition

    # Gradients when all are reduced, and those carried from one micro-batch into the forward pass of the next; buckets
    # and what goes with them: a flat copy is sent, a second bucket is filled meanwhile.
    match stage:
        case 0:
            gradients = carried = parameters
            buckets = 1
        case 1:
            # whole until the boundary, then moved through the bucket, from which this rank's part is copied out
            gradients, carried = parameters + partition, parameters
            buckets = 2 if overlaps else 1
        case 2:
            gradients, carried = partition * (2 if accumulates else 1), partition
            buckets = 3 if overlaps else 2
        case 3:
            # the partitions and the bucket live from start to end; gloo reduces in a copy of its own
            gradients = carried = partition
            buckets = 2 if on_gpu else 3
    if not accumulates and stage != 3:
        carried = 0

    # A flat fp32 copy of the gradients, beside them; the fused AdamW itself needs nothing.
    update = 0 if stage == 0 and precision == "fp32" else 4 * partition

    offloaded = 0
    if offload != "none":
        # master weights, moments, gradients in fp32, and a buffer of the model's type
        offloaded = optimizer + (4 + element) * partition
        optimizer = update = 0
        if stage == 2:
            gradients, carried = largest, 0
    if offload == "all":
        offloaded += kept
        kept = 0

    activations = activation_bytes(facts, config, element)
    process = PROCESS_BYTES[device]
    snapshots = snapshot_bytes(config, partition)
    taught_by = teacher_memory(config, teacher, ranks)
    always = process + taught_by.resident + kept + optimizer
    always += (0 if on_gpu else snapshots) + (element * bucket if stage == 3 else 0)
    moments: dict[Moment, int] = {
        "backward": always + element * (gathered + carried) + activations + taught_by.passing,
        "reduction": always + element * (gathered + gradients + bucket * (buckets - (stage == 3))),
        "update": always + element * partition + update,
    }
    moment = max(moments, key=lambda name: moments[name])
    communication = element * bucket * (buckets + (stage == 3))
    asked = taught_by.resident + taught_by.passing
    parts = [kept + element * gathered, element * gradients, optimizer, activations, asked, communication, snapshots]
    parts.append(process)
    needed = moments[moment] if on_gpu else max(sum(parts), moments[moment])
    return RankMemory(
        stage=stage,
        weights=kept + element * gathered,
        gradients=element * gradients,
        optimizer=optimizer,
        activations=activations,
        teacher=asked,
        communication=communication,
        update=update,
        snapshots=snapshots,
        process=process,
        offloaded=offloaded,
        host=offloaded + snapshots if on_gpu else needed,
        peak=moments[moment],
        moment=moment,
        needed=needed,
    )


def activation_bytes(facts: ModelFacts, config: RunConfig, element: int) -> int:
    """Estimate of what one micro-batch keeps for its backward pass, and of the loss at its start.

    A layer keeps, a token (h: width, k: width of the keys, f: width of the feed-forward part): the inputs of both
    norms, what they normalise to and what they give (6·h), queries and attention output (2·h), keys and values (2·k),
    both halves of the gate, the activation and their product (4·f; without a gate 2·f). Eager attention adds its scores
    and probabilities (length · heads, in fp32 and twice in the model's type). The loss holds, a token and vocabulary
    entry: the logits, an fp32 copy where they are not fp32, the log-probabilities and two gradients (with z-loss: the
    logits and two fp32 buffers). A distillation holds one chunk of logits instead, the gradient of the hidden states
    and that of the head, in fp32 and as the model has it; the logits of a classifier are few, of tokens too. With
    activation checkpointing every layer keeps its input, and one layer at a time all of it.
    """
    hidden, kind = facts.hidden_size, config.objective.kind
    tokens = config.batch.micro * config.data.sequence_length
    per_layer = layer_bytes(facts, element, config.model.attention, config.data.sequence_length)
    layers = facts.num_layers * per_layer
    if config.model.activation_checkpointing:
        layers = facts.num_layers * element * hidden + per_layer
    body = tokens * (layers + 3 * element * hidden)
    if kind in (*TEXTS, "token_classification", "question_answering"):
        return body
    if config.distill is not None:
        head = facts.vocabulary * hidden * (4 + (0 if element == 4 else element))
        return body + element * (tokens * hidden + chunk_of(config) * facts.vocabulary) + head
    per_entry = element + (8 if config.objective.z_loss else (0 if element == 4 else 4) + 3 * 4)
    return body + tokens * per_entry * facts.vocabulary
