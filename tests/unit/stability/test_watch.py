"""The detector on whole runs: what alarms, what does not, and what an alarm leaves behind."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_curves import NOISES, SHAPES, alarms_of, curve

from trainer.stability.watch import NEW_LEVEL, Watch

ANY = st.floats()
ATTEMPT = st.tuples(ANY, ANY, st.dictionaries(st.sampled_from(["z_loss", "l2"]), ANY, max_size=2))


def after(shape: str = "power law", *, sigma: float = 0.02, seed: int = 0, n: int = 300) -> Watch:
    watch = Watch()
    alarms_of(watch, *curve(shape, "normal", sigma, seed, n))
    return watch


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", SHAPES)
def test_clean_curves_do_not_alarm(shape: str, noise: str) -> None:
    for seed, sigma in enumerate((0.003, 0.01, 0.03, 0.1)):
        assert alarms_of(Watch(), *curve(shape, noise, sigma, seed, 800)) == []


@pytest.mark.parametrize("usual", [0.6, 0.05])
def test_the_mean_over_few_texts_differs_from_batch_to_batch(usual: float) -> None:
    """At first all texts are equally hard; then losses of single texts are as spread as they are large."""
    spread = np.clip(np.arange(400) / 60 - 1, 0.05, 1)
    for seed in range(20):
        texts = np.random.default_rng(seed).exponential(usual, (400, 32))
        losses = usual + (texts.mean(axis=1) - usual) * spread
        norms = 3 * np.exp(2 * (losses - usual) / usual)
        watch = Watch()
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            assert watch.look(step, loss, norm, num_targets=32) == ()
            watch.accept(step, loss, norm)
        (alarm,) = watch.look(400, 8 * usual, 3.0, num_targets=32)
        assert (alarm.kind, alarm.channel) == ("spike", "loss")


@pytest.mark.parametrize("step", [12, 30, 80, 200, 500])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_spike_alarms_at_its_step(shape: str, step: int) -> None:
    losses, norms = curve(shape, "normal", 0.03, seed=step, n=step)
    losses[-1] *= 3.0
    ((found, alarm),) = alarms_of(Watch(), losses, norms)
    assert (found, alarm.kind, alarm.channel, alarm.since_step) == (step, "spike", "loss", step)


def test_a_rise_within_a_steep_fall_alarms() -> None:
    losses = np.exp(np.linspace(np.log(10), np.log(3), 40))
    losses[25] = losses[20]
    assert alarms_of(Watch(), losses, np.ones(40)) == []
    losses[25] = losses[0]
    assert [step for step, _ in alarms_of(Watch(), losses, np.ones(40))] == [26]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", ["power law", "induction", "plateau"])
def test_a_drift_alarms_within_40_steps(shape: str, noise: str) -> None:
    onset = 600
    for seed in range(4):
        losses, norms = curve(shape, noise, 0.01, seed, onset + 40)
        losses *= np.exp(0.002 * np.clip(np.arange(onset + 40) - onset, 0, None))
        found = alarms_of(Watch(), losses, norms)
        assert found, "no alarm"
        step, alarm = found[0]
        assert (alarm.kind, alarm.channel) == ("drift", "loss")
        assert onset - 5 <= alarm.since_step < step - 3
        assert onset < step <= onset + 40


def test_a_huge_gradient_alarms_and_one_that_clipping_deals_with_does_not() -> None:
    watch = after()
    usual = 0.3
    assert watch.look(301, 3.0, 20 * usual) == ()
    assert watch.scores["gradient norm"] > 8
    (alarm,) = watch.look(301, 3.0, 250 * usual)
    assert (alarm.kind, alarm.channel) == ("spike", "gradient norm")


@pytest.mark.parametrize(("step", "factor"), [(4, 500), (6, 250), (12, 250), (40, 250), (200, 50)])
def test_a_gradient_of_one_faulty_rank_alarms_early_on_too(step: int, factor: float) -> None:
    losses, norms = curve("power law", "normal", 0.03, 0, step)
    norms[-1] *= factor
    ((found, alarm),) = alarms_of(Watch(), losses, norms)
    assert (found, alarm.channel) == (step, "gradient norm")


def test_a_sudden_fall_below_half_alarms() -> None:
    watch = after("plateau")
    assert watch.look(301, 2.4, 0.3) == ()
    (alarm,) = watch.look(301, 0.4, 0.3)
    assert alarm.kind == "spike"
    assert alarm.score < -16
    assert "σ below the usual 2.98" in alarm.text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_alarms_from_the_first_step(bad: float) -> None:
    for watch in (Watch(), after()):
        loss, norm, part = (
            watch.look(1, bad, 1.0),
            watch.look(1, 3.0, bad),
            watch.look(1, 3.0, 1.0, {"z_loss": bad}),
        )
        assert [(alarms[0].kind, alarms[0].channel) for alarms in (loss, norm, part)] == [
            ("nonfinite", "loss"),
            ("nonfinite", "gradient norm"),
            ("nonfinite", "loss: z_loss"),
        ]
        assert len(loss) == len(norm) == len(part) == 1


def test_parts_have_channels_of_their_own() -> None:
    watch = Watch()
    losses, norms = curve("plateau", "normal", 0.01, 0, 300)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        # one part that falls to zero by fits and starts, one that grows without noise, one that is negative
        parts = {"z_loss": 0.05 * math.exp(-step / 20), "l2": 0.0004 * step, "entropy": -0.1}
        assert watch.look(step, loss, norm, parts) == ()
        watch.accept(step, loss, norm, parts)
    assert watch.look(301, 3.0, 0.3, {"z_loss": 0.001, "l2": 0.12, "entropy": -0.1}) == ()
    (alarm,) = watch.look(301, 3.0, 0.3, {"z_loss": 0.8, "l2": 0.12, "entropy": -0.1})
    assert (alarm.channel, alarm.kind) == ("loss: z_loss", "spike")
    (alarm,) = watch.look(301, 3.0, 0.3, {"z_loss": 0.001, "l2": 0.12, "entropy": 0.9})
    assert alarm.channel == "loss: entropy"


@pytest.mark.parametrize(
    ("name", "alarms"), [("z_loss", True), ("r_drop", False), ("penalty", False), ("adversarial", False)]
)
def test_what_rises_as_a_model_becomes_sure_is_no_drift(name: str, alarms: bool) -> None:
    # of a clean run with R-Drop on film reviews: the loss falls from 0.69 to 0.35, the divergence grows with it
    noise = np.random.default_rng(0).lognormal(sigma=0.3, size=(100, 2))
    watch, found = Watch(), set()
    for step, (one, other) in enumerate(noise.tolist(), 1):
        loss, part = (0.69 - 0.34 * min(step, 70) / 70) * one**0.5, 0.0004 * step * other
        found |= {(alarm.channel, alarm.kind) for alarm in watch.look(step, loss, 1.0, {name: part}, num_targets=32)}
        watch.accept(step, loss, 1.0, {name: part})
    assert found == ({(f"loss: {name}", "drift")} if alarms else set())
    (alarm,) = watch.look(101, 0.35, 1.0, {name: 0.5}, num_targets=32)
    assert (alarm.channel, alarm.kind) == (f"loss: {name}", "spike")


@settings(deadline=None, max_examples=60)
@given(st.lists(ATTEMPT, max_size=20), ATTEMPT)
def test_looking_and_rejecting_change_nothing_that_is_judged_by(attempts, last) -> None:
    watch = Watch()
    for step, (loss, norm, parts) in enumerate(attempts, 1):
        watch.look(step, loss, norm, parts)
        watch.accept(step, loss, norm, parts)
    before = watch.state()
    alarms = watch.look(50, *last)
    assert watch.state() == before
    watch.reject(50, *last)
    assert {**watch.state(), "rejected": []} == before
    assert watch.look(50, *last) == alarms or any(math.isnan(x) for alarm in alarms for x in (alarm.value, alarm.usual))
    json.dumps(watch.state(), allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(ATTEMPT, st.booleans()), max_size=20), st.lists(ATTEMPT, min_size=1, max_size=5))
def test_a_restored_watch_decides_the_same(attempts, later) -> None:
    watch = Watch()
    for step, (attempt, accepted) in enumerate(attempts, 1):
        (watch.accept if accepted else watch.reject)(step, *attempt)
    copy = Watch()
    copy.restore(json.loads(json.dumps(watch.state())))
    for step, attempt in enumerate(later, 100):
        assert repr(copy.look(step, *attempt)) == repr(watch.look(step, *attempt))
        assert repr(copy.scores) == repr(watch.scores)
        assert copy.new_level == watch.new_level
        watch.accept(step, *attempt)
        copy.accept(step, *attempt)
        assert copy.fingerprint() == watch.fingerprint()


def test_the_fingerprint_tells_one_bit() -> None:
    losses, norms = curve("power law", "normal", 0.02, 0, 100)
    prints = set()
    for change in (0.0, 1e-15):
        watch = Watch()
        changed = losses.copy()
        changed[40] += change * losses[40]
        alarms_of(watch, changed, norms)
        prints.add(watch.fingerprint())
        watch.reject(101, 9.0, 1.0)
        prints.add(watch.fingerprint())
    assert len(prints) == 4


def test_a_new_level_is_known_by_its_consistency() -> None:
    watch = after("plateau", sigma=0.01)
    rng = np.random.default_rng(1)
    for step in range(301, 301 + NEW_LEVEL):
        assert not watch.new_level
        loss = 4.5 * math.exp(0.01 * rng.standard_normal())
        assert watch.look(step, loss, 0.3)
        watch.reject(step, loss, 0.3)
    assert watch.new_level
    watch.accept_level()
    assert watch.usual_loss == pytest.approx(4.5, rel=0.02)
    assert watch.look(320, 4.5, 0.3) == ()
    assert not watch.new_level


def test_a_run_that_diverges_is_no_new_level() -> None:
    watch = after("plateau", sigma=0.01)
    for i in range(30):
        watch.reject(301 + i, 4.5 * 1.05**i, 0.3)
        assert not watch.new_level


def test_one_accepted_value_begins_the_count_anew() -> None:
    watch = after("plateau")
    for _ in range(NEW_LEVEL):
        watch.reject(301, 4.5, 0.3)
    watch.accept(301, 3.0, 0.3)
    assert not watch.new_level


def test_a_pardoned_drift_is_judged_anew() -> None:
    losses, norms = curve("plateau", "normal", 0.01, 0, 400)
    losses[300:] *= 1.04
    watch = Watch()
    assert alarms_of(watch, losses[:320], norms[:320])[-1][1].kind == "drift"
    watch.pardon_drift()
    assert watch.look(321, 3.0 * 1.04, 0.3) == ()


def test_before_anything_is_known() -> None:
    watch = Watch()
    assert math.isnan(watch.usual_loss)
    assert watch.scores == {}
    assert watch.look(1, 1e6, 1e6) == ()
    assert watch.scores == {"loss": 0.0, "loss drift": 0.0, "gradient norm": 0.0}
    watch.accept(1, 10.0, 1.0)
    assert watch.usual_loss == pytest.approx(10.0)
    assert watch.loss_scale == pytest.approx(0.08, rel=0.01)


def test_a_gradient_that_vanishes_at_once_is_an_alarm() -> None:
    watch = Watch()
    for step in range(1, 60):
        watch.accept(step, 5.0 + 0.1 * math.sin(step), 1.0 + 0.3 * math.cos(3 * step))
    for norm in (0.0, 1e-9, 5e-3):
        (alarm,) = watch.look(60, 5.0, norm)
        assert (alarm.channel, alarm.kind) == ("gradient norm", "spike")
        assert "below the usual" in alarm.text
    assert watch.look(60, 5.0, 0.1) == ()
