"""Adversarial training: the loss is also made small where embeddings, moved within a ball, make it large."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from trainer.config.objective import AdversarialConfig, ObjectiveConfig
from trainer.objectives.mixup import Mixup
from trainer.records import DRAWS, PARTNER
from trainer.terms import Model, Objective, See, Terms

HALF_SCALE = 256.0
"""What the loss is multiplied by before a direction is sought in fp16, so that small slopes do not vanish. Not the loss
scale of the training, on which nothing here depends; a power of two changes no bit of a direction."""


class Embeddings(Protocol):
    """The input embeddings of the model that is trained."""

    @property
    def sharded(self) -> bool:
        """No graph can be gone through twice."""
        ...

    def moved(self, delta: Tensor | None) -> AbstractContextManager[Sequence[Tensor]]:
        """Within it, embeddings [B, L, H] are moved by `delta`; what the model went on with, with its gradient."""
        ...


class Adversarial:
    """An objective beside itself at moved embeddings.

    `fgm` (Miyato et al. 2017, https://arxiv.org/abs/1605.07725) and `pgd` (Madry et al. 2018,
    https://arxiv.org/abs/1706.06083): L(x) + weight · L(x + δ), δ from one step along the gradient or from several.
    `freelb` (Zhu et al. 2020, https://arxiv.org/abs/1909.11764, algorithm 1): (1/K) Σ L(x + δₜ) from a random start.
    L is the whole total of `objective`. Each δ is a constant for the gradient of the parameters. Norms and projections
    are of each sample, over its tokens that are not padding.

    All passes of one call draw the same dropout masks (§3.3 of FreeLB).

    Args:
        objective: what is minimised; `loss` and its other parts are recorded where nothing is moved.
    """

    def __init__(self, objective: Objective, config: AdversarialConfig):
        self._objective = objective
        self._config = config
        self._free = config.kind == "freelb"
        self._steps = 1 if config.kind == "fgm" else config.steps
        self._length = config.step or (config.epsilon if config.kind == "fgm" else 1.5 * config.epsilon / config.steps)
        self._module: Model | None = None
        self._embeddings: Embeddings | None = None
        self._only: str | None = None
        self.parts = (*objective.parts, "adversarial")
        self.minimised = ("adversarial",) if self._free else (*objective.minimised, "adversarial")
        self.measures = objective.measures

    def attach(self, module: Model, embeddings: Embeddings) -> None:
        """Say what is trained, before the first call.

        Args:
            module: the model itself, without DeepSpeed's engine around it, whose hooks take every backward pass for
                one that is to be applied.
            embeddings: of it.
        """
        self._module, self._embeddings = module, embeddings
        if isinstance(self._objective, Mixup):
            self._objective.attach(embeddings)  # type: ignore[arg-type]

    def alone(self, name: str) -> Adversarial:
        result = copy.copy(self)
        result._only = name
        return result

    def __call__(self, model: Model, tensors: Mapping[str, Tensor], see: See) -> Terms:
        assert self._module is not None
        arrays = _without_draws(tensors)
        if self._only not in (None, "adversarial") or not torch.is_grad_enabled():
            # without gradients nothing is moved: a loss that is only to be known is the clean one
            plain = self._objective if self._only in (None, "adversarial") else self._objective.alone(self._only)
            terms = plain(model, arrays, see)
            return Terms(terms.total, {**terms.sums, "adversarial": terms.total.new_zeros(())}, terms.measures)
        passes = _Passes(self, arrays)
        return self._along(model, tensors, passes, see) if self._free else self._beside(model, passes, see)

    def _beside(self, model: Model, passes: _Passes, see: See) -> Terms:
        """FGM and PGD. Graphs that are held: two, and a third while PGD goes on from its first step."""
        clean, delta = passes.run(passes.module, None, see), None
        for step in range(self._steps):
            graph = clean if step == 0 else None
            delta = self._ascended(delta, passes.slope(delta, graph))
        moved = self._config.weight * passes.run(model, delta).total
        total = moved if self._only else clean.total + moved
        return Terms(total, {**clean.sums, "adversarial": moved}, clean.measures)

    def _along(self, model: Model, tensors: Mapping[str, Tensor], passes: _Passes, see: See) -> Terms:
        """FreeLB. The mean of the losses has K graphs, held until the one backward pass."""
        with torch.no_grad():
            clean = passes.run(passes.module, None, see)
        delta = self._start(tensors, passes)
        losses: list[Tensor] = []
        for step in range(self._steps):
            last = step == self._steps - 1
            terms = passes.run(model if last else passes.module, delta)
            losses.append(terms.total)
            if not last:
                delta = self._ascended(delta, passes.slope(delta, terms))
        total = torch.stack(losses).mean()
        return Terms(total, {**clean.sums, "adversarial": total}, clean.measures)

    def _start(self, tensors: Mapping[str, Tensor], passes: _Passes) -> Tensor:
        """δ₀ ~ U(−ε, ε) / √N of the N numbers of a sample's tokens: a function of its draw key alone."""
        if DRAWS not in tensors:
            raise ValueError(f"FreeLB starts at random and needs `{DRAWS}` beside the inputs")
        (width,) = passes.shape[2:]
        delta = torch.zeros(passes.shape)
        tokens = passes.tokens.cpu()
        generator = torch.Generator()
        for row, number in enumerate(tensors[DRAWS].tolist()):
            places = tokens[row]
            drawn = torch.rand(int(places.sum()), width, generator=generator.manual_seed(number))
            delta[row, places] = drawn.mul_(2).sub_(1).mul_(self._config.epsilon / max(drawn.numel(), 1) ** 0.5)
        return delta.to(passes.tokens.device)

    def _ascended(self, delta: Tensor | None, slope: Tensor) -> Tensor:
        """Π(δ + step · g/‖g‖): the step of §3.1 of FreeLB, within the ball."""
        step = self._length * unit(slope)
        return within_ball(step if delta is None else delta + step, self._config.epsilon)

    def targets(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._objective.targets(_without_draws(tensors))

    def evaluate(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._objective.evaluate(model, _without_draws(tensors))

    def predict(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._objective.predict(model, _without_draws(tensors))

    def sample_losses(self, model: Model, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._objective.sample_losses(model, _without_draws(tensors))


class _Passes:
    """The passes of one call: the same samples, the same dropout, embeddings moved."""

    def __init__(self, whole: Adversarial, tensors: Mapping[str, Tensor]):
        assert whole._module is not None
        assert whole._embeddings is not None
        self.module, self._embeddings = whole._module, whole._embeddings
        self._objective, self._tensors = whole._objective, tensors
        self.tokens = real_tokens(tensors)
        self._randomness = _Randomness(self.tokens.device)
        self._seen: Sequence[Tensor] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, L, H] of the embeddings, once a pass was made."""
        return (*self.tokens.shape, self._seen[0].shape[-1])

    def run(self, model: Model, delta: Tensor | None, see: See = lambda _: None) -> Terms:
        """The terms at x + δ."""
        self._randomness.rewind()
        with self._embeddings.moved(delta) as self._seen:
            return self._objective(model, self._tensors, see)

    def slope(self, delta: Tensor | None, graph: Terms | None) -> Tensor:
        """d total / d δ at δ, [B, L, H] in fp32 (fp64 where the embeddings are): 0 at padding.

        Args:
            graph: of the pass that was just made at δ, which a backward pass is still to go through.
        """
        again = graph is None or self._embeddings.sharded
        total = self.run(self.module, delta).total if graph is None or again else graph.total
        if self._seen[0].dtype == torch.float16:
            total = total * HALF_SCALE
        slopes = torch.autograd.grad(total, list(self._seen), retain_graph=not again)
        dtype = torch.promote_types(slopes[0].dtype, torch.float32)
        # an objective may send its samples through the model more than once, at once or one after the other
        slope = torch.cat([each.to(dtype) for each in slopes]).view(-1, *self.shape).sum(0)
        return slope.where(self.tokens[..., None], 0.0)


class _Randomness:
    """Torch's random numbers, of the CPU and of one device, from here on again and again."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def wrap(objective: Objective, config: ObjectiveConfig) -> Objective:
    """`objective` with the adversarial training that `config` asks for; itself where it asks for none."""
    return objective if config.adversarial is None else Adversarial(objective, config.adversarial)


def real_tokens(tensors: Mapping[str, Tensor]) -> Tensor:
    """Which places hold a token and no padding, [B, L] bool; of mixed samples, a token of either."""
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    partner = tensors.get(PARTNER + "attention_mask")
    return mask != 0 if partner is None else (mask != 0) | (partner != 0)


def unit(slope: Tensor) -> Tensor:
    """Each sample of [B, L, H] divided by its L2 norm; 0 where it is 0. Neither over- nor underflows on the way."""
    largest = slope.abs().amax(dim=(1, 2), keepdim=True)
    tiny = torch.finfo(slope.dtype).tiny
    slope = slope / largest.clamp_min(tiny)
    return slope / _norms(slope).clamp_min(tiny)


def within_ball(delta: Tensor, radius: float) -> Tensor:
    """The nearest point of the ball of each sample of [B, L, H]; what lies inside stays, to the bit."""
    norms = _norms(delta)
    inside: Tensor = delta.where(norms <= radius, delta * (radius / norms))
    return inside


def _norms(states: Tensor) -> Tensor:
    """L2 norm of each sample of [B, L, H], [B, 1, 1]."""
    norms: Tensor = torch.linalg.vector_norm(states, dim=(1, 2), keepdim=True)
    return norms


def _without_draws(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != DRAWS}
