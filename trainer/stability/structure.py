"""Early warning from what changes slowly: attention logits, output logits, embeddings, size of updates.

It only warns, since each of these is a sign and no fault: runs have gone well for long with any one of them. `diagnose`
names them as the likely cause once there is harm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from trainer.records import Structure

ATTENTION_LIMIT = 100.0
"""Of the bound of an attention logit. Kimi K2 holds the logits themselves below τ = 100 (QK-Clip,
https://arxiv.org/abs/2507.20534); Wortsman et al. (https://arxiv.org/abs/2309.14322) show that attention falls onto
single tokens, and runs diverge, as they keep growing. The bound max‖q‖·max‖k‖/√d exceeds the largest logit by a small
factor, so the warning comes before it."""
ATTENTION_GROWTH_FROM = 30.0
"""A steady growth is said from here on: below, attention is still being learned."""
OUTPUT_LIMIT = 100.0
"""Of the largest absolute output logit. Healthy models stay at some tens; at 128 neighbouring bf16 numbers are 1 apart,
which turns logits into noise (PaLM's and Wortsman's reason for the z-loss)."""
OUTPUT_GROWTH_FROM = 40.0
"""A steady growth is said from here on."""
GROWTH = 2.0
"""Over the last observations, to be a steady growth: exponential, unlike the slowing growth of a healthy run."""
GROWTH_OBSERVATIONS = 6
"""400 steps at one observation in 50, with the first."""
EMBEDDING_SHRINK = 0.5
"""Of its greatest norm: gradients of the layers behind grow inversely to the embeddings (Takase et al.,
https://arxiv.org/abs/2312.16903: spikes after embeddings shrank), which weight decay on them brings about."""
UPDATE_LIMIT = 0.1
"""‖update‖ / ‖weight‖ of a step. 1e-3 is usual (A. Karpathy's rule of thumb); our small runs at 4e-3 peak at 0.05 in
the warm-up. At 0.1 ten steps can replace a matrix."""
EASED = 0.8
"""A sign ends below this fraction of its limit, so that it does not flicker."""

Kind = Literal["attention", "attention growth", "output", "output growth", "embedding", "update"]


@dataclass(frozen=True, slots=True)
class Sign:
    """One thing that is not as it should be at present."""

    kind: Kind
    where: str
    value: float
    since_step: int

    @property
    def text(self) -> str:
        """A clause for a person."""
        value, since = f"{self.value:.3g}", f"since step {self.since_step}"
        match self.kind:
            case "attention":
                return f"attention logits of {self.where} may reach {value} (above {ATTENTION_LIMIT:g} {since})"
            case "attention growth":
                return f"attention logits of {self.where} keep growing, now up to {value} ({since})"
            case "output":
                return f"output logits reach {value} (above {OUTPUT_LIMIT:g} {since})"
            case "output growth":
                return f"output logits keep growing, now up to {value} ({since})"
            case "embedding":
                return f"{self.where} has shrunk to {self.value:.0%} of its greatest norm ({since})"
            case "update":
                return f"one step changes {self.where} by {self.value:.0%} of its norm ({since})"

    @property
    def cure(self) -> str:
        """What is likely to help."""
        return CURES[self.kind]


_ATTENTION_CURE = "normalise queries and keys (QK-norm), soft-cap the attention logits, or lower optim.lr"
_OUTPUT_CURE = "set objective.z_loss to 1e-4"
CURES: dict[Kind, str] = {
    "attention": _ATTENTION_CURE,
    "attention growth": _ATTENTION_CURE,
    "output": _OUTPUT_CURE,
    "output growth": _OUTPUT_CURE,
    "embedding": "do not decay embeddings (optim.decay_embeddings: false) and lengthen schedule.warmup",
    "update": "lower optim.lr, lengthen schedule.warmup or raise optim.eps",
}


class StructureWatch:
    """Says once what looks like the beginning of an instability, and again only after it eased.

    Args:
        parameter_names: in the order of `Structure.parameter_norms`.
    """

    def __init__(self, parameter_names: Sequence[str]) -> None:
        self._names = tuple(parameter_names)
        # biases start at zero, where any update is large beside them
        self._weights = np.array([not name.endswith("bias") for name in self._names], dtype=bool)
        self._embeddings = [i for i, name in enumerate(self._names) if is_embedding(name)]
        self._attention: list[list[float]] = []
        self._output: list[float] = []
        self._greatest: dict[str, float] = {}
        self._large_updates = 0
        self._signs: dict[Kind, Sign] = {}

    @property
    def signs(self) -> tuple[Sign, ...]:
        """What stands at present."""
        return tuple(self._signs.values())

    def observe(self, step: int, structure: Structure) -> list[str]:
        """The sentences that are new with this observation. Values that are not finite are passed over."""
        found = [
            *self._attention_signs(step, structure),
            *self._output_signs(step, structure),
            *self._weight_signs(step, structure),
        ]
        new = [sign for sign in found if sign.kind not in self._signs]
        for sign in found:
            before = self._signs.get(sign.kind)
            since = before.since_step if before else sign.since_step
            self._signs[sign.kind] = Sign(sign.kind, sign.where, sign.value, since)
        for kind in set(self._signs) - {sign.kind for sign in found}:
            del self._signs[kind]
        return [f"{sign.text}: {sign.cure}" for sign in new]

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "attention": [list(row) for row in self._attention],
            "output": list(self._output),
            "greatest": dict(self._greatest),
            "large_updates": self._large_updates,
            "signs": [[sign.kind, sign.where, sign.value, sign.since_step] for sign in self._signs.values()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._attention = [list(row) for row in state["attention"]]
        self._output = list(state["output"])
        self._greatest = dict(state["greatest"])
        self._large_updates = int(state["large_updates"])
        self._signs = {kind: Sign(kind, where, value, since) for kind, where, value, since in state["signs"]}

    def _attention_signs(self, step: int, structure: Structure) -> list[Sign]:
        row = structure.attention_logits
        if not row.size or not bool(np.isfinite(row).all()):
            return []
        if self._attention and len(self._attention[0]) != row.size:
            self._attention = []
        self._attention = [*self._attention[1 - GROWTH_OBSERVATIONS :], row.tolist()]
        worst = int(row.argmax())
        signs = []
        if row[worst] > self._limit("attention", ATTENTION_LIMIT):
            signs.append(Sign("attention", f"layer {worst}", float(row[worst]), step))
        growing = [
            layer
            for layer in range(row.size)
            if _grows([seen[layer] for seen in self._attention], ATTENTION_GROWTH_FROM)
        ]
        if growing:
            layer = max(growing, key=lambda i: float(row[i]))
            signs.append(Sign("attention growth", f"layer {layer}", float(row[layer]), step))
        return signs

    def _output_signs(self, step: int, structure: Structure) -> list[Sign]:
        value = structure.output_logits
        if not math.isfinite(value):
            return []
        self._output = [*self._output[1 - GROWTH_OBSERVATIONS :], value]
        signs = []
        if value > self._limit("output", OUTPUT_LIMIT):
            signs.append(Sign("output", "the output head", value, step))
        if _grows(self._output, OUTPUT_GROWTH_FROM):
            signs.append(Sign("output growth", "the output head", value, step))
        return signs

    def _weight_signs(self, step: int, structure: Structure) -> list[Sign]:
        signs = []
        norms = structure.parameter_norms
        shrunk = []
        for i in self._embeddings:
            name = self._names[i]
            if i < norms.size and math.isfinite(norms[i]) and norms[i] > 0:
                self._greatest[name] = max(float(norms[i]), self._greatest.get(name, 0.0))
                shrunk.append((float(norms[i]) / self._greatest[name], name))
        least = EMBEDDING_SHRINK / (EASED if "embedding" in self._signs else 1.0)
        if shrunk and min(shrunk)[0] < least:
            fraction, name = min(shrunk)
            signs.append(Sign("embedding", name, fraction, step))

        ratios = structure.update_ratios
        if ratios.size != len(self._names):
            return signs
        ratios = np.where(np.isfinite(ratios) & self._weights, ratios, 0.0)
        limit = self._limit("update", UPDATE_LIMIT)
        self._large_updates = self._large_updates + 1 if ratios.size and ratios.max() > limit else 0
        # a matrix that starts at zero is past it by the second observation
        if self._large_updates >= 2:
            worst = int(ratios.argmax())
            signs.append(Sign("update", self._names[worst], float(ratios[worst]), step))
        return signs

    def _limit(self, kind: Kind, limit: float) -> float:
        return limit * EASED if kind in self._signs else limit


def is_embedding(name: str) -> bool:
    """Whether a parameter's name is that of an embedding table, in the spellings of transformers."""
    return bool(re.search(r"embed|\bwte\b|\bwpe\b|word_embeddings", name)) and "norm" not in name.lower()


def _grows(values: list[float], least: float) -> bool:
    if len(values) < GROWTH_OBSERVATIONS or values[-1] < least or values[0] <= 0:
        return False
    rises = sum(later > earlier for earlier, later in pairwise(values))
    return values[-1] / values[0] > GROWTH and rises >= len(values) - 2
