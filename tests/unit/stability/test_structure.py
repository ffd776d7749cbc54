"""Early warnings: said once, with their cure, until they eased."""

import json
import math
from typing import Any

import numpy as np
import pytest

from trainer.records import Structure
from trainer.stability.structure import GROWTH_OBSERVATIONS, StructureWatch, is_embedding

NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias")


def structure(**changes: Any) -> Structure:
    values: dict[str, Any] = {
        "attention_logits": np.array([8.0, 9.0]),
        "output_logits": 15.0,
        "parameter_norms": np.array([30.0, 5.0, 0.1]),
        "update_ratios": np.array([1e-3, 2e-3, 0.5]),
    }
    return Structure(**{**values, **changes})


def test_a_healthy_run_warns_of_nothing() -> None:
    watch = StructureWatch(NAMES)
    for i in range(40):
        # grows, but ever more slowly
        logits = 20.0 * (1 - math.exp(-i / 10)) + 1
        assert watch.observe(50 * i, structure(attention_logits=np.array([logits, 2.0]), output_logits=logits)) == []
    assert watch.signs == ()


def test_a_warning_is_said_once_and_again_after_it_eased() -> None:
    watch = StructureWatch(NAMES)
    high, between, low = (structure(attention_logits=np.array([9.0, x])) for x in (140.0, 90.0, 70.0))
    (said,) = watch.observe(50, high)
    assert "attention logits of layer 1 may reach 140" in said
    assert "QK-norm" in said
    assert watch.observe(100, high) == watch.observe(150, between) == []
    assert [(sign.kind, sign.value, sign.since_step) for sign in watch.signs] == [("attention", 90.0, 50)]
    assert watch.observe(200, low) == []
    assert watch.signs == ()
    assert len(watch.observe(250, high)) == 1


@pytest.mark.parametrize("field", ["attention_logits", "output_logits"])
def test_steady_growth_is_said_before_the_limit(field: str) -> None:
    watch = StructureWatch(NAMES)
    said = []
    for i in range(GROWTH_OBSERVATIONS + 4):
        value = 10.0 * 1.25**i
        said += watch.observe(50 * i, structure(**{field: np.array([1.0, value]) if "att" in field else value}))
    assert "keep growing" in said[0]
    assert "(above 100" not in said[0]


def test_values_that_jump_about_are_no_growth() -> None:
    watch = StructureWatch(NAMES)
    for i, value in enumerate([10.0, 60.0, 20.0, 50.0, 15.0, 90.0] * 2):
        assert watch.observe(50 * i, structure(output_logits=value)) == []


def test_output_logits_cure_is_the_z_loss() -> None:
    (said,) = StructureWatch(NAMES).observe(50, structure(output_logits=120.0))
    assert "output logits reach 120" in said
    assert "objective.z_loss" in said


def test_an_embedding_that_shrank_is_named() -> None:
    watch = StructureWatch(NAMES)
    watch.observe(50, structure())
    (said,) = watch.observe(100, structure(parameter_norms=np.array([12.0, 5.0, 0.1])))
    assert "model.embed_tokens.weight has shrunk to 40%" in said


def test_large_updates_are_said_at_the_second_observation_and_not_of_biases() -> None:
    watch = StructureWatch(NAMES)
    large = structure(update_ratios=np.array([1e-3, 0.3, 2.0]))
    assert watch.observe(50, large) == []
    (said,) = watch.observe(100, large)
    assert "changes model.layers.0.self_attn.q_proj.weight by 30%" in said
    assert "optim.lr" in said


def test_what_is_missing_or_not_finite_is_passed_over() -> None:
    watch = StructureWatch(NAMES)
    none = np.zeros(0)
    nan = np.array([math.nan, math.nan, math.nan])
    assert watch.observe(1, structure(attention_logits=none, output_logits=math.nan, update_ratios=none)) == []
    assert watch.observe(2, structure(attention_logits=nan, parameter_norms=nan, update_ratios=nan)) == []
    assert watch.observe(3, structure(parameter_norms=none)) == []


def test_a_restored_watch_says_the_same() -> None:
    watch, copy = StructureWatch(NAMES), StructureWatch(NAMES)
    values = [10.0 * 1.2**i for i in range(20)]
    for i, value in enumerate(values[:10]):
        watch.observe(50 * i, structure(output_logits=value))
    copy.restore(json.loads(json.dumps(watch.state(), allow_nan=False)))
    for i, value in enumerate(values[10:], 10):
        seen = structure(output_logits=value, update_ratios=np.array([0.2, 0.2, 0.0]))
        assert copy.observe(50 * i, seen) == watch.observe(50 * i, seen)
        assert copy.signs == watch.signs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("bert.embeddings.word_embeddings.weight", True),
        ("bert.embeddings.LayerNorm.weight", False),
        ("model.layers.0.mlp.up_proj.weight", False),
    ],
)
def test_embeddings_are_told_by_name(name: str, expected: bool) -> None:
    assert is_embedding(name) is expected
