"""The diagnosis names what grew and what is likely to help."""

import math
from typing import Any

import numpy as np
import pytest

from trainer.records import StepStats, Structure
from trainer.stability.diagnosis import diagnose, layer_of
from trainer.stability.norms import ParameterNorms
from trainer.stability.structure import StructureWatch
from trainer.stability.watch import Alarm

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
)
SPIKE = Alarm("loss", "spike", 7.91, 5.02, 14.2, 300)
DRIFT = Alarm("loss", "drift", 4.4, 4.0, 13.0, 270)


def stats(norms: Any) -> StepStats:
    return StepStats(
        attempt=300,
        batch_index=299,
        step=300,
        loss=7.91,
        parts={},
        num_targets=10,
        grad_norm=1.0,
        num_nonfinite=0,
        parameter_norms=np.asarray(norms, dtype=np.float64),
    )


def known(last: Any = None) -> ParameterNorms:
    norms = ParameterNorms(5)
    for _ in range(300):
        norms.accept(np.ones(5))
    for i in range(80 if last is not None else 0):
        norms.accept(np.ones(5) + (np.asarray(last) - 1) * i / 80)
    return norms


def tell(
    now: Any, alarms: Any = (SPIKE,), norms: ParameterNorms | None = None, watch: StructureWatch | None = None
) -> str:
    return diagnose(alarms, norms or known(), watch or StructureWatch(NAMES), NAMES, stats=stats(now))


def test_a_layer_whose_gradient_jumped_is_named_with_its_cure() -> None:
    text = tell([1, 1, 40, 1, 1])
    assert text.startswith("The loss 7.91 is 14 σ above the usual 5.02; ")
    assert "the gradient of model.layers.1.self_attn.q_proj.weight is 40 times its usual norm" in text
    assert "QK-norm" in text


@pytest.mark.parametrize(
    ("parameter", "cure"),
    [(0, "schedule.warmup"), (3, "optim.clipping: adagc"), (4, "objective.z_loss")],
)
def test_the_cure_fits_the_parameter(parameter: int, cure: str) -> None:
    now = np.ones(5)
    now[parameter] = 100
    assert cure in tell(now)


def test_a_slow_growth_is_told_from_the_averages() -> None:
    text = tell([1, 1, 1, 6, 1], (DRIFT,), known([1, 1, 1, 6, 1]))
    assert "since step 270" in text
    assert "the gradient of model.layers.1.mlp.up_proj.weight grew" in text


def test_the_layer_with_a_broken_gradient_is_named() -> None:
    alarm = Alarm("gradient norm", "nonfinite", math.nan, 1.0, math.inf, 300)
    assert "overflow inside layer 1" in tell([1, 1, math.nan, math.inf, 1], (alarm,))
    assert "no parameter has a finite gradient" in tell([math.nan] * 5, (alarm,))
    assert "not finite in 2 of 5 parameters, first model.embed_tokens.weight" in tell([math.nan, 1, 1, 1, math.nan])


def test_a_sign_that_stands_is_the_cause() -> None:
    watch = StructureWatch(NAMES)
    ones = np.ones(5)
    watch.observe(250, Structure(np.array([10.0, 180.0]), 10.0, ones, ones * 1e-3))
    text = tell([1, 1, 40, 1, 1], watch=watch)
    assert "attention logits of layer 1 may reach 180 (above 100 since step 250)" in text
    assert "QK-norm" in text


def test_nothing_grew() -> None:
    assert "no layer's gradient stands out" in tell(np.ones(5))
    assert "hardware" in tell(np.ones(5))
    assert "no layer's gradient stands out" in tell(np.full(5, 50.0)), "all grew alike"
    assert "optim.lr" in tell(np.ones(5), (DRIFT,))
    low = Alarm("loss", "spike", 0.3, 3.0, -40.0, 300)
    assert "repeated text" in tell(np.ones(5), (low,))
    assert "objective.z_loss" in tell(np.ones(5), (Alarm("loss: z_loss", "drift", 0.5, 0.1, 13.0, 280),))


def test_it_says_something_of_nothing() -> None:
    empty = diagnose((), ParameterNorms(0), StructureWatch(()), (), stats=stats([]))
    assert "Likely cure: " in empty


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("transformer.h.3.attn.c_attn.weight", 3),
        ("bert.encoder.layer.0.output.dense.weight", 0),
        ("lm_head.weight", None),
    ],
)
def test_layers_are_told_by_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer
