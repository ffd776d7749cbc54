"""The rules of other trainers do what the originals do, their weaknesses included (benchmarks/rules.py)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def rules() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("rules")


def steady(step: int) -> float:
    """Around 1, standard deviation 0.1."""
    return 1 + 0.1 * (-1) ** step


def test_skip_step_is_blind_at_first_masked_by_spikes_and_deaf_after_nan(rules: ModuleType) -> None:
    early = rules.SkipStep()
    assert [early.judge(100.0 if step == 61 else steady(step), 1.0) for step in range(62)] == ["apply"] * 62

    rule = rules.SkipStep()
    verdicts = [rule.judge(steady(step), steady(step)) for step in range(200)]
    assert set(verdicts) == {"apply"}
    assert rule.judge(1.0, 1.5) == "apply"
    assert rule.judge(1.0, 1.8) == "skip"
    assert rule.judge(9.0, 1.0) == "skip"
    # the spike is in the window now: half as high passes
    assert rule.judge(4.5, 1.0) == "apply"
    assert rule.judge(math.nan, 1.0) == "skip"
    assert {rule.judge(1.0, 1.0) for _ in range(128)} == {"skip"}
    assert rule.judge(1.0, 1.0) == "apply"


def test_kill_loss_spike_stops_at_the_fifth_outlier_in_a_row(rules: ModuleType) -> None:
    rule = rules.KillLossSpike(total_steps=1000)
    assert {rule.judge(2.0, 1.0) for _ in range(100)} == {"apply"}
    assert [rule.judge(loss, 1.0) for loss in (5.0, 5.0, 5.0, 5.0, 2.0)] == ["apply"] * 5
    assert [rule.judge(6.0, 1.0) for _ in range(5)] == ["apply"] * 4 + ["stop"]
    # not a number resets the count
    nan = rules.KillLossSpike(total_steps=1000)
    assert {nan.judge(loss, 1.0) for loss in [2.0] * 100 + [6.0] * 4 + [math.nan] * 9} == {"apply"}


def test_kill_loss_spike_stops_where_half_a_window_is_above_the_first_one(rules: ModuleType) -> None:
    rule = rules.KillLossSpike(total_steps=4000)
    assert {rule.judge(2.0, 1.0) for _ in range(200)} == {"apply"}
    assert [rule.judge(3.0, 1.0) for _ in range(201)].index("stop") == 199


def test_spike_detection_asks_for_three_times_the_mean_of_ten(rules: ModuleType) -> None:
    rule = rules.SpikeDetection()
    assert rule.judge(50.0, 1.0) == "apply"
    assert {rule.judge(2.0, 1.0) for _ in range(10)} == {"apply"}
    assert rule.judge(5.9, 1.0) == "apply"
    assert rule.judge(7.2, 1.0) == "stop"
    assert rule.judge(2.0, math.nan) == "apply"
    assert rule.judge(math.inf, 1.0) == "stop"


def test_the_rerun_state_machine_applies_what_it_noticed(rules: ModuleType) -> None:
    rule = rules.RerunStateMachine()
    assert rule.judge(11.0, 3.0) == "apply"
    for _ in range(99):
        rule.judge(2.0, 1.0)
    assert (rule.judge(109.0, 29.0), rule.alarmed) == ("apply", False)
    assert (rule.judge(2.0, 30.0), rule.alarmed) == ("apply", True)
    assert (rule.judge(math.nan, 1.0), rule.alarmed) == ("stop", True)


def test_zclip_by_hand(rules: ModuleType) -> None:
    rule = rules.ZClip(max_norm=100.0)
    for step in range(25):
        assert rule.judge(1.0, 1.0 + 0.1 * (step % 2)) == "apply"
        assert rule.clip(1.0) == 100.0
    mean = 1 + 0.1 * 12 / 25
    deviation = math.sqrt((13 * (1.0 - mean) ** 2 + 12 * (1.1 - mean) ** 2) / 25)
    rule.judge(1.0, 5.0)
    score = (5.0 - mean) / (deviation + 1e-6)
    assert rule.clip(5.0) == pytest.approx(mean + 2.5 * deviation / (score / 2.5))
    assert rule.alarmed
    rule.judge(1.0, 1.0)
    assert (rule.clip(1.0), rule.alarmed) == (100.0, False)
    # one value that is not a number, and it never clips again
    rule.judge(1.0, math.nan)
    rule.judge(1.0, 1e9)
    assert (rule.clip(1e9), rule.alarmed) == (100.0, False)


def test_every_rule_clips_to_the_fixed_norm_at_most(rules: ModuleType) -> None:
    for make in rules.RULES.values():
        rule = make(total_steps=1000, max_norm=0.5)
        for step in range(300):
            rule.judge(steady(step), steady(step) * (50 if step == 200 else 1))
            assert 0 < rule.clip(steady(step)) <= 0.5
