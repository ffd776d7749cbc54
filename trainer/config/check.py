"""What the schema cannot say: options that contradict each other, and options without effect.

Every rule is one line below; a contradiction refuses the config, an option without effect is warned about.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from trainer.config import check_distill, check_finetune, check_sources
from trainer.config.layers import parse_layers
from trainer.config.objective import EACH_ALONE, TEXTS
from trainer.config.resolve import Device, Precision, arithmetic, tokenizer_reference
from trainer.config.schema import RunConfig
from trainer.config.section import is_set
from trainer.errors import ConfigError

Problem = tuple[str, str]


def check_config(config: RunConfig, source: str = "the config") -> list[str]:
    """Warnings about options that have no effect, one sentence each.

    Raises:
        ConfigError: with every contradiction between options, the batch arithmetic on the planned ranks included.
    """
    problems = [
        *_name(config),
        *check_sources.problems(config),
        *_excluded(config),
        *_tokenizer(config),
        *_model(config),
        *_run(config),
        *check_distill.problems(config),
        *check_finetune.problems(config),
        *_support(config),
    ]
    try:
        arithmetic(config, config.cluster.nodes * config.cluster.ranks_per_node)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems, source)
    return [f"{path}: {sentence}" for path, sentence in _without_effect(config)]


def unsupported(config: RunConfig, device: Device, precision: Precision) -> list[Problem]:
    """What DeepSpeed cannot do of what the config asks, on this device and in this precision.

    DeepSpeed 0.19.8 runs ZeRO 0–3 in fp32 and bf16 on CPU and GPU; fp16 needs a GPU's kernels and ZeRO 1, 2 or 3.
    """
    problems: list[Problem] = []
    if precision == "fp16" and device == "cpu":
        problems.append(("precision", "fp16 needs a GPU; use bf16 or fp32 on CPU"))
    if precision == "fp16" and config.zero.stage == 0:
        # its engine does not multiply the loss there, but its optimizer divides the gradient
        problems.append(("zero.stage", "DeepSpeed does not scale the fp16 loss under stage 0; use stage 1, or bf16"))
    if config.model.attention.startswith("flash_attention") and device == "cpu":
        problems.append(("model.attention", f"{config.model.attention} needs a GPU; use sdpa or eager on CPU"))
    if config.model.attention.startswith("flash_attention") and precision == "fp32":
        problems.append(
            ("model.attention", f"{config.model.attention} computes in bf16 or fp16, but precision is fp32")
        )
    teacher = config.distill.teacher if config.distill else None
    if teacher is not None and teacher.attention.startswith("flash_attention") and device == "cpu":
        problems.append(("distill.teacher.attention", f"{teacher.attention} needs a GPU; use sdpa or eager on CPU"))
    return problems


def _name(config: RunConfig) -> Iterator[Problem]:
    name = config.name
    if bad := next((character for character in name if not character.isprintable()), None):
        yield "name", f"holds the character U+{ord(bad):04X}; a run is named on one line, in printable characters"
    elif bad := next((character for character in "/\\" if character in name), None):
        yield "name", f"holds {bad!r}, but names one directory; to put it elsewhere set `runs`"
    elif name[0] in ".-":
        yield "name", f"begins with {name[0]!r}; begin it with a letter or a digit"
    elif name != name.strip():
        yield "name", "begins or ends with a space"
    elif len(os.fsencode(name)) > 200:
        yield "name", f"is {len(os.fsencode(name))} bytes long; file names take up to 200"


def _excluded(config: RunConfig) -> Iterator[Problem]:
    for index, (first, last) in enumerate(config.data.exclude_batches):
        if first > last:
            yield f"data.exclude_batches.{index}", f"is [first, last], but {first} comes after {last}"


def _tokenizer(config: RunConfig) -> Iterator[Problem]:
    tokenizer = config.data.tokenizer
    if tokenizer.path is not None and tokenizer.train is not None:
        yield "data.tokenizer", "has `path` and `train`; give one of them"
    if tokenizer.train is None and tokenizer_reference(config) is None:
        yield "data.tokenizer", "give `path` or `train`: a model from scratch brings no tokenizer"
    if tokenizer.keep == "all":
        return
    kind, path = config.objective.kind, "data.tokenizer.keep"
    if kind not in TEXTS:
        yield path, f"`used` is for classifiers, but objective.kind is {kind}; use `all`"
    if tokenizer.train is not None:
        yield path, "`used` is for tokenizers that exist, and `train` makes one; use `all`"
    if config.model.pretrained is not None and config.model.pretrained.endswith(".gguf"):
        yield path, "`used` cannot take rows of embeddings from a .gguf file; use `all`, or another form of the model"


def _model(config: RunConfig) -> Iterator[Problem]:
    model, length = config.model, config.data.sequence_length
    if (model.config is None) == (model.pretrained is None):
        found = "neither" if model.config is None else "both"
        yield "model", f"must have exactly one of `config` and `pretrained`, but has {found}"
    if model.layers is not None:
        if model.pretrained is None:
            yield "model.layers", "takes layers of a pretrained model; give `model.pretrained`, or leave it out"
        try:
            parse_layers(model.layers)
        except ValueError as error:
            yield "model.layers", str(error)
    if model.config is None:
        return
    if not isinstance(model.config.get("model_type"), str):
        yield "model.config.model_type", "is missing; name the architecture as transformers does (llama, gpt2, bert, …)"
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = model.config.get(key)
        if isinstance(limit, int) and length > limit:
            yield "data.sequence_length", f"{length} tokens do not fit the positions (model.config.{key}: {limit})"
    vocabulary, train = model.config.get("vocab_size"), config.data.tokenizer.train
    if isinstance(vocabulary, int) and train is not None and train.vocabulary > vocabulary:
        yield (
            "data.tokenizer.train.vocabulary",
            f"{train.vocabulary} tokens are more than the model's vocabulary (model.config.vocab_size: {vocabulary})",
        )


def _run(config: RunConfig) -> Iterator[Problem]:
    if config.zero.offload != "none" and config.zero.stage == 0:
        yield "zero.offload", "needs zero.stage 1, 2 or 3: stage 0 does not shard the optimizer"
    if config.zero.offload == "all" and config.zero.stage in (1, 2):
        yield "zero.offload", f"`all` needs zero.stage 3: under stage {config.zero.stage} the weights are not sharded"
    if config.zero.offload != "none" and (config.objective.l1 or config.objective.l2):
        # DeepSpeed measures the norm that it clips by before the penalties could be added
        yield "objective", "l1 and l2 do not work with zero.offload; use optim.weight_decay, or no offload"
    if config.objective.kind == "masked" and config.data.boundaries == "block":
        yield "data.boundaries", "`block` needs the causal objective: masked models look across; use `positions`"
    snapshots, clean_steps = config.snapshots, config.guard.clean_steps
    every = snapshots.every if config.guard.mode == "act" else None
    if every is not None and snapshots.keep * every <= clean_steps:
        yield (
            "guard.clean_steps",
            f"no snapshot gets {clean_steps} steps old: {snapshots.keep} are kept, one every {_steps(every)}; "
            "raise snapshots.keep or snapshots.every",
        )
    clean = config.data.clean
    if clean.max_characters is not None and clean.max_characters < clean.min_characters:
        yield (
            "data.clean.max_characters",
            f"{clean.max_characters} is less than data.clean.min_characters ({clean.min_characters}): no document fits",
        )


def _support(config: RunConfig) -> list[Problem]:
    """Only what is already decided: `auto` is checked by the plan, which knows the machine."""
    if config.cluster.device == "auto":
        return []
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if config.cluster.device == "cpu" else "bf16"
    return unsupported(config, config.cluster.device, precision)


def _steps(number: int) -> str:
    return "step" if number == 1 else f"{number} steps"


_AFTER_ROLLBACK = ("max_incidents", "incident_window", "quarantine_before", "cool", "rewarm", "reset_moments")
_LADDER = ("replay", "max_rollbacks", "clean_steps", "verify", *_AFTER_ROLLBACK)
"""Options of the guard that only the whole ladder uses."""


def _stability_without_effect(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """(option, whether it is idle, why)."""
    guard, snapshots = config.guard, config.snapshots
    mode, ranks = f"guard.mode is {guard.mode}", config.cluster.nodes * config.cluster.ranks_per_node
    acts = guard.mode == "act"
    for name in _LADDER:
        idle = acts and guard.max_rollbacks == 0 and name in _AFTER_ROLLBACK
        yield f"guard.{name}", idle or not acts, "guard.max_rollbacks is 0" if idle else mode
    yield "guard.spike", guard.mode == "off", mode
    yield "guard.drift", guard.mode == "off", mode
    yield "guard.revisit", not acts, f"{mode}: nothing is quarantined"
    yield "guard.rewarm", acts and guard.max_rollbacks > 0 and guard.cool == 1, "guard.cool is 1"
    one_rank = "there is one rank, and nothing to compare its weights with"
    yield "guard.checksum_every", guard.mode == "off" or ranks == 1, mode if guard.mode == "off" else one_rank
    yield "snapshots.every", not acts and snapshots.every is not None, mode
    for name in ("keep", "audit"):
        yield f"snapshots.{name}", not acts or snapshots.every is None, "snapshots.every is null" if acts else mode


def _without_effect(config: RunConfig) -> Iterator[Problem]:
    kind, stage, on_cpu = config.objective.kind, config.zero.stage, config.cluster.device == "cpu"
    uses = {source.use for source in config.data.sources}
    evaluated = "held_out" in uses or (config.data.held_out > 0 and "both" in uses)
    not_held_out = "data.held_out is 0" if "both" in uses else "every source is for training (`use`)"
    alone, each_alone = kind in EACH_ALONE, f"each text is a sample of its own (objective.kind is {kind})"
    rules = [
        ("objective.mask_fraction", kind != "masked", f"objective.kind is {kind}"),
        ("data.boundaries", alone, each_alone),
        ("data.held_out", "both" not in uses, "every source says where its documents go (`use`)"),
        ("schedule.decay", config.schedule.kind != "wsd", f"schedule.kind is {config.schedule.kind}"),
        ("schedule.floor", config.schedule.kind == "constant", "schedule.kind is constant"),
        ("model.overrides", config.model.pretrained is None, "the model is made from model.config: write it there"),
        ("model.initialisation", config.model.config is None, "the weights come from model.pretrained"),
        ("zero.overlap", stage == 0 or on_cpu, "zero.stage is 0" if stage == 0 else "there is no overlap on CPU"),
        ("zero.bucket_elements", stage == 0, "zero.stage is 0"),
        ("zero.offload", on_cpu, "on CPU everything is in host memory"),
        ("cluster.threads_per_rank", config.cluster.device == "cuda", "cluster.device is cuda"),
        ("evaluation.every", not evaluated, not_held_out),
        ("evaluation.max_samples", not evaluated, not_held_out),
        ("optim.decay_embeddings", config.optim.weight_decay == 0, "optim.weight_decay is 0"),
        *_stability_without_effect(config),
        *check_distill.without_effect(config),
        *check_finetune.without_effect(config),
    ]
    for path, idle, reason in rules:
        if idle and is_set(config, path):
            yield path, f"has no effect: {reason}"
    yield from check_distill.warnings(config)
    if config.data.accept_changed:
        yield "data.accept_changed", "changed data will be accepted; the run can no longer be repeated exactly"
    if config.optim.clipping == "adagc" and config.optim.clip == 0:
        yield "optim.clip", "is 0: adagc clips nothing in its first 100 steps, and learns from gradients of any size"
    if config.guard.mode == "act" and config.snapshots.every is None and config.checkpoint.every is None:
        yield "guard.mode", "there is no state to go back to: neither snapshots nor checkpoints are taken on the way"
    yield from check_sources.without_effect(config)
