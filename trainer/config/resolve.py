"""What follows from a config and a number of ranks: batch arithmetic, length of the run, DeepSpeed's config. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.schema import RunConfig
from trainer.errors import ConfigError

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]


def choose_device(config: RunConfig, num_gpus: int) -> Device:
    """`cluster.device`; `auto` is GPUs where every rank of a node can have one of `num_gpus`, else CPU."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if num_gpus >= config.cluster.ranks_per_node else "cpu"


def choose_precision(config: RunConfig, device: Device, has_bf16: bool) -> Precision:
    """`precision`; `auto` is bf16 on GPUs that have it, fp32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device == "cuda" and has_bf16 else "fp32"


def tokenizer_reference(config: RunConfig) -> str | None:
    """The tokenizer that exists already: that of `data.tokenizer.path`, else of the pretrained model, else of the
    teacher; None: there is none, or one is trained."""
    tokenizer = config.data.tokenizer
    if tokenizer.train is not None:
        return None
    teacher = config.distill.teacher.pretrained if config.distill else None
    return tokenizer.path or config.model.pretrained or teacher


def loads_teacher(config: RunConfig) -> bool:
    """Whether the ranks hold a teacher: not where it is asked over HTTP, or was asked before."""
    return config.distill is not None and config.distill.teacher.place in ("replica", "zero3")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """global batch = micro-batch × accumulation × ranks."""

    ranks: int
    samples: int
    """Global batch, in samples."""
    micro: int
    accumulation: int
    tokens_per_step: int
    steps: int
    """Optimizer steps of the whole run."""
    warmup_steps: int
    decay_steps: int
    """Length of the decay phase; `steps - warmup_steps` for cosine and linear, 0 for constant."""

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


def arithmetic(config: RunConfig, ranks: int) -> Arithmetic:
    """Batch arithmetic of `config` on `ranks` processes.

    Raises:
        ConfigError: the global batch does not divide; the sentence names the nearest sizes that do.
    """
    samples, micro = config.batch.samples, config.batch.micro
    per_pass = micro * ranks
    if samples % per_pass:
        below, above = samples // per_pass * per_pass, -(-samples // per_pass) * per_pass
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            [
                (
                    "batch.samples",
                    f"{samples} samples do not divide into micro-batches of {micro} on {ranks} ranks "
                    f"({micro} × {ranks} = {per_pass}); use {nearest}, or another batch.micro",
                )
            ]
        )
    tokens_per_step = samples * config.data.sequence_length
    schedule = config.schedule

    def steps_of(amount: int) -> int:
        return amount if schedule.unit == "steps" else -(-amount // tokens_per_step)

    steps = steps_of(schedule.duration)
    warmup = steps_of(schedule.warmup)
    if warmup > steps:
        raise ConfigError(
            [("schedule.warmup", f"the warm-up of {warmup} steps is longer than the run of {steps}; shorten it")]
        )
    match schedule.kind:
        case "constant":
            decay = 0
        case "wsd":
            decay = steps_of(schedule.decay) if schedule.decay is not None else steps // 5
            if warmup + decay > steps:
                raise ConfigError(
                    [
                        (
                            "schedule.decay",
                            f"warm-up ({warmup} steps) and decay ({decay} steps) are longer than the run of {steps}",
                        )
                    ]
                )
        case _:
            decay = steps - warmup
    return Arithmetic(
        ranks=ranks,
        samples=samples,
        micro=micro,
        accumulation=samples // per_pass,
        tokens_per_step=tokens_per_step,
        steps=steps,
        warmup_steps=warmup,
        decay_steps=decay,
    )


def deepspeed_config(config: RunConfig, ranks: int, device: Device, precision: Precision) -> dict[str, Any]:
    """The DeepSpeed configuration that the trainer passes to `deepspeed.initialize` and `deepspeed.json` shows."""
    numbers = arithmetic(config, ranks)
    on_gpu = device == "cuda"
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.stage:
        zero |= {
            "overlap_comm": config.zero.overlap and on_gpu,
            # one more copy of every gradient, against fragmentation of GPU memory; offload is built on it
            "contiguous_gradients": on_gpu or config.zero.offload != "none",
            "reduce_bucket_size": config.zero.bucket_elements,
            "allgather_bucket_size": config.zero.bucket_elements,
        }
    if config.zero.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": config.zero.bucket_elements,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if config.zero.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    result: dict[str, Any] = {
        "train_batch_size": numbers.samples,
        "train_micro_batch_size_per_gpu": numbers.micro,
        "gradient_accumulation_steps": numbers.accumulation,
        # DeepSpeed clips at 1.0 when this is absent
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        # every gradient was looked at before: a second look costs 3 % of a step of a small model
        result["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if precision == "fp16":
        result["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return result


_WITHOUT_EFFECT_ON_BITS = {
    "name",
    "runs",
    "cluster",
    "evaluation",
    "checkpoint",
    "telemetry",
    "guard",
    "snapshots",
    "supervision",
}
_DATA_WITHOUT_EFFECT = {"prepared", "accept_changed", "workers", "prefetch", "exclude_batches"}
_CONVERTED = {"zero": True, "batch": {"micro"}}
"""How the state is cut and the batch computed: a checkpoint is brought into another form when it is loaded."""


def fingerprint(config: RunConfig) -> str:
    """Hash of all options that change what is trained on what: equal for two starts that may continue each other."""
    left_out: dict[str, Any] = dict.fromkeys(_WITHOUT_EFFECT_ON_BITS, True)
    left_out |= {"data": _DATA_WITHOUT_EFFECT} | _CONVERTED
    relevant = config.model_dump(mode="json", exclude=left_out)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]
