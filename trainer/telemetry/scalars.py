"""From ledger records to the curves of TensorBoard: tags, and their values. Groups and tags are sorted by name there:
the numbers put what matters first.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from trainer.records import FloatArray
from trainer.telemetry.ledger import Record
from trainer.telemetry.names import group_by_layer, group_by_part

LOSS = "1 stability/loss"
GRADIENT_NORM = "1 stability/gradient norm"
CLIP = "1 stability/gradient norm: limit"
NONFINITE = "1 stability/non-finite gradient elements"
SKIPPED = "1 stability/skipped attempts"
CLIPPED = "1 stability/updates clipped"
CLIP_RATE = "1 stability/updates clipped: share of the last 100"
INCIDENT = "1 stability/incident"
ROLLBACKS = "1 stability/rollbacks"
QUARANTINED = "1 stability/quarantined batches"
SCORE = "1 stability/spike score"
LOSS_SCALE = "1 stability/fp16 loss scale"
HELD_OUT_LOSS = "2 held-out/loss"
HELD_OUT = "2 held-out"
MEASURE = "2 distillation"
PART_NORMS = "3 gradients by part of the loss"
BY_LAYER = "3 gradients by layer"
BY_PART = "3 gradients by part"
HEAT = "3 gradients by layer and step"
WEIGHT_NORMS = "4 weight norms"
UPDATE_RATIOS = "4 update-to-weight ratios"
ATTENTION_LOGITS = "4 largest attention logits"
OUTPUT_LOGITS = "4 largest output logit/all"
TOKENS_PER_SECOND = "5 throughput/tokens per second"
FLOP_UTILISATION = "5 throughput/FLOP utilisation"
SECONDS = "5 throughput/seconds of a step"
SECONDS_DATA = "5 throughput/seconds of a step: waiting for data"
MEMORY = "5 throughput/memory in GiB"
SECONDS_EVALUATION = "5 throughput/seconds of an evaluation"
SECONDS_CHECKPOINT = "5 throughput/seconds that a checkpoint blocks"
SECONDS_WRITTEN = "5 throughput/seconds until a checkpoint is whole"
SECONDS_SNAPSHOT = "5 throughput/seconds that a snapshot blocks"
GOODPUT = "5 throughput/goodput"
SHARE = "5 throughput/share of the time allocated"
LEARNING_RATE = "6 schedule/learning rate"
EPOCH = "6 schedule/epoch"
BATCH = "6 schedule/batch"


def _exactly(*tags: str) -> list[str]:
    return [f"{re.escape(tag)}$" for tag in tags]


def _all_of(group: str) -> list[str]:
    return [f"{re.escape(group)}/"]


LAYOUT = {
    "stability": {
        "loss and held-out loss": _exactly(LOSS, HELD_OUT_LOSS),
        "gradient norm and its limit": _exactly(GRADIENT_NORM, CLIP),
        "spike score of each channel": [f"{re.escape(SCORE)}: "],
        "incidents": _exactly(INCIDENT),
        "gradient norm of each layer": _all_of(BY_LAYER),
        "gradient norm of each part": _all_of(BY_PART),
        "update-to-weight ratio of each layer": _all_of(UPDATE_RATIOS),
        "weight norm of each layer": _all_of(WEIGHT_NORMS),
        "largest attention logit of each layer": _all_of(ATTENTION_LOGITS),
    },
    "throughput": {
        "tokens per second": _exactly(TOKENS_PER_SECOND),
        "seconds of a step, and of it waiting for data": _exactly(SECONDS, SECONDS_DATA),
        "goodput": _exactly(GOODPUT),
        "shares of the time allocated": [f"{re.escape(SHARE)}: "],
        "learning rate": _exactly(LEARNING_RATE),
    },
}
COMPOUND_LAYOUT = {
    "parts of the loss": {
        "parts of the loss": [f"{re.escape(LOSS)}(: |$)"],
        "gradient norm of each part": _all_of(PART_NORMS),
    }
}
"""What a run with a compound loss has besides."""
_GIB = 1 << 30
_CLIP_WINDOW = 100


class _Groups:
    """Parameters by label, and the norm of each group from the norms of its members."""

    def __init__(self, members: Mapping[str, Sequence[int]]):
        self._labels = list(members)
        self._group_of = np.zeros(sum(map(len, members.values())), dtype=np.intp)
        for group, indices in enumerate(members.values()):
            self._group_of[list(indices)] = group

    def norms(self, prefix: str, norms: FloatArray) -> dict[str, float]:
        """L2 norm of each group, by tag; `norms` is [parameters]. A NaN or infinite member shows in its group only."""
        with np.errstate(over="ignore"):
            squares = np.bincount(self._group_of, weights=np.square(norms), minlength=len(self._labels))
        return {f"{prefix}{label}": value for label, value in zip(self._labels, np.sqrt(squares).tolist(), strict=True)}


class Scalars:
    """The values of records by tag. It remembers what the tags need: the parameters' places, and who was clipped."""

    def __init__(self) -> None:
        self._layers = _Groups({})
        self._parts = _Groups({})
        self._clipped: deque[tuple[int, bool]] = deque(maxlen=_CLIP_WINDOW)

    def start(self, parameter_names: Sequence[str], step: int) -> None:
        """A start of the run that goes on after `step`."""
        names = list(parameter_names)
        self._layers, self._parts = _Groups(group_by_layer(names)), _Groups(group_by_part(names))
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forgets the updates after `step`."""
        while self._clipped and self._clipped[-1][0] > step:
            self._clipped.pop()

    def layer_norms(self, record: Record) -> dict[str, float]:
        """Gradient norm by layer; empty where the record has no norms."""
        if "parameter_norms" not in record:
            return {}
        return self._layers.norms("", np.asarray(record["parameter_norms"], dtype=np.float64))

    def seen(self, record: Record) -> dict[str, float]:
        """What an attempt showed before the verdict, applied or not."""
        values = {LOSS: record["loss"], GRADIENT_NORM: record["grad_norm"], NONFINITE: record["nonfinite"]}
        values |= {f"{LOSS}: {name}": value for name, value in record["parts"].items()}
        values |= {f"{MEASURE}/{name.replace('_', ' ')}": value for name, value in record.get("measures", {}).items()}
        values |= {f"{SCORE}: {name}": value for name, value in record.get("scores", {}).items()}
        if "parameter_norms" in record:
            norms = np.asarray(record["parameter_norms"], dtype=np.float64)
            values |= self._layers.norms(f"{BY_LAYER}/", norms) | self._parts.norms(f"{BY_PART}/", norms)
        return values

    def done(self, record: Record) -> dict[str, float]:
        """What came of an applied attempt."""
        values: dict[str, float] = {}
        if record["clip"] or record["clipped"]:
            self._clipped.append((record["step"], record["clipped"]))
            rate = sum(clipped for _, clipped in self._clipped) / len(self._clipped)
            values |= {CLIPPED: record["num_clipped"], CLIP_RATE: rate}
        if record["clip"]:
            values[CLIP] = record["clip"]
        if record["loss_scale"] != 1:
            values[LOSS_SCALE] = record["loss_scale"]
        if record["flop_utilisation"] is not None:
            values[FLOP_UTILISATION] = record["flop_utilisation"]
        return values | {
            SKIPPED: record["num_skipped"],
            ROLLBACKS: record.get("num_rollbacks", 0),
            QUARANTINED: record.get("num_quarantined", 0),
            TOKENS_PER_SECOND: record["tokens_per_second"],
            SECONDS: record["seconds"],
            SECONDS_DATA: record["seconds_data"],
            MEMORY: record["memory_bytes"] / _GIB,
            LEARNING_RATE: record["lr"],
            EPOCH: record["epoch"],
            BATCH: record["batch"],
        }

    def structure(self, record: Record) -> dict[str, float]:
        """Norms of weights, of their updates over them, and the largest logits."""
        norms = np.asarray(record["parameter_norms"], dtype=np.float64)
        changes = np.asarray(record["update_ratios"], dtype=np.float64) * norms
        weights = self._layers.norms(f"{WEIGHT_NORMS}/", norms)
        updates = self._layers.norms(f"{UPDATE_RATIOS}/", changes)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.array(list(updates.values())) / np.array(list(weights.values()))
        values = weights | dict(zip(updates, ratios.tolist(), strict=True))
        attention = record.get("attention_logits", [])
        width = max(2, len(str(len(attention) - 1)))
        values |= {f"{ATTENTION_LOGITS}/layer {layer:0{width}}": value for layer, value in enumerate(attention)}
        if math.isfinite(record.get("output_logits", math.nan)):
            values[OUTPUT_LOGITS] = record["output_logits"]
        return values

    def evaluation(self, record: Record) -> dict[str, float]:
        """Held-out loss and scores."""
        scores = {f"{HELD_OUT}/{name}": value for name, value in record.get("scores", {}).items()}
        return scores | {HELD_OUT_LOSS: record["loss"], SECONDS_EVALUATION: record["seconds"]}

    def part_norms(self, record: Record) -> dict[str, float]:
        """Gradient norm of each part of the loss."""
        return {f"{PART_NORMS}/{name}": value for name, value in record["norms"].items()}

    def goodput(self, record: Record) -> dict[str, float]:
        """Goodput since the run's beginning, and the share of each part in the time allocated."""
        allocated = record["allocated"]
        shares = {name.replace("_", " "): seconds for name, seconds in record["parts"].items()}
        return {GOODPUT: record["fraction"]} | {
            f"{SHARE}: {name}": seconds / allocated if allocated else 0.0 for name, seconds in shares.items()
        }
