"""The rungs of the ladder: what is done about an alarm, each with its budget."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from trainer.config.guard import GuardConfig
from trainer.records import (
    Halt,
    IncidentEvent,
    RankStats,
    Replay,
    Rollback,
    Skip,
    Step,
    StepStats,
    Verdict,
)
from trainer.stability import attribution
from trainer.stability.clip import Clipper
from trainer.stability.diagnosis import diagnose
from trainer.stability.incident import Incident, Ladder, LeftOut
from trainer.stability.norms import ParameterNorms
from trainer.stability.structure import StructureWatch
from trainer.stability.watch import Alarm, Watch

_FP16_SCALE_SEARCH = 32
"""Skips in a row that the search for a loss scale may take: from 2¹⁶ down to 1 and back up with margin."""
RECENT = 256
"""Accepted steps whose batch is remembered: the widest window that a rollback can leave out."""
_AUDIT_DELAY = 2
"""The audit of the state of step s is known when step s + 2 is judged."""
_SAME_RANK = 4
"""Batches in a row that are not finite on the same ranks only: it is not the data, which differs from rank to rank."""
_GRADIENT_ALONE = 3
"""Batches in a row whose gradient is not finite on any rank while their loss is: weights can be harmed so that only the
backward pass shows it, and then batches that were learned from look fine."""
_CLOSE_AFTER = 5
"""An incident is closed unverified after so many times `guard.verify` steps."""


class Rungs:
    """What a :class:`~trainer.stability.guard.Guard` stands on: history, ladder, and the steps up it."""

    def __init__(
        self,
        config: GuardConfig | None = None,
        *,
        clip: float = 1.0,
        clipping: Literal["norm", "zclip", "adagc"] = "norm",
        parameter_names: Sequence[str] = (),
        hosts: Sequence[str] = (),
        can_replay: bool = False,
        can_examine: bool = False,
        can_roll_back: bool = False,
    ):
        self._config = config or GuardConfig()
        self._names, self.hosts = tuple(parameter_names), tuple(hosts)
        self._can_replay = can_replay and self._config.replay
        self._can_examine, self._can_roll_back = can_examine, can_roll_back
        self._watch = Watch(spike=self._config.spike, drift=self._config.drift)
        self._clipper = Clipper(clip, clipping, len(self._names))
        self._norms = ParameterNorms(len(self._names))
        self._structure = StructureWatch(self._names)
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT)
        self._revisited = 0
        self._ladder = Ladder()
        self._pending: StepStats | None = None
        self._suspect: tuple[StepStats, tuple[Alarm, ...]] | None = None
        self._left_out_last: int | None = None
        self._pin: int | None = None
        self._attempts = self._steps = 0
        self._events: list[IncidentEvent] = []

    def _accept(self, stats: StepStats) -> Verdict:
        clip, scales = self._clipper.limits(stats)
        self._watch.accept(stats.step, stats.loss, stats.grad_norm, stats.parts)
        self._clipper.accept(stats)
        if self._names:
            self._norms.accept(stats.parameter_norms)
        self._recent.append((stats.step, stats.batch_index))
        self._ladder.consecutive_skips, self._left_out_last = 0, None
        if self._pin is not None and stats.step > self._pin:
            self._pin = None
        if incident := self._ladder.open:
            self._progress(incident, stats)
        return Step(clip, scales, self._ladder.cooling.scale(stats.step))

    def _progress(self, incident: Incident, stats: StepStats) -> None:
        if incident.redone and incident.kind != "transient" and stats.step == incident.furthest + 1:
            incident.kind = "transient"
            text = "the same steps with the same data gave no alarm this time: it was a transient fault, not the data"
            self._say("replayed", stats, text)
        incident.accepted(stats.step, stats.loss)
        if incident.clean < self._config.verify:
            return
        if incident.back_on_trajectory:
            how = {"transient": "nothing was lost of the clean run", "data": "the data was left out"}
            text = (
                f"the loss of {incident.clean} steps, {incident.loss_since:.4f}, is back on its trajectory "
                f"({incident.usual_loss:.4f} before); {how.get(incident.kind, 'training goes on from a healthy state')}"
            )
        elif incident.clean < _CLOSE_AFTER * self._config.verify:
            return
        else:
            text = (
                f"not verified: the loss of {incident.clean} steps, {incident.loss_since:.4f}, is still above "
                f"its trajectory ({incident.usual_loss:.4f} before), without an alarm"
            )
        verified = float(incident.back_on_trajectory)
        self._say("recovered", stats, text, {"verified": verified, "loss": incident.loss_since})
        self._ladder.open = None

    def _leave_out(self, stats: StepStats, alarms: tuple[Alarm, ...], reason: str) -> Verdict:
        incident, ladder = self._open(stats, reason), self._ladder
        ladder.consecutive_skips += 1
        self._watch.reject(stats.step, stats.loss, stats.grad_norm, stats.parts)
        culprits = self._culprits(stats)
        incident.same_ranks = incident.same_ranks + 1 if culprits and culprits == incident.culprits else 1
        incident.culprits = culprits
        if culprits and incident.same_ranks >= _SAME_RANK:
            whose = attribution.named(culprits, self.hosts)
            text = (
                f"{reason} for {incident.same_ranks} batches in a row, and on {whose} alone: its hardware is at fault"
            )
            return self._halt(stats, f"{text}. Take that machine out and go on from the last checkpoint")
        gradient_alone = math.isfinite(stats.loss) and not math.isfinite(stats.grad_norm) and not culprits
        incident.gradient_alone = incident.gradient_alone + 1 if gradient_alone else 0
        if incident.gradient_alone >= _GRADIENT_ALONE and self._can_roll_back and not self._revisiting:
            incident.gradient_alone = 0
            text = (
                f"{_GRADIENT_ALONE} batches in a row give no finite gradient, and their loss is: the weights are harmed"
            )
            self._say("examined", stats, text)
            return self._state_harmed(stats, alarms, incident)
        if ladder.consecutive_skips > self._config.max_consecutive_skips:
            if not self._watch.new_level:
                text = (
                    f"{ladder.consecutive_skips} batches in a row had to be left out, the last one (batch "
                    f"{stats.batch_index}): {reason}. {self._diagnosis(alarms, stats)}"
                )
                return self._halt(stats, text)
            self._watch.accept_level()
            text = (
                f"{ladder.consecutive_skips} batches in a row agree on a new level: it is taken for the usual one from "
                f"here on; look at the data from batch {stats.batch_index - ladder.consecutive_skips + 1} on"
            )
            self._say("acted", stats, text)
            incident.usual_loss = stats.loss
            return self._accept(stats)
        incident.acted()
        self._left_out_last = stats.batch_index
        if not self._revisiting:
            ladder.left_out.append(LeftOut(stats.batch_index, stats.batch_index, incident.number, reason))
        self._say("acted", stats, f"batch {stats.batch_index} is left out: {reason}")
        return Skip(reason)

    def _state_harmed(self, stats: StepStats, alarms: tuple[Alarm, ...], incident: Incident) -> Verdict:
        step, settings = stats.step, self._config
        reason = text_of(alarms)
        same_place = incident.redone and step <= incident.furthest + 1
        if not same_place:
            incident.kind = "state"
            before = step - 1 - settings.quarantine_before
            self._pin = before if before > 0 else None
            return self._go_back(
                stats, f"{reason}; the same steps once more", step - settings.clean_steps, alarms, redo=True
            )
        incident.kind = "data × state"
        wider = settings.quarantine_before * 2 ** max(incident.rollbacks - 1, 0)
        to_step = step - 1 - wider
        if incident.rollbacks > 1:
            to_step = min(to_step, step - settings.clean_steps, incident.target - 1)
        return self._go_back(
            stats, f"{reason}, again with the same data", to_step, alarms, suspects=self._suspects(step - wider, stats)
        )

    def _is_slow(self, stats: StepStats, alarms: tuple[Alarm, ...]) -> bool:
        """Whether it is a drift of many steps; a short one may be one update's harm, and is looked at like a spike."""
        since = min((alarm.since_step for alarm in alarms if alarm.kind == "drift"), default=stats.step)
        only_drift = all(alarm.kind == "drift" for alarm in alarms)
        return only_drift and (stats.step - since >= self._config.clean_steps or not self._can_examine)

    def _drifted(self, stats: StepStats, alarms: tuple[Alarm, ...]) -> Verdict:
        if not self._can_roll_back:
            return self._only_watch(stats, alarms)
        since = min(alarm.since_step for alarm in alarms)
        incident = self._open(stats, text_of(alarms))
        incident.kind = "drift"
        to_step = since - 1 if not incident.rollbacks else min(since - 1, incident.target - 1)
        return self._go_back(stats, text_of(alarms), to_step, alarms, suspects=self._suspects(since, stats))

    def _go_back(
        self,
        stats: StepStats,
        reason: str,
        to_step: int,
        alarms: tuple[Alarm, ...],
        *,
        suspects: tuple[int, int] | None = None,
        redo: bool = False,
    ) -> Verdict:
        incident, settings, ladder = self._open(stats, reason), self._config, self._ladder
        if not self._can_roll_back:
            return self._leave_out(stats, alarms, reason)
        if not incident.rollbacks:
            ladder.rollback_steps.append(stats.step)
        window = [step for step in ladder.rollback_steps if step > stats.step - settings.incident_window]
        ladder.rollback_steps = window
        if incident.rollbacks >= settings.max_rollbacks:
            spent = f"after {incident.rollbacks} rollbacks of incident {incident.number} it came again"
            return self._halt(stats, f"{spent}: {reason}. {self._diagnosis(alarms, stats)}")
        if len(window) > settings.max_incidents:
            often = f"{len(window)} incidents with a rollback within {settings.incident_window} steps"
            return self._halt(stats, f"{often}, the last one: {reason}. {self._diagnosis(alarms, stats)}")
        incident.rollbacks += 1
        incident.redone = redo
        incident.furthest = max(incident.furthest, stats.step)
        if self._revisiting:
            # its batches are in quarantine already, and going on with them is not worth the run
            ladder.revisit, suspects = [], None
        return Rollback(
            reason,
            max(to_step, 0),
            quarantine=suspects,
            reset_moments=settings.reset_moments and suspects is not None,
        )

    def _trouble_of_ranks(self, stats: StepStats) -> Verdict | None:
        """What the ranks say of each other, before anything is concluded from numbers that may be wrong."""
        ranks = stats.ranks
        if not stats.agree:
            odd = attribution.odd_ranks(ranks.digests)
            who = f": {'one of ' if len(odd) == len(ranks.digests) else ''}{attribution.named(odd, self.hosts)}"
            text = f"the ranks' decisions or their grounds differ after attempt {stats.attempt - 1}{who}"
            repeated = self._ladder.open is not None and self._ladder.open.kind == "disagreement"
            return self._rank_fault(stats, "disagreement", text, stats.step - 2, repeated)
        if self._config.mode == "off":
            return None
        if ranks.impossible.size and (ranks.impossible > 0).any():
            bad = [int(rank) for rank in np.flatnonzero(ranks.impossible)]
            text = f"the state of {attribution.named(bad, self.hosts)} holds values that no training step can produce"
            text += ": an update was wrong" if len(bad) == len(ranks.impossible) > 1 else ": its memory is at fault"
            return self._rank_fault(stats, "audit", text, stats.step - _AUDIT_DELAY - 1)
        return self._compare_replicas(stats, ranks)

    def _reduced_differ(self, stats: StepStats, pending: StepStats | None) -> Verdict | None:
        norms = stats.ranks.reduced_norms
        if self._config.mode == "off" or not norms.size or np.isclose(norms, norms[0], rtol=1e-6, equal_nan=True).all():
            return None
        odd = attribution.odd_ranks(norms)
        whose = f"{'one of ' if len(odd) == len(norms) else ''}{attribution.named(odd, self.hosts)}"
        text = f"the reduced gradient that all ranks hold alike differs ({whose})"
        if pending is None and self._can_replay:
            self._open(stats, text)
            self._pending = stats
            return Replay(text)
        return self._rank_fault(stats, "reduction", text, stats.step - 1)

    def _compare_replicas(self, stats: StepStats, ranks: RankStats) -> Verdict | None:
        sums = ranks.checksums
        if not sums.size or not sums.any():
            return None
        incident = self._ladder.open
        if len(set(sums.tolist())) == 1:
            if incident and incident.checksums and incident.checksums[0] == stats.step:
                wrong = [rank for rank, old in enumerate(incident.checksums[1]) if old != sums[rank]]
                if wrong:
                    self._say(
                        "replayed", stats, f"the weights had been wrong on {attribution.named(wrong, self.hosts)}"
                    )
                incident.checksums = None
            self._ladder.verified_step = stats.step - 1
            return None
        odd = attribution.odd_ranks(sums)
        whose = attribution.named(odd, self.hosts)
        text = f"the weights that all ranks hold alike differ ({'one of ' if len(odd) == len(sums) else ''}{whose})"
        verdict = self._rank_fault(stats, "replica", text, self._ladder.verified_step)
        if incident := self._ladder.open:
            incident.checksums = (stats.step, tuple(sums.tolist()))
        return verdict

    def _rank_fault(self, stats: StepStats, kind: str, text: str, to_step: int, repeated: bool = False) -> Verdict:
        incident = self._open(stats, text)
        if repeated or not self._can_roll_back or self._config.mode != "act":
            advice = "Resume from the last checkpoint; if it comes again, take that machine out"
            return self._halt(stats, f"{text}. {advice}")
        incident.kind = kind
        return self._go_back(stats, f"{text}; the same steps once more", to_step, (), redo=True)

    def _only_watch(self, stats: StepStats, alarms: tuple[Alarm, ...]) -> Verdict:
        reason = text_of(alarms)
        if all(math.isfinite(value) for value in (stats.loss, stats.grad_norm)):
            if self._config.mode != "off":
                self._events.append(event_of(0, "notice", stats, f"would act: {reason}"))
            if all(alarm.kind == "drift" for alarm in alarms):
                # said once: it is judged anew from the present level
                self._watch.pardon_drift()
                return self._accept(stats)
            self._watch.reject(stats.step, stats.loss, stats.grad_norm, stats.parts)
            if self._watch.new_level:
                self._watch.accept_level()
            clip, scales = self._clipper.limits(stats)
            return Step(clip, scales, 1.0)
        self._ladder.consecutive_skips += 1
        if self._ladder.consecutive_skips > self._config.max_consecutive_skips:
            count = self._ladder.consecutive_skips
            given = f"{count} attempts in a row gave no finite gradient: {reason}"
            return Halt(f"{given}. {self._diagnosis(alarms, stats)}")
        return Skip(f"{reason}{_where(stats, self._names)}", quarantine=False)

    def _search_scale(self, stats: StepStats) -> Verdict:
        self._ladder.consecutive_skips += 1
        allowed = self._config.max_consecutive_skips + _FP16_SCALE_SEARCH
        if self._ladder.consecutive_skips > allowed:
            return Halt(
                f"{self._ladder.consecutive_skips} attempts in a row gave no finite gradient down to loss scale "
                f"{stats.loss_scale:g}. {self._diagnosis((), stats)}"
            )
        # DeepSpeed refuses this step itself and lowers the loss scale, which a discarded gradient would not
        return Step(self._clipper.limits(replace(stats, grad_norm=1.0))[0])

    @property
    def _revisiting(self) -> bool:
        return self._ladder.revisit is not None and 0 < self._revisited <= len(self._ladder.revisit)

    def _suspects(self, from_step: int, stats: StepStats) -> tuple[int, int]:
        batches = [batch for step, batch in self._recent if step >= from_step] + [stats.batch_index]
        return min(batches), max(batches)

    def _open(self, stats: StepStats, cause: str) -> Incident:
        ladder = self._ladder
        if ladder.open is None:
            ladder.incidents += 1
            ladder.open = Incident(
                ladder.incidents, cause, stats.step, stats.batch_index, self._watch.usual_loss, self._watch.loss_scale
            )
            numbers = {"loss": stats.loss, "norm": stats.grad_norm} | self._watch.scores
            bad = self._culprits(stats)
            of_whom = f", on {attribution.named(bad, self.hosts)}" if bad else ""
            self._say("opened", stats, f"{cause}{_where(stats, self._names)}{of_whom}", numbers)
        return ladder.open

    def _culprits(self, stats: StepStats) -> tuple[int, ...]:
        """Ranks that alone are not finite; none where all are."""
        bad = attribution.bad_ranks(stats.ranks)
        return tuple(bad) if len(bad) < max(len(stats.ranks.losses), len(stats.ranks.grad_norms)) else ()

    def _halt(self, stats: StepStats, text: str) -> Halt:
        if self._ladder.open:
            self._say("halted", stats, text)
        return Halt(text)

    def _diagnosis(self, alarms: tuple[Alarm, ...], stats: StepStats) -> str:
        return diagnose(alarms, self._norms, self._structure, self._names, stats=stats)

    def _say(self, phase: str, stats: StepStats, text: str, numbers: dict[str, float] | None = None) -> None:
        assert self._ladder.open is not None
        self._events.append(event_of(self._ladder.open.number, phase, stats, text, numbers))


def event_of(
    incident: int, phase: str, stats: StepStats, text: str, numbers: dict[str, float] | None = None
) -> IncidentEvent:
    return IncidentEvent(incident, phase, stats.attempt, stats.step, stats.batch_index, text, numbers or {})


def text_of(alarms: Sequence[Alarm]) -> str:
    return ", ".join(alarm.text for alarm in alarms)


def _where(stats: StepStats, names: Sequence[str]) -> str:
    if not stats.num_nonfinite:
        return ""
    bad = [name for name, norm in zip(names, stats.parameter_norms, strict=False) if not math.isfinite(norm)]
    count = f"{stats.num_nonfinite} gradient elements are not finite"
    if not bad:
        return f" ({count})"
    return f" ({count}, {f'in {bad[0]}' if len(bad) == 1 else f'in {len(bad)} of {len(names)} parameters'})"
