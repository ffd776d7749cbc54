"""Drives DeepSpeed in three verbs: `accumulate` (nothing applied), `apply`, `discard`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.resolve import Arithmetic, Device, Precision, deepspeed_config
from trainer.config.schema import RunConfig
from trainer.engine.gradients import Shards, make_shards
from trainer.engine.ranks import Ranks
from trainer.engine.stats import StepVector
from trainer.records import Batch, FloatArray, ParameterFacts, StepStats

Objective = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(logits [batch, length, vocabulary], labels [batch, length]) → sums of the loss terms, `loss` among them."""

Penalty = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""1-D fp32 weights → (gradient of the penalties, their values by name)."""


@dataclass(frozen=True, slots=True)
class WeightStats:
    """Norms of the weights and of their last update, [parameters], equal on all ranks."""

    parameter_norms: FloatArray
    update_ratios: FloatArray
    """‖update‖ / ‖weight‖; NaN where the weight is all zero."""


class Engine:
    """One model in training under DeepSpeed.

    Attributes:
        names: the trainable parameters, in the order in which every record lists them.
        shards: this rank's view of gradients and master weights.
        deepspeed: DeepSpeed's own engine.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        *,
        config: RunConfig,
        numbers: Arithmetic,
        parameters: Sequence[ParameterFacts],
        ranks: Ranks,
        device: Device,
        precision: Precision,
        terms: Sequence[str] = ("loss",),
        penalty: Penalty | None = None,
    ):
        import deepspeed

        self.names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        by_name = {parameter.name: parameter for parameter in parameters}
        self._decays = [by_name[name].decay for name in self.names]
        self._objective = objective
        self._penalty = penalty
        self._numbers = numbers
        self._ranks = ranks
        self._seed = config.seed
        self.device = torch.device(device, ranks.local_rank) if device == "cuda" else torch.device("cpu")
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, ranks.world_size, device, precision),
            dist_init_required=False,
        )
        self.stage: int = config.zero.stage
        self.shards: Shards = make_shards(self.deepspeed, self.names, self.stage, ranks.rank, ranks.world_size)
        self._vector = StepVector(self.shards, len(self.names), terms, ranks.rank, ranks.world_size, self.device)
        self._seconds = 0.0

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self.deepspeed.module
        return module

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by before the step (fp16); 1 otherwise."""
        return float(getattr(self.deepspeed.optimizer, "loss_scale", 1.0))

    def accumulate(self, batch: Batch, *, attempt: int, step: int, stop: bool = False, decision: int = 0) -> StepStats:
        """Forward and backward over all micro-batches of this rank, gradients reduced; nothing is applied.

        The gradient is that of Σ terms / `batch.num_targets` over the *global* batch, however targets are spread over
        ranks and micro-batches. Dropout is seeded by (seed, batch, place in the batch): a replay, a resume and a
        run without an excluded batch draw the same masks.

        Args:
            batch: this rank's micro-batches.
            attempt, step: for the record.
            stop: this rank was asked to stop; the votes come back in the stats.
            decision: digest of the previous decision, compared between ranks.
        """
        began = time.perf_counter()
        engine = self.deepspeed
        engine.train()
        last = len(batch.micro_batches) - 1
        # DeepSpeed divides by ranks and accumulation: this makes the whole a mean over the global batch
        denominator = max(batch.num_targets, 1) / (self._ranks.world_size * len(batch.micro_batches))
        sums: dict[str, Tensor] = {}
        for index, arrays in enumerate(batch.micro_batches):
            first_sample = (index * self._ranks.world_size + self._ranks.rank) * self._numbers.micro
            seed_everything(self._seed, batch.batch_index, first_sample, self.device)
            terms = self._terms(arrays)
            total = sum_of(terms)
            engine.backward(total / denominator)
            for name, value in terms.items():
                value = value.detach().double()
                sums[name] = sums[name] + value if name in sums else value
            if index < last:
                engine.step()
        if self._penalty is not None:
            sums |= self._add_penalties(self._penalty, batch.num_targets)
        scale = self.loss_scale
        reduced = self._vector.reduce(sums, loss_scale=scale, stop=stop, decision=decision, seconds=self._seconds)
        self._seconds = time.perf_counter() - began
        count = max(batch.num_targets, 1)
        terms_mean = {name: value / count for name, value in reduced.terms.items()}
        return StepStats(
            attempt=attempt,
            batch_index=batch.batch_index,
            step=step,
            loss=terms_mean.pop("loss"),
            parts=terms_mean,
            num_targets=batch.num_targets,
            grad_norm=reduced.grad_norm,
            num_nonfinite=reduced.num_nonfinite,
            parameter_norms=reduced.parameter_norms,
            stop_votes=reduced.stop_votes,
            agree=reduced.agree,
            rank_seconds=reduced.rank_seconds,
            loss_scale=scale,
        )

    def apply(self, clip: float, lr: float) -> bool:
        """Clip to the global norm `clip` (0: not at all), update with the rate `lr`.

        Returns:
            False when DeepSpeed refused the step: the gradient is not finite (fp16: the loss scale was too high).
        """
        engine = self.deepspeed
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine._config.gradient_clipping = clip
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = clip
        engine.step()
        return bool(engine.was_step_applied())

    def apply_measured(self, clip: float, lr: float) -> tuple[bool, WeightStats]:
        """As :meth:`apply`, measuring weights and update; holds a copy of this rank's master weights meanwhile."""
        before = [flat.clone() for flat in self.shards.flats()]
        applied = self.apply(clip, lr)
        after = self.shards.flats()
        vector = torch.zeros(2, len(self.names), dtype=torch.float64, device=self.device)
        for fragment in self.shards.fragments:
            if fragment.counted:
                place = slice(fragment.offset, fragment.offset + fragment.num_elements)
                new, old = after[fragment.flat][place], before[fragment.flat][place]
                vector[0, fragment.parameter] += new.double().square().sum()
                vector[1, fragment.parameter] += (new - old).double().square().sum()
        dist.all_reduce(vector)
        weights, updates = np.sqrt(vector.cpu().numpy())
        with np.errstate(divide="ignore", invalid="ignore"):
            return applied, WeightStats(weights, np.where(weights > 0, updates / weights, np.nan))

    def discard(self) -> None:
        """Drop the accumulated gradient: weights, optimizer and schedule stay as if the batch had not been seen."""
        self.shards.clear()
        self.deepspeed.micro_steps += 1

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, NDArray[np.int64]]]) -> tuple[float, int]:
        """Mean loss over all targets of all ranks, in nats, and their number. All ranks give equally many batches."""
        self.deepspeed.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for arrays in batches:
            sums[0] += self._terms(arrays)["loss"].double()
            sums[1] += int((arrays["labels"] >= 0).sum())
        self.deepspeed.train()
        dist.all_reduce(sums)
        loss, count = sums.tolist()
        return (loss / count if count else float("nan")), int(count)

    def _terms(self, arrays: Mapping[str, NDArray[np.int64]]) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in arrays.items()}
        labels = tensors.pop("labels")
        return self._objective(self.deepspeed(**tensors).logits, labels)

    @torch.no_grad()
    def _add_penalties(self, penalty: Penalty, num_targets: int) -> dict[str, Tensor]:
        """Add the penalties' gradient to this rank's shards: element by element, so exact in every ZeRO stage."""
        scale = self.loss_scale
        sums: dict[str, Tensor] = {}
        for fragment, gradient, weight in zip(
            self.shards.fragments, self.shards.gradients(), self.shards.masters(), strict=True
        ):
            if not self._decays[fragment.parameter]:
                continue
            slope, values = penalty(weight)
            gradient.add_(slope.to(gradient.dtype), alpha=scale)
            if fragment.counted:
                for name, value in values.items():
                    # the terms are divided by the number of targets later on; a penalty is not a mean over them
                    value = value.double() * max(num_targets, 1)
                    sums[name] = sums[name] + value if name in sums else value
        return sums


def sum_of(terms: Mapping[str, Tensor]) -> Tensor:
    """The terms added up, in the order of their names' insertion."""
    values = iter(terms.values())
    total = next(values)
    for value in values:
        total = total + value
    return total


def seed_everything(seed: int, batch_index: int, first_sample: int, device: torch.device) -> None:
    """Seed torch from a place in the data: randomness is a function of position, no state to save.

    Seeds the CPU's generator and that of `device`. `torch.manual_seed` would also queue seeds, with stack traces, for
    every kind of accelerator that is not there: half a millisecond a call.
    """
    place = f"{seed} {batch_index} {first_sample}".encode()
    number = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
