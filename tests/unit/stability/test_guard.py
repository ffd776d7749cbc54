"""The ladder, on numbers alone: what a loop would see, told by a small simulation of one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from trainer.config.guard import GuardConfig
from trainer.records import (
    Examination,
    Examine,
    Halt,
    RankStats,
    Replay,
    Rewind,
    Rollback,
    Skip,
    Step,
    StepStats,
    Verdict,
)
from trainer.stability.guard import Guard

NAMES = ("embed.weight", "layers.0.weight", "layers.1.weight")
HOSTS = ("node-a", "node-b")


def usual(index: int) -> float:
    """A loss that falls, with the noise of batches."""
    return 4.0 + 2.0 * math.exp(-index / 60) + 0.03 * math.sin(7.1 * index) + 0.02 * math.cos(3.3 * index * index)


def stats_of(step: int, batch: int, *, loss: float | None = None, norm: float = 1.0, attempt: int = 0) -> StepStats:
    loss = usual(step) if loss is None else loss
    finite = math.isfinite(norm)
    return StepStats(
        attempt=attempt or step,
        batch_index=batch,
        step=step,
        loss=loss,
        parts={},
        num_targets=100_000,
        grad_norm=norm * (1 + 0.1 * math.sin(5.7 * step)),
        num_nonfinite=0 if finite else 3,
        parameter_norms=np.array([norm, 0.1, 0.1]) if finite else np.array([math.nan, 0.1, 0.1]),
        ranks=RankStats(
            seconds=np.ones(2), losses=np.array([loss / 2, loss / 2]), grad_norms=np.array([norm, norm]),
            digests=np.zeros(2), checksums=np.zeros(2), impossible=np.zeros(2),
        ),
    )  # fmt: skip


def make_guard(**options: object) -> Guard:
    return Guard(
        GuardConfig(**options),  # type: ignore[arg-type]
        clip=1.0, parameter_names=NAMES, hosts=HOSTS, can_replay=True, can_examine=True, can_roll_back=True,
    )  # fmt: skip


def train(guard: Guard, steps: int, first: int = 1) -> None:
    """Accepted steps first … first + steps − 1, each from the batch one below its step."""
    for step in range(first, first + steps):
        verdict = guard.judge(stats_of(step, step - 1))
        assert isinstance(verdict, Step), (step, verdict)


def judged(guard: Guard, stats: StepStats) -> Verdict:
    """The verdict after replay and examination, which find that the weights are fine."""
    verdict = guard.judge(stats)
    if isinstance(verdict, Replay):
        verdict = guard.judge(stats)
    if isinstance(verdict, Examine):
        verdict = guard.weigh(Examination(known=((4.6, 4.5),)))
    return verdict


def phases(guard: Guard) -> list[str]:
    return [event.phase for event in guard.drain()]


def go_back(guard: Guard, verdict: Verdict, failed: StepStats, history: dict, to_step: int) -> None:
    assert isinstance(verdict, Rollback)
    rewind = Rewind(
        guard.incident, failed.step - 1, to_step, failed.attempt, to_step, verdict.quarantine, "memory", 0.1,
        verdict.reason,
    )  # fmt: skip
    guard.rolled_back(rewind, history, guard.ladder())


def test_finite_attempts_are_applied_with_the_clip() -> None:
    guard = make_guard()
    assert guard.judge(stats_of(1, 0)) == Step(1.0)
    train(guard, 100, first=2)
    assert guard.incident == 0
    assert phases(guard) == []


def test_a_fault_that_a_replay_does_not_reproduce_is_named_and_the_clean_result_used() -> None:
    guard = make_guard()
    train(guard, 40)
    bad = stats_of(41, 40, norm=math.nan)
    bad = replace(bad, ranks=replace(bad.ranks, grad_norms=np.array([1.0, math.nan])))
    first = guard.judge(bad)
    assert isinstance(first, Replay)
    assert isinstance(guard.judge(stats_of(41, 40, attempt=42)), Step)
    events = guard.drain()
    assert [event.phase for event in events] == ["opened", "replayed"]
    assert "rank 1 on node-b" in events[0].text
    assert "rank 1 on node-b" in events[1].text
    assert "node-a" not in events[1].text
    train(guard, 20, first=42)
    (recovered,) = guard.drain()
    assert recovered.phase == "recovered"
    assert recovered.numbers["verified"] == 1
    assert guard.incident == 0


def test_bad_data_is_left_out_when_known_batches_are_predicted_as_before() -> None:
    guard = make_guard()
    train(guard, 40)
    bad = stats_of(41, 40, loss=8.5)
    assert isinstance(guard.judge(bad), Replay)
    assert isinstance(guard.judge(bad), Examine)
    assert isinstance(guard.weigh(Examination(known=((4.9, 4.8), (5.0, 4.9)))), Skip)
    # the next one of the same window needs no second look: nothing was applied in between
    assert isinstance(guard.judge(stats_of(41, 41, loss=8.6)), Skip)
    assert [(entry.first, entry.last) for entry in guard.left_out] == [(40, 40), (41, 41)]
    verdict = guard.judge(stats_of(41, 42))
    assert isinstance(verdict, Step)
    assert verdict.lr_scale == 1


def test_harmed_weights_go_back_and_do_the_same_steps_again_and_then_nothing_was_lost() -> None:
    guard = make_guard()
    train(guard, 25)
    history = json.loads(json.dumps(guard.history()))
    train(guard, 15, first=26)
    bad = stats_of(41, 40, loss=9.0)
    guard.judge(bad)
    guard.judge(bad)
    verdict = guard.weigh(Examination(known=((4.9, 7.0),)))
    assert isinstance(verdict, Rollback)
    assert verdict.quarantine is None
    assert verdict.to_step == 31, "ten clean steps before the alarm"
    go_back(guard, verdict, bad, history, 25)
    assert guard.pin == 38
    train(guard, 40, first=26)
    texts = [event.text for event in guard.drain()]
    assert any("a transient fault, not the data" in text for text in texts)
    assert guard.incident == 0
    assert guard.left_out == ()


def test_an_alarm_that_comes_again_leaves_the_window_out_and_cools_the_rate() -> None:
    guard = make_guard(quarantine_before=2, cool=0.5, rewarm=10)
    train(guard, 25)
    history = json.loads(json.dumps(guard.history()))
    train(guard, 15, first=26)
    bad = stats_of(41, 40, loss=9.0)
    targets = []
    for _ in range(2):
        guard.judge(bad)
        guard.judge(bad)
        verdict = guard.weigh(Examination(known=((4.9, math.nan),)))
        assert isinstance(verdict, Rollback)
        targets.append((verdict.to_step, verdict.quarantine))
        go_back(guard, verdict, bad, history, 25)
        if verdict.quarantine is None:
            train(guard, 15, first=26)
    assert targets == [(31, None), (38, (38, 40))]
    first = guard.judge(stats_of(26, 25))
    assert isinstance(first, Step)
    assert first.lr_scale == 0.5
    for step in range(27, 40):
        last = guard.judge(stats_of(step, step))
    assert isinstance(last, Step)
    assert last.lr_scale == 1
    assert [(entry.first, entry.last) for entry in guard.left_out] == [(38, 40)]


def test_rollbacks_have_a_budget_and_the_end_is_a_diagnosis() -> None:
    guard = make_guard(max_rollbacks=2)
    train(guard, 25)
    history = guard.history()
    train(guard, 15, first=26)
    bad = stats_of(41, 40, loss=9.0)
    for count in range(3):
        guard.judge(bad)
        guard.judge(bad)
        verdict = guard.weigh(Examination(known=((4.9, 9.0),)))
        if isinstance(verdict, Rollback):
            assert count < 2
            go_back(guard, verdict, bad, history, 25)
            train(guard, 15, first=26)
    assert isinstance(verdict, Halt)
    assert "after 2 rollbacks of incident 1" in verdict.reason
    assert phases(guard)[-1] == "halted"


def test_a_level_that_stays_is_accepted_after_the_budget_of_skips() -> None:
    guard = make_guard(max_consecutive_skips=12)
    train(guard, 60)
    left_out = 0
    for batch in range(60, 80):
        stats = stats_of(61, batch, loss=7.0 + 0.02 * math.sin(batch))
        verdict = judged(guard, stats)
        if isinstance(verdict, Step):
            break
        assert isinstance(verdict, Skip)
        left_out += 1
    assert left_out == 12
    assert any("new level" in event.text for event in guard.drain())


def test_batches_that_never_give_a_finite_gradient_halt() -> None:
    guard = make_guard(max_consecutive_skips=3)
    train(guard, 20)
    verdicts: list[Verdict] = []
    for batch in range(20, 30):
        stats = stats_of(21, batch, loss=math.nan, norm=math.nan)
        verdict = judged(guard, stats)
        verdicts.append(verdict)
        if isinstance(verdict, Halt):
            break
    assert [type(verdict) for verdict in verdicts] == [Skip, Skip, Skip, Halt]
    assert "embed.weight" in guard.drain()[0].text


def test_weights_that_only_harm_the_backward_pass_are_not_taken_for_bad_data() -> None:
    guard = make_guard()
    train(guard, 40)
    verdicts: list[Verdict] = []
    for batch in range(40, 46):
        bad = stats_of(41, batch, norm=math.nan)
        bad = replace(bad, ranks=replace(bad.ranks, grad_norms=np.array([math.nan, math.nan])))
        verdict = judged(guard, bad)
        verdicts.append(verdict)
        if isinstance(verdict, Rollback):
            break
    assert [type(verdict) for verdict in verdicts] == [Skip, Skip, Rollback]
    assert verdicts[-1].quarantine is None  # type: ignore[union-attr]


def test_a_rank_that_is_never_finite_is_named_before_good_data_is_blamed() -> None:
    guard = make_guard()
    train(guard, 20)
    verdicts: list[Verdict] = []
    for batch in range(20, 40):
        bad = stats_of(21, batch, norm=math.nan)
        bad = replace(bad, ranks=replace(bad.ranks, grad_norms=np.array([1.0, math.nan])))
        verdict = judged(guard, bad)
        verdicts.append(verdict)
        if isinstance(verdict, Halt):
            break
    assert [type(verdict) for verdict in verdicts] == [Skip, Skip, Skip, Halt]
    assert "on rank 1 on node-b alone" in verdicts[-1].reason  # type: ignore[union-attr]


def test_ranks_that_decide_differently_go_back_once_and_then_halt() -> None:
    guard = make_guard()
    train(guard, 30)
    history = guard.history()
    split = replace(stats_of(31, 30), agree=False)
    split = replace(split, ranks=replace(split.ranks, digests=np.array([7.0, 9.0])))
    verdict = guard.judge(split)
    assert isinstance(verdict, Rollback)
    assert verdict.quarantine is None
    go_back(guard, verdict, split, history, 29)
    halted = guard.judge(split)
    assert isinstance(halted, Halt)
    assert "differ after attempt 30" in halted.reason


def test_a_rank_whose_replica_differs_is_named_by_the_repeated_steps() -> None:
    guard = make_guard()
    train(guard, 25)
    same = stats_of(26, 25)
    same = replace(same, ranks=replace(same.ranks, checksums=np.array([5.0, 5.0])))
    assert isinstance(guard.judge(same), Step)
    history = guard.history()
    train(guard, 24, first=27)
    differ = replace(stats_of(51, 50), ranks=replace(same.ranks, checksums=np.array([8.0, 9.0])))
    verdict = guard.judge(differ)
    assert isinstance(verdict, Rollback)
    assert verdict.to_step == 25
    go_back(guard, verdict, differ, history, 25)
    train(guard, 25, first=26)
    assert isinstance(guard.judge(replace(differ, ranks=replace(same.ranks, checksums=np.array([8.0, 8.0])))), Step)
    assert any("had been wrong on rank 1 on node-b" in event.text for event in guard.drain())


def test_other_ranks_are_not_held_to_what_an_incident_knows_of_the_old_ones() -> None:
    guard = make_guard()
    train(guard, 25)
    assert guard.forget_ranks() is None
    history = guard.history()
    differ = replace(stats_of(26, 25), ranks=replace(stats_of(26, 25).ranks, checksums=np.array([8.0, 9.0])))
    go_back(guard, guard.judge(differ), differ, history, 0)
    resumed = make_guard()
    resumed.restore(guard.history(), json.loads(json.dumps(guard.ladder())))
    said = resumed.forget_ranks()
    assert said == "incident 1 is still open, and other ranks go on with it: their checksums are forgotten"
    four = replace(differ.ranks, checksums=np.full(4, 8.0))
    assert isinstance(resumed.judge(replace(differ, ranks=four)), Step)
    assert not any("had been wrong" in event.text for event in resumed.drain())


def test_a_teacher_that_was_damaged_has_what_was_learned_from_it_done_again() -> None:
    guard = make_guard()
    train(guard, 60)
    history = guard.history()
    bad = stats_of(61, 60, loss=40.0)
    assert isinstance(guard.judge(bad), Replay)
    verdict = guard.teacher_harmed(bad, "rank 1 (node-b) held other weights of the teacher; they were loaded again", 50)
    assert isinstance(verdict, Rollback)
    assert (verdict.to_step, verdict.quarantine) == (50, None)
    go_back(guard, verdict, bad, history, 50)
    # the replay that the alarm asked for is forgotten: this is no repetition of it
    assert isinstance(guard.judge(stats_of(51, 50)), Step)
    train(guard, 85, first=52)
    assert phases(guard)[-1] == "recovered"
    assert make_guard(mode="watch").teacher_harmed(bad, "harm", 50) is None


def test_a_reduced_gradient_that_differs_between_ranks_is_computed_again() -> None:
    guard = make_guard()
    train(guard, 30)
    same = stats_of(31, 30)
    differ = replace(same, ranks=replace(same.ranks, reduced_norms=np.array([1.0, math.inf])))
    same = replace(same, ranks=replace(same.ranks, reduced_norms=np.array([1.0, 1.0])))
    assert isinstance(guard.judge(differ), Replay)
    assert isinstance(guard.judge(same), Step)
    assert isinstance(guard.judge(replace(differ, step=32, batch_index=31)), Replay)
    assert isinstance(guard.judge(replace(differ, step=32, batch_index=31)), Rollback)


def test_impossible_values_in_a_snapshot_go_back_before_it() -> None:
    guard = make_guard()
    train(guard, 51)
    found = stats_of(52, 51)
    verdict = guard.judge(replace(found, ranks=replace(found.ranks, impossible=np.array([0.0, 2.0]))))
    assert isinstance(verdict, Rollback)
    assert verdict.to_step == 49, "the snapshot of step 50 is the one with the values"
    assert "rank 1 on node-b" in verdict.reason


def test_without_a_place_to_go_back_to_it_halts() -> None:
    guard = make_guard()
    train(guard, 30)
    split = replace(stats_of(31, 30), agree=False)
    verdict = guard.judge(split)
    assert isinstance(verdict, Rollback)
    assert "no snapshot and no checkpoint" in guard.cannot_roll_back(verdict, split).reason


def drifting(guard: Guard, per_step: float) -> tuple[Verdict, StepStats]:
    """The first verdict that is no step while the loss rises."""
    for step in range(101, 160):
        stats = stats_of(step, step - 1, loss=usual(step) * math.exp(per_step * (step - 100)))
        verdict = guard.judge(stats)
        if not isinstance(verdict, Step):
            return verdict, stats
    raise AssertionError("no alarm")


@pytest.mark.parametrize(("now", "quarantined"), [(5.6, False), (4.4, True)])
def test_a_short_drift_is_looked_at_before_data_is_blamed(now: float, quarantined: bool) -> None:
    guard = make_guard()
    train(guard, 100)
    verdict, stats = drifting(guard, 0.015)
    assert isinstance(verdict, Replay)
    assert isinstance(guard.judge(stats), Examine)
    verdict = guard.weigh(Examination(known=((4.5, now),)))
    assert isinstance(verdict, Rollback)
    assert (verdict.quarantine is not None) == quarantined


def test_a_drift_goes_back_to_before_it_began() -> None:
    guard = make_guard()
    train(guard, 100)
    verdict, stats = drifting(guard, 0.004)
    assert isinstance(verdict, Rollback)
    assert verdict.quarantine is not None
    assert 90 <= verdict.to_step <= 115
    assert verdict.quarantine == (verdict.to_step, stats.batch_index)


@pytest.mark.parametrize("mode", ["watch", "off"])
def test_other_modes_only_leave_out_what_is_not_finite(mode: str) -> None:
    guard = make_guard(mode=mode, max_consecutive_skips=2)
    train(guard, 40)
    assert isinstance(guard.judge(stats_of(41, 40, loss=9.0)), Step)
    assert phases(guard) == (["notice"] if mode == "watch" else [])
    bad = stats_of(42, 41, norm=math.inf)
    assert guard.judge(bad) == Skip(guard.judge(bad).reason, quarantine=False)  # type: ignore[union-attr]
    assert isinstance(guard.judge(bad), Halt)


def test_an_overflow_of_fp16_is_left_to_the_loss_scaler() -> None:
    guard = make_guard()
    train(guard, 5)
    overflow = replace(stats_of(6, 5, norm=math.inf), loss_scale=65536.0)
    for _ in range(17):
        assert isinstance(guard.judge(overflow), Step)
    assert guard.incident == 0


def test_a_restored_guard_decides_the_same() -> None:
    guard = make_guard()
    train(guard, 40)
    bad = stats_of(41, 40, loss=8.5)
    guard.judge(bad)
    guard.judge(bad)
    guard.weigh(Examination(known=((4.9, 4.8),)))
    later = make_guard()
    later.restore(json.loads(json.dumps(guard.history())), json.loads(json.dumps(guard.ladder())))
    assert later.fingerprint() == guard.fingerprint()
    for step in range(41, 80):
        stats = stats_of(step, step + 1, norm=30.0 if step == 70 else 1.0)
        assert later.judge(stats) == guard.judge(stats)
    assert later.ladder() == guard.ladder()
    assert later.history() == guard.history()


def test_quarantined_batches_are_revisited_in_the_last_steps() -> None:
    guard = make_guard(revisit=True)
    train(guard, 40)
    bad = stats_of(41, 40, loss=8.5)
    guard.judge(bad)
    guard.judge(bad)
    guard.weigh(Examination(known=((4.9, 4.8),)))
    guard.judge(stats_of(41, 41, loss=8.6))
    assert guard.next_revisit(3) is None
    assert guard.next_revisit(2) == 40
    assert guard.next_revisit(1) == 41
    assert guard.next_revisit(1) is None


def test_a_loop_of_ones_own_gets_steps_and_skips() -> None:
    guard = Guard(clip=1.0)
    verdicts = [guard.look(usual(step), 1.0) for step in range(40)]
    assert all(isinstance(verdict, Step) for verdict in verdicts)
    assert isinstance(guard.look(math.nan, 1.0), Skip)
    assert isinstance(guard.look(usual(40), math.inf), Skip)
    assert isinstance(guard.look(9.5, 1.0), Skip)
    assert isinstance(guard.look(usual(41), 1.0), Step)


def test_a_loop_of_ones_own_hears_of_a_drift_once() -> None:
    guard = Guard(clip=1.0)
    for step in range(100):
        guard.look(usual(step), 1.0)
    verdicts = [guard.look(usual(step) * math.exp(0.002 * (step - 100)), 1.0) for step in range(100, 150)]
    assert all(isinstance(verdict, Step) for verdict in verdicts)
    notices = [event for event in guard.drain() if "drifted" in event.text]
    assert 1 <= len(notices) <= 3
