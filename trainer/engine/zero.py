"""Drives DeepSpeed in three verbs: `accumulate` (nothing applied), `apply`, `discard`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.resolve import Arithmetic, Device, Precision, deepspeed_config
from trainer.config.schema import RunConfig
from trainer.engine.audit import Updates
from trainer.engine.average import Average
from trainer.engine.checksum import replica_checksum
from trainer.engine.gradients import Shards, make_shards
from trainer.engine.injection import Injector
from trainer.engine.local import LocalNorms
from trainer.engine.observe import LogitProbe, WeightStats, compare_weights
from trainer.engine.origin import FrozenParts, digest_of
from trainer.engine.own_time import OwnTime
from trainer.engine.penalties import Penalties, Penalty
from trainer.engine.ranks import Ranks
from trainer.engine.stats import Own, StepVector, loss_of
from trainer.records import Batch, Evaluation, FloatArray, ParameterFacts, StepStats, Structure
from trainer.terms import Objective, Terms

NO_INJECTION = Injector()

VOTE_EVERY_BATCHES = 8
"""Micro-batches of an evaluation between two votes on whether to give it up: a scheduler that asks a run to stop does
not wait for an evaluation of minutes."""


class Engine:
    """One model in training under DeepSpeed.

    Attributes:
        names: the trainable parameters, in the order in which every record lists them.
        shards: this rank's view of gradients and master weights.
        deepspeed: DeepSpeed's own engine.
        updates: what was applied since the state was last put in; the audit of snapshots judges by it.
        injector: puts faults in, where a drill asks for them.
        average: moving average of the weights; None: none is kept.
        origin: digest of the weights that the run comes back to at every start, frozen ones among them; "": of none.
        alive: called with every micro-batch: a sign of life for who waits for one.
        settle: waits until nobody reads the live state.
    """

    alive: Callable[[], None] = staticmethod(lambda: None)
    settle: Callable[[], object] = staticmethod(lambda: None)

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
        penalty: Penalty | None = None,
        penalties: Sequence[str] = (),
        injector: Injector = NO_INJECTION,
    ):
        import deepspeed

        self.injector = injector
        self.updates = Updates()
        self.names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        by_name = {parameter.name: parameter for parameter in parameters}
        decays = [by_name[name].decay for name in self.names]
        self._objective = objective
        self._parts = (*objective.parts, *penalties)
        self._numbers = numbers
        self._ranks = ranks
        self._seed = config.seed
        self.device = torch.device(device, ranks.local_rank) if device == "cuda" else torch.device("cpu")
        self._local = LocalNorms(injector)
        if config.guard.mode != "off" or injector.active:
            # before DeepSpeed's own hooks, which reduce the gradient
            self._local.watch([p for p in model.parameters() if p.requires_grad])
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, ranks.world_size, device, precision),
            dist_init_required=False,
        )
        self.stage: int = config.zero.stage
        self.shards: Shards = make_shards(self.deepspeed, self.names, self.stage, ranks.rank, ranks.world_size)
        self.average = None if config.optim.ema is None else Average(self.shards, config.optim.ema)
        begins = config.objective.l2_start > 0
        self.origin = digest_of(self.module, everything=begins)
        self._frozen = FrozenParts(self.module) if self.stage == 3 else None
        self._penalties = penalty and Penalties(self.shards, penalty, decays, keeps_starts=begins)
        terms = (*self._parts, *objective.measures)
        self._vector = StepVector(self.shards, len(self.names), terms, ranks.rank, ranks.world_size, self.device)
        self._logits = LogitProbe(self.module, self.device)
        self._seconds = 0.0
        self._own_time = OwnTime(device)
        self._parameter_norms: FloatArray = np.zeros(len(self.names))

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self.deepspeed.module
        return module

    @property
    def minimised(self) -> tuple[str, ...]:
        """Names of the parts of a compound loss; empty for a loss of one part."""
        names = self._objective.minimised
        return names if len(names) > 1 else ()

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by before the step (fp16); 1 otherwise."""
        return float(getattr(self.deepspeed.optimizer, "loss_scale", 1.0))

    def accumulate(
        self,
        batch: Batch,
        *,
        attempt: int,
        step: int,
        stop: bool = False,
        decision: int = 0,
        checksum: bool = False,
        impossible: int = 0,
    ) -> StepStats:
        """Forward and backward over all micro-batches of this rank, gradients reduced; nothing is applied.

        The gradient is that of Σ terms / `batch.num_targets` over the *global* batch, however targets are spread over
        ranks and micro-batches. Dropout is seeded by (seed, batch, place in the batch): a replay, a resume and a
        run without an excluded batch draw the same masks.

        Args:
            batch: this rank's micro-batches.
            attempt, step: for the record.
            stop: this rank was asked to stop; the votes come back in the stats.
            decision: digest of the previous decision, compared between ranks.
            checksum: let :meth:`replica_checksum` ride along.
            impossible: values in this rank's newest snapshot that training cannot have produced.
        """
        self._own_time.begin()
        self.injector.begin(attempt, step, batch.batch_index)
        own_checksum = self.replica_checksum() if checksum else 0.0
        self.deepspeed.train()
        self._local.clear()
        with self._logits.watching():
            sums = self._gradients(batch)
        if self._penalties is not None:
            sums |= self._penalties.add(self.loss_scale, batch.num_targets)
        self.injector.reduced(self)
        scale = self.loss_scale
        own = Own(
            self._seconds, self._local.squared(), self.injector.digest(decision), own_checksum, impossible=impossible
        )
        reduced = self._vector.reduce(sums, own, count=max(batch.num_targets, 1), loss_scale=scale, stop=stop)
        self._parameter_norms = reduced.parameter_norms
        self._seconds = self._own_time.end()
        return StepStats(
            attempt=attempt,
            batch_index=batch.batch_index,
            step=step,
            loss=reduced.loss,
            parts={name: reduced.terms[name] for name in self._parts},
            measures={name: reduced.terms[name] for name in self._objective.measures},
            num_targets=batch.num_targets,
            grad_norm=reduced.grad_norm,
            num_nonfinite=reduced.num_nonfinite,
            parameter_norms=reduced.parameter_norms,
            stop_votes=reduced.stop_votes,
            agree=reduced.agree,
            ranks=reduced.ranks,
            loss_scale=scale,
        )

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Forward and backward over the micro-batches; the sums of this rank's terms."""
        engine, last = self.deepspeed, len(batch.micro_batches) - 1
        # DeepSpeed divides by ranks and accumulation: this makes the whole a mean over the global batch
        denominator = max(batch.num_targets, 1) / (self._ranks.world_size * len(batch.micro_batches))
        sums: dict[str, Tensor] = {}
        for index, arrays in enumerate(self._seeded(batch)):
            with self._own_time.forward():
                terms = self._terms(arrays)
            engine.backward(terms.total / denominator)
            add(sums, terms.sums)
            add(sums, terms.measures)
            if index < last:
                engine.step()
        return sums

    def part_norms(self, batch: Batch) -> dict[str, float]:
        """L2 norm of the gradient of each part of a compound loss, as it enters the whole; empty for a loss of one
        part. One forward and backward pass a part; nothing is applied. A collective."""
        whole, norms = self._objective, dict[str, float]()
        self.deepspeed.train()
        try:
            for name in self.minimised:
                self._objective = whole.alone(name)
                sums = self._gradients(batch)
                own = Own(0.0, None, 0)
                count = max(batch.num_targets, 1)
                norms[name] = self._vector.reduce(
                    sums, own, count=count, loss_scale=self.loss_scale, stop=False
                ).grad_norm
                self.discard()
        finally:
            self._objective = whole
        return norms

    def apply(self, clip: float, lr: float, scales: Sequence[float] | None = None) -> bool:
        """Clip to the global norm `clip` (0: not at all), update with the rate `lr`.

        Args:
            scales: factor on each parameter's gradient; the global norm is that after scaling.

        Returns:
            False when DeepSpeed refused the step: the gradient is not finite (fp16: the loss scale was too high).
        """
        engine = self.deepspeed
        norms = self._parameter_norms
        if scales is not None:
            self.shards.scale(scales)
            norms = norms * np.asarray(scales)
        rate = self.injector.learning_rate(lr)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        engine._config.gradient_clipping = clip
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = clip
        engine.step()
        applied = bool(engine.was_step_applied())
        if applied:
            norm = math.sqrt(float(np.square(norms).sum()))
            self.updates.add(lr, min(norm, clip) if clip else norm)
            if self.average is not None:
                self.average.update()
            self.injector.updated(self)
        return applied

    def apply_measured(self, clip: float, lr: float, scales: Sequence[float] | None = None) -> tuple[bool, WeightStats]:
        """As :meth:`apply`, measuring weights and update; holds a copy of this rank's master weights meanwhile."""
        before = [flat.clone() for flat in self.shards.flats()]
        applied = self.apply(clip, lr, scales)
        return applied, compare_weights(self.shards, before, len(self.names), self.device)

    def observe_next(self) -> None:
        """Measure attention and output logits during the next :meth:`accumulate`; the bits stay what they are."""
        self._logits.arm()

    def structure(self, weights: WeightStats) -> Structure:
        """What was observed, with what :meth:`apply_measured` measured. A collective."""
        attention, output = self._logits.reduce()
        return Structure(attention, output, weights.parameter_norms, weights.update_ratios)

    def replica_checksum(self) -> float:
        """Of what all ranks hold alike, as it is on this rank: see :mod:`trainer.engine.checksum`."""
        own = self.average.flats if self.average is not None and self.stage == 0 else ()
        harm = 0 if self._frozen is None else self._frozen.harm()
        return replica_checksum(self.deepspeed, self.shards, self.stage, own, harm)

    def discard(self) -> None:
        """Drop the accumulated gradient: weights, optimizer and schedule stay as if the batch had not been seen."""
        self.shards.clear()
        self.deepspeed.micro_steps += 1

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Mapping[str, NDArray[Any]]], asked: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Mean loss and scores over all targets of all ranks, of the averaged weights where there are such. All ranks
        give equally many batches.

        Args:
            asked: whether this rank was asked to stop. Once one was, all of them give the evaluation up.

        Returns:
            None: it was given up.
        """
        with self.averaged():
            return self._evaluate(batches, asked)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the model computes with the moving average of its weights, where there is one. A collective."""
        return nullcontext() if self.average is None else self.average.in_place(self.settle)

    def _evaluate(self, batches: Iterable[Mapping[str, NDArray[Any]]], asked: Callable[[], bool]) -> Evaluation | None:
        self.deepspeed.eval()
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        votes = torch.zeros(1, device=self.device)
        for number, arrays in enumerate(batches, 1):
            tensors = self._tensors(arrays)
            add(sums, self._objective.evaluate(self.deepspeed, tensors))
            count += self._objective.targets(tensors).sum()
            if number % VOTE_EVERY_BATCHES == 0:
                votes.fill_(float(asked()))
                dist.all_reduce(votes)
                if votes.item() > 0:
                    self.deepspeed.train()
                    return None
        self.deepspeed.train()
        vector = torch.stack([*sums.values(), count])
        dist.all_reduce(vector)
        *values, total = vector.tolist()
        means = {name: value / total if total else math.nan for name, value in zip(sums, values, strict=True)}
        return Evaluation(loss=means.pop("loss"), num_targets=int(total), scores=means)

    @torch.no_grad()
    def probe(self, batch: Batch) -> float:
        """Mean main loss of a batch under the present weights, with the randomness that :meth:`accumulate` gives it:
        with unchanged weights its `StepStats.loss`. No gradient; nothing is changed. A collective."""
        self.deepspeed.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for arrays in self._seeded(batch):
            total += self._terms(arrays).sums["loss"].double()
        sums = torch.zeros(self._ranks.world_size, dtype=torch.float64, device=self.device)
        sums[self._ranks.rank] = total
        dist.all_reduce(sums)
        return loss_of(sums.cpu().numpy(), max(batch.num_targets, 1))

    @torch.no_grad()
    def sample_losses(self, batch: Batch) -> FloatArray:
        """Mean main loss of each sample of the global batch, in nats a target, [global_batch]: in the order of
        `batch.samples`, equal on all ranks; 0 where a sample has no target. Randomness as in :meth:`probe`. A
        collective."""
        self.deepspeed.train()
        losses = torch.zeros(self._numbers.samples, dtype=torch.float64, device=self.device)
        for index, arrays in enumerate(self._seeded(batch)):
            tensors = self._tensors(arrays)
            sums = self._objective.sample_losses(self.deepspeed, tensors).double()
            first = self._first_sample(index)
            losses[first : first + len(sums)] = sums / self._objective.targets(tensors).clamp(min=1)
        dist.all_reduce(losses)
        result: FloatArray = losses.cpu().numpy()
        return result

    def _first_sample(self, index: int) -> int:
        """Place in the global batch of the first sample of this rank's micro-batch."""
        return (index * self._ranks.world_size + self._ranks.rank) * self._numbers.micro

    def _seeded(self, batch: Batch) -> Iterator[Mapping[str, NDArray[Any]]]:
        """The micro-batches, torch seeded for each as it is handed out."""
        for index, arrays in enumerate(batch.micro_batches):
            seed_everything(self._seed, batch.batch_index, self._first_sample(index), self.device)
            yield arrays

    def _terms(self, arrays: Mapping[str, NDArray[Any]]) -> Terms:
        return self._objective(self.deepspeed, self._tensors(arrays), self._logits.see_output)

    def _tensors(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        self.alive()
        return {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in arrays.items()}


def add(sums: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    """Add the terms to the sums of their names, in double precision."""
    for name, value in terms.items():
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value


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
