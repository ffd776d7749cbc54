"""From an alarm to the likely cause and cure, in one or two sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from trainer.records import FloatArray, StepStats
from trainer.stability.norms import ParameterNorms
from trainer.stability.structure import StructureWatch, is_embedding
from trainer.stability.watch import Alarm

SUDDEN = 8.0
"""A parameter grew suddenly when its gradient is so many times the usual one, and …"""
APART = 4.0
"""… so many times as much as the median parameter's grew: else all grew alike, and none is named."""
SLOW = 2.0
"""A parameter grew slowly when its usual gradient is so many times that of a few hundred steps ago."""


def diagnose(
    alarms: Sequence[Alarm],
    norms: ParameterNorms,
    structure: StructureWatch,
    names: Sequence[str],
    *,
    stats: StepStats,
) -> str:
    """What grew, by how much, since when, and what is likely to cure it.

    Args:
        alarms: worst first; may be empty.
        names: of the parameters, in the order of `stats.parameter_norms`.
    """
    what = "; ".join(alarm.text for alarm in alarms)
    where, cure = _cause(alarms, norms, structure, names, stats)
    sentence = "; ".join(part for part in (what, where) if part)
    return f"{sentence[:1].upper()}{sentence[1:]}. Likely cure: {cure}" if sentence else f"Likely cure: {cure}"


def _cause(
    alarms: Sequence[Alarm],
    norms: ParameterNorms,
    structure: StructureWatch,
    names: Sequence[str],
    stats: StepStats,
) -> tuple[str, str]:
    broken = [name for name, norm in zip(names, stats.parameter_norms, strict=False) if not math.isfinite(norm)]
    if broken:
        return _broken(broken, names)
    signs = structure.signs
    if signs:
        return "; ".join(sign.text for sign in signs), "; ".join(dict.fromkeys(sign.cure for sign in signs))
    parts = [alarm.channel.partition(": ")[2] for alarm in alarms if ": " in alarm.channel]
    if "z_loss" in parts:
        return "the log-partition of the output grows", "raise objective.z_loss, or lower optim.lr"
    grown = _sudden(norms.usual(), names, stats.parameter_norms) or _slow(norms.growth(), names)
    if grown is not None:
        name, text = grown
        return text, _cure_of(name)
    if any(alarm.score < 0 for alarm in alarms):
        return (
            "no layer's gradient stands out",
            "look at the batch: a loss so low means repeated text, duplicates of what was seen, or labels in the input",
        )
    if any(alarm.kind == "drift" for alarm in alarms):
        return "no layer's gradient grew", "lower optim.lr, or look at a change in the data since then"
    return "no layer's gradient stands out", "look at the data of this batch and, if it comes again, at the hardware"


def _broken(broken: list[str], names: Sequence[str]) -> tuple[str, str]:
    layers = sorted({layer for name in broken if (layer := layer_of(name)) is not None})
    if len(broken) == len(names):
        return (
            "no parameter has a finite gradient",
            "the loss itself overflowed: look at the batch, lower optim.lr, or train in bf16 or fp32",
        )
    named = broken[0] if len(broken) == 1 else f"{len(broken)} of {len(names)} parameters, first {broken[0]}"
    if len(layers) == 1 and all(layer_of(name) == layers[0] for name in broken):
        cure = f"an overflow inside layer {layers[0]}, or a fault of the hardware if a replay is finite"
        return f"the gradient is not finite in {named}", cure
    return f"the gradient is not finite in {named}", "lower optim.lr, or train in bf16 or fp32"


def _sudden(usual: FloatArray, names: Sequence[str], now: FloatArray) -> tuple[str, str] | None:
    if usual.shape != now.shape or not usual.size:
        return None
    with np.errstate(over="ignore"):
        ratios = np.divide(now, usual, out=np.zeros_like(now), where=np.isfinite(usual) & (usual > 0))
    worst = int(ratios.argmax())
    median = float(np.median(ratios[ratios > 0])) if bool((ratios > 0).any()) else 0.0
    if ratios[worst] < SUDDEN or ratios[worst] < APART * median:
        return None
    return names[worst], f"the gradient of {names[worst]} is {ratios[worst]:.3g} times its usual norm"


def _slow(growth: FloatArray, names: Sequence[str]) -> tuple[str, str] | None:
    known = np.where(np.isfinite(growth), growth, 0.0)
    if not known.size or known.max() < SLOW:
        return None
    worst = int(known.argmax())
    return names[worst], f"the gradient of {names[worst]} grew {known[worst]:.3g}-fold over the last few hundred steps"


def _cure_of(name: str) -> str:
    if is_embedding(name):
        return "lengthen schedule.warmup or lower optim.lr; weight decay on the embeddings would make it worse"
    if "head" in name or "embed_out" in name:
        return "set objective.z_loss to 1e-4"
    if re.search(r"[qk]_proj|query|key|c_attn|qkv|Wqkv", name):
        return "normalise queries and keys (QK-norm), soft-cap the attention logits, or lower optim.lr"
    if "norm" in name.lower():
        return "lower optim.lr or raise optim.eps"
    return "lower optim.lr, or clip by tensor (optim.clipping: adagc)"


def layer_of(name: str) -> int | None:
    """The layer that a parameter's name tells, in the spellings of transformers."""
    found = re.search(r"\.(?:layers?|h|blocks?)\.(\d+)\.", f".{name}")
    return int(found.group(1)) if found else None
