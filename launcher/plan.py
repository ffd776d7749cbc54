"""What a run would be on given resources: ranks, batch, memory, length. Pure, and free of torch; starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.memory import PARTS, RankMemory, memory_by_stage
from launcher.teacher_memory import TeacherModel
from trainer.config.check import unsupported
from trainer.config.resolve import Arithmetic, Device, Precision, arithmetic, choose_device, choose_precision
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from launcher.resources import Resources
    from trainer.records import ModelFacts

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """The content of `plan.json` (by `dataclasses.asdict`)."""

    name: str
    nodes: int
    ranks_per_node: int
    ranks: int
    device: Device
    device_name: str
    precision: Precision
    threads_per_rank: int
    arithmetic: Arithmetic
    sequence_length: int
    tokens: int
    """Input tokens of the whole run."""
    epochs: float | None
    """Passes over the prepared data; None while the number of samples is not known."""
    model_type: str | None
    num_parameters: int | None
    teacher: str | None
    """Of a distillation, in words."""
    stage: int
    memory: tuple[RankMemory, ...]
    """ZeRO 0 to 3; empty while the model is not known."""
    rank_bytes: int | None
    """Memory for one rank: the smallest GPU's, or a rank's share of the host's. None: not known on this machine."""
    host_bytes: int | None
    """A rank's share of the host's memory. None: not known, since the run is for other machines."""
    notes: tuple[str, ...]
    """What the user should know before starting, one sentence each."""


def make_plan(
    config: RunConfig,
    facts: ModelFacts | None,
    resources: Resources,
    num_samples: int | None = None,
    teacher: ModelFacts | None = None,
) -> Plan:
    """The plan of a checked `config`, where every node has the resources of this one.

    Args:
        facts: of the model; None leaves the memory out.
        num_samples: samples of one epoch, where the data is prepared.
        teacher: of a distillation, where the ranks load it.

    Raises:
        ConfigError: the batch does not divide, the model's positions are too few, or the device cannot do it.
    """
    cluster = config.cluster
    ranks = cluster.nodes * cluster.ranks_per_node
    device = choose_device(config, len(resources.gpus))
    precision = choose_precision(config, device, all(gpu.has_bf16 for gpu in resources.gpus))
    problems = unsupported(config, device, precision)
    length = config.data.sequence_length
    if facts is not None and facts.max_positions is not None and length > facts.max_positions:
        text = f"{length} tokens do not fit the {facts.max_positions} positions of the model"
        problems.append(("data.sequence_length", text))
    if problems:
        raise ConfigError(problems)
    numbers = arithmetic(config, ranks)
    taught_by = None if teacher is None else TeacherModel(teacher, _precision_of_teacher(config, device, resources))
    memory = () if facts is None else memory_by_stage(facts, config, ranks, device, precision, taught_by)
    rank_bytes = _rank_bytes(config, device, resources)
    is_here = device == "cpu" or len(resources.gpus) >= cluster.ranks_per_node
    host_bytes = resources.memory_bytes // cluster.ranks_per_node if is_here else None
    chosen = memory[config.zero.stage] if memory else None
    return Plan(
        name=config.name,
        nodes=cluster.nodes,
        ranks_per_node=cluster.ranks_per_node,
        ranks=ranks,
        device=device,
        device_name=_device_name(device, resources),
        precision=precision,
        threads_per_rank=cluster.threads_per_rank or max(1, resources.cores // cluster.ranks_per_node),
        arithmetic=numbers,
        sequence_length=length,
        tokens=numbers.tokens,
        epochs=None if not num_samples else numbers.steps * numbers.samples / num_samples,
        model_type=None if facts is None else facts.model_type,
        num_parameters=None if facts is None else facts.num_parameters,
        teacher=_teacher_in_words(config, taught_by),
        stage=config.zero.stage,
        memory=memory,
        rank_bytes=rank_bytes,
        host_bytes=host_bytes,
        notes=(
            *resources.notes,
            *_notes(config, device, precision, resources),
            *_does_not_fit(memory, config.zero.stage, device, rank_bytes),
            *_snapshots_do_not_fit(chosen, host_bytes),
        ),
    )


def _precision_of_teacher(config: RunConfig, device: Device, resources: Resources) -> Precision:
    assert config.distill is not None
    own = config.model_copy(update={"precision": config.distill.teacher.precision})
    return choose_precision(own, device, all(gpu.has_bf16 for gpu in resources.gpus))


def _teacher_in_words(config: RunConfig, teacher: TeacherModel | None) -> str | None:
    if config.distill is None:
        return None
    options = config.distill.teacher
    match options.place:
        case "cache":
            return "its knowledge is read from a cache"
        case "server":
            return f"{options.server.model} at {options.server.url}" if options.server else "on a server"
        case "replica":
            where = "whole on every rank"
        case "zero3":
            where = f"sharded over the ranks{' of each node' if options.within_node else ''}"
    if teacher is None:
        return where
    return f"{teacher.facts.model_type}, {teacher.facts.num_parameters:,} parameters, {teacher.precision}, {where}"


def _rank_bytes(config: RunConfig, device: Device, resources: Resources) -> int | None:
    if device == "cpu":
        return resources.memory_bytes // config.cluster.ranks_per_node
    return min((gpu.memory_bytes for gpu in resources.gpus), default=None)


def _device_name(device: Device, resources: Resources) -> str:
    if device == "cpu":
        return f"CPU, {resources.cores} cores a node"
    names = sorted({gpu.name for gpu in resources.gpus})
    return f"GPU, {' and '.join(names)}" if names else "GPU"


def _notes(config: RunConfig, device: Device, precision: Precision, resources: Resources) -> list[str]:
    cluster, gpus = config.cluster, len(resources.gpus)
    notes = []
    if device == "cuda" and gpus < cluster.ranks_per_node:
        asked = f"{cluster.ranks_per_node} GPUs a node"
        notes.append(f"the run needs {asked}, and this machine has {gpus or 'none'}: it is planned, not started, here")
    if device == "cpu" and cluster.device == "auto" and gpus:
        notes.append(f"{cluster.ranks_per_node} ranks a node and {gpus} GPUs here: the run uses the CPU")
    if device == "cpu" and cluster.ranks_per_node > resources.cores:
        notes.append(f"{cluster.ranks_per_node} ranks share {resources.cores} cores: expect it to be slow")
    if precision == "fp16":
        notes.append("fp16 scales the loss, and a scale that is too high costs a step now and then; bf16 does not")
    return notes


def _does_not_fit(memory: tuple[RankMemory, ...], stage: int, device: Device, rank_bytes: int | None) -> list[str]:
    """A sentence where the chosen stage does not fit, naming the stages that do. It never fails for snapshots."""
    needed = [one.needed - (one.snapshots if device == "cpu" else 0) for one in memory]
    if rank_bytes is None or not memory or needed[stage] <= rank_bytes:
        return []
    fitting = [str(one.stage) for one, its in zip(memory, needed, strict=True) if its <= rank_bytes]
    way_out = (
        f"zero.stage {' or '.join(fitting)} would fit"
        if fitting
        else "no stage fits: lower batch.micro, or set model.activation_checkpointing"
    )
    there = as_bytes(rank_bytes)
    return [f"a rank needs about {as_bytes(needed[stage])} under zero.stage {stage}, and has {there}; {way_out}"]


def _snapshots_do_not_fit(memory: RankMemory | None, host_bytes: int | None) -> list[str]:
    """A sentence where the host has no room for a rank's snapshots beside all else."""
    if memory is None or host_bytes is None or not memory.snapshots or memory.host <= host_bytes:
        return []
    left = max(0, host_bytes - (memory.host - memory.snapshots))
    return [
        f"the snapshots of a rank take {as_bytes(memory.snapshots)} of host memory, and it has "
        f"{as_bytes(left) if left else 'nothing'} left: the run will go back to checkpoints on disk instead; "
        "lower snapshots.keep, or set checkpoint.every to what you can lose"
    ]


def as_bytes(number: int) -> str:
    """MiB up to one GiB, then GiB; a dash for none."""
    if not number:
        return "–"
    return f"{number / MIB:,.0f} MiB" if number < GIB else f"{number / GIB:,.1f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def batch_sentence(numbers: Arithmetic) -> str:
    """`16 samples = 4 micro × 2 accumulation × 2 ranks`."""
    factors = f"{numbers.micro} micro × {numbers.accumulation} accumulation × {numbers.ranks} ranks"
    return f"{numbers.samples} samples = {factors}"


def render_plan(plan: Plan) -> RenderableType:
    """The plan for a terminal: facts, then the memory of a rank by part and stage, then notes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    numbers = plan.arithmetic
    ranks = f"{plan.ranks} = {_count(plan.nodes, 'node')} × {plan.ranks_per_node}"
    rows = [
        ("run", plan.name),
        ("ranks", f"{ranks}, {plan.device_name}, {plan.precision}"),
        ("batch", batch_sentence(numbers)),
        ("", f"{numbers.tokens_per_step:,} tokens a step, in samples of {plan.sequence_length:,}"),
        ("steps", f"{numbers.steps:,}, of these {numbers.warmup_steps:,} warm-up and {numbers.decay_steps:,} decay"),
        ("tokens", f"{plan.tokens:,}" + ("" if plan.epochs is None else f" ({plan.epochs:.2f} epochs)")),
    ]
    if not plan.memory:
        rows.append(("ZeRO", f"stage {plan.stage}; memory is not known, since the model is not"))
    if plan.num_parameters is not None:
        per_parameter = plan.tokens / plan.num_parameters
        text = f"{plan.model_type}, {plan.num_parameters:,} parameters, {per_parameter:,.1f} tokens for each"
        rows.insert(1, ("model", text))
    if plan.teacher is not None:
        rows.insert(1 + (plan.num_parameters is not None), ("teacher", plan.teacher))
    if plan.device == "cpu":
        place = [name for name, _ in rows].index("ranks")
        rows.insert(place + 1, ("threads", f"{plan.threads_per_rank} a rank"))
    facts = Table.grid(padding=(0, 2))
    for name, text in rows:
        facts.add_row(Text(name, style="bold"), Text(text))
    parts: list[RenderableType] = [facts]
    if plan.memory:
        parts += [Text(), _memory_table(plan)]
    if plan.notes:
        parts.append(Text())
        parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    return Group(*parts)


def _memory_table(plan: Plan) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Memory of a rank", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for memory in plan.memory:
        is_chosen = memory.stage == plan.stage
        header = Text(f"{'▸ ' if is_chosen else ''}ZeRO {memory.stage}")
        table.add_column(header, justify="right", no_wrap=True, style="bold" if is_chosen else "")
    for part in PARTS:
        if part == "teacher" and plan.teacher is None:
            continue
        table.add_row(part, *(as_bytes(getattr(memory, part)) for memory in plan.memory))
    if any(memory.offloaded for memory in plan.memory):
        table.add_row("offloaded to the host", *(as_bytes(memory.offloaded) for memory in plan.memory))
    table.add_row("at the fullest moment", *(as_bytes(memory.peak) for memory in plan.memory))
    table.add_row("  which is in", *(memory.moment for memory in plan.memory))
    table.add_row("needed", *(as_bytes(memory.needed) for memory in plan.memory))
    if plan.rank_bytes is not None:
        there = plan.rank_bytes
        bare = [memory.needed - (memory.snapshots if plan.device == "cpu" else 0) for memory in plan.memory]
        fits = [memory.needed <= there for memory in plan.memory]
        table.add_row(f"fits in {as_bytes(there)}", *("yes" if it_fits else "no" for it_fits in fits))
        if fits != [its <= there for its in bare]:
            table.add_row("  without snapshots", *("yes" if its <= there else "no" for its in bare))
    if plan.device == "cuda":
        table.add_row("needed on the host", *(as_bytes(memory.host) for memory in plan.memory))
    return table
