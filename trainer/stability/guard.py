"""Decides, from numbers alone, what becomes of a gradient. The same numbers give the same verdict on every rank.

The ladder: clip → leave the step out and replay it → look closer → leave the batch out, or go back: first the same
steps again (a fault of the hardware does not come back), then without the suspect batches and more carefully, deeper
and wider each time → halt with a diagnosis. docs/stability.md tells it with the reasons.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from typing import Any

import numpy as np

from trainer.records import (
    Examination,
    Examine,
    FloatArray,
    Halt,
    IncidentEvent,
    Replay,
    Rewind,
    Rollback,
    Step,
    StepStats,
    Structure,
    Verdict,
)
from trainer.stability import attribution
from trainer.stability.incident import Ladder, LeftOut
from trainer.stability.rungs import RECENT, Rungs, text_of
from trainer.stability.watch import Alarm

_HARMED = 0.02
"""A batch that was learned from is predicted worse by 2 % (log loss), or by two standard deviations of a batch: the
weights are harmed. Without harm it is predicted better than before."""


class Guard(Rungs):
    """Judges every attempt of a run.

    Args:
        clip, clipping: as `optim.clip` and `optim.clipping`.
        parameter_names: in the order of `StepStats.parameter_norms`.
        hosts: of each rank, to name it.
        can_replay, can_examine, can_roll_back: what the caller does with such verdicts. Without any, as in a loop of
            your own, it gives `Step`, `Skip` and `Halt` only.
    """

    # what others read

    @property
    def scores(self) -> dict[str, float]:
        """How unusual the last attempt was, in robust standard deviations by channel."""
        return self._watch.scores

    @property
    def incident(self) -> int:
        """Number of the incident that is open; 0: none."""
        return self._ladder.open.number if self._ladder.open else 0

    @property
    def pin(self) -> int | None:
        """Step whose state should be kept as a snapshot: the last one before what is suspected."""
        return self._pin

    @property
    def usual_norms(self) -> FloatArray:
        """What gradient norm was usual for each parameter, [parameters]; empty before anything is known."""
        return self._norms.usual()

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """All batches that incidents put into quarantine."""
        return tuple(self._ladder.left_out)

    def fingerprint(self) -> int:
        """32 bits of what it judges by: ranks whose guards differ would decide differently."""
        ladder = self._ladder
        own = (ladder.incidents, ladder.consecutive_skips, len(ladder.left_out), self.incident, ladder.verified_step)
        return zlib.crc32(repr((own, self._watch.fingerprint(), self._clipper.fingerprint())).encode())

    def drain(self) -> list[IncidentEvent]:
        """What happened to incidents since the last call."""
        events, self._events = self._events, []
        return events

    # state: the history goes back with a rollback, the ladder never does

    def history(self) -> dict[str, Any]:
        """What a snapshot holds of it, as plain JSON."""
        return {
            "watch": self._watch.state(),
            "clipper": self._clipper.state(),
            "norms": self._norms.state(),
            "structure": self._structure.state(),
            "recent": [list(entry) for entry in self._recent],
            "revisited": self._revisited,
        }

    def ladder(self) -> dict[str, Any]:
        """Counts, budgets and quarantine, as plain JSON."""
        return self._ladder.to_json()

    def restore(self, history: dict[str, Any], ladder: dict[str, Any] | None = None) -> None:
        """Go on from a saved state; `ladder` None: only the history goes back."""
        self._watch.restore(history["watch"])
        self._clipper.restore(history["clipper"])
        self._norms.restore(history["norms"])
        self._structure.restore(history["structure"])
        self._recent = deque(((step, batch) for step, batch in history["recent"]), maxlen=RECENT)
        self._revisited = history["revisited"]
        if ladder is not None:
            self._ladder = Ladder.from_json(ladder)
        self._pending = self._suspect = self._left_out_last = None

    def number_incidents_after(self, newest: int) -> None:
        """Incidents of this run have been numbered up to `newest`, some perhaps after the checkpoint that it goes on
        from: their folders stay."""
        self._ladder.incidents = max(self._ladder.incidents, newest)

    def forget_ranks(self) -> str | None:
        """To call after :meth:`restore` where other ranks, or another ZeRO stage, go on: what an open incident knows of
        single ranks would be held against others. Returns a sentence to say; None: it knew nothing of the kind."""
        incident = self._ladder.open
        lost = incident.forget_ranks() if incident is not None else ""
        if incident is None or not lost:
            return None
        return f"incident {incident.number} is still open, and other ranks go on with it: {lost} are forgotten"

    # judging

    def look(self, loss: float, grad_norm: float, num_targets: int = 0) -> Verdict:
        """:meth:`judge` for a loop of your own: the loss and the norm of a gradient that was not applied yet.

        Args:
            num_targets: tokens, or texts with a class, that the loss is the mean over; 0: many.
        """
        self._attempts += 1
        verdict = self.judge(
            StepStats(
                attempt=self._attempts,
                batch_index=self._attempts - 1,
                step=self._steps + 1,
                loss=loss,
                parts={},
                num_targets=num_targets,
                grad_norm=grad_norm,
                num_nonfinite=int(not math.isfinite(grad_norm)),
                parameter_norms=np.zeros(0),
            )
        )
        self._steps += isinstance(verdict, Step)
        return verdict

    def judge(self, stats: StepStats) -> Verdict:
        """The verdict on one attempt."""
        pending, self._pending = self._pending, None
        if verdict := self._trouble_of_ranks(stats):
            return verdict
        if verdict := self._reduced_differ(stats, pending):
            return verdict
        searching = stats.loss_scale > 1 and math.isfinite(stats.loss) and not math.isfinite(stats.grad_norm)
        if searching:
            return self._search_scale(stats)
        alarms = self._watch.look(stats.step, stats.loss, stats.grad_norm, stats.parts, num_targets=stats.num_targets)
        if not alarms:
            if pending is not None:
                self._transient(pending, stats)
            return self._accept(stats)
        if self._config.mode != "act":
            return self._only_watch(stats, alarms)
        if self._is_slow(stats, alarms):
            return self._drifted(stats, alarms)
        if pending is not None:
            return self._reproduced(stats, alarms)
        incident = self._open(stats, text_of(alarms))
        in_a_row = self._left_out_last == stats.batch_index - 1 and math.isfinite(stats.grad_norm)
        if in_a_row and incident.kind == "data":
            # nothing was applied since the batch before was found to be bad: neither is this one's fault the state's
            return self._leave_out(stats, alarms, text_of(alarms))
        if self._can_replay:
            self._pending = stats
            return Replay(text_of(alarms))
        return self._reproduced(stats, alarms)

    def weigh(self, examination: Examination) -> Verdict:
        """The verdict after an `Examine`: is it the batch, or are the weights harmed?"""
        assert self._suspect is not None
        (stats, alarms), self._suspect = self._suspect, None
        incident = self._open(stats, text_of(alarms))
        growth = [_log_ratio(now, then) for then, now in examination.known]
        worst = max(growth, default=-math.inf)
        harmed = worst > max(2 * incident.loss_scale, _HARMED)
        numbers = {f"known batch {index}": now for index, (_, now) in enumerate(examination.known)}
        numbers |= {f"known batch {index} before": then for index, (then, _) in enumerate(examination.known)}
        if harmed:
            percent = "out of range" if worst > 50 else f"{math.expm1(worst):+.1%}"
            text = f"batches that were learned from are predicted worse now ({percent}): the weights are harmed"
            self._say("examined", stats, text, numbers)
            return self._state_harmed(stats, alarms, incident)
        if all(alarm.kind == "drift" for alarm in alarms):
            self._say("examined", stats, "batches learned from before are predicted as well as then", numbers)
            return self._drifted(stats, alarms)
        known = "batches learned from before are predicted as well as then" if growth else "there was no update yet"
        self._say("examined", stats, f"{known}: it is batch {stats.batch_index} itself", numbers)
        incident.kind = "data"
        return self._leave_out(stats, alarms, text_of(alarms))

    def teacher_harmed(self, stats: StepStats, text: str, verified_step: int) -> Verdict | None:
        """The verdict on an attempt, in the place of another, when the weights that are learned from were found damaged
        and put right: what was learned since `verified_step` is done again. None: nothing is to be done about it."""
        if self._config.mode != "act" or not self._can_roll_back:
            return None
        self._pending = None
        self._open(stats, text)
        self._say("examined", stats, text)
        return self._rank_fault(stats, "teacher", text, verified_step)

    def observe(self, step: int, structure: Structure) -> list[str]:
        """Slow signs of a run that will fail; sentences of warning where there is something new to warn of."""
        return self._structure.observe(step, structure)

    def _transient(self, first: StepStats, again: StepStats) -> None:
        incident = self._open(first, "")
        incident.kind = "transient"
        ranks = attribution.changed_ranks(first, again)
        whose = attribution.named(ranks, self.hosts) if ranks else "no single rank (reduction or reduced gradient)"
        text = (
            f"the replay of batch {again.batch_index} gave no alarm (norm {first.grad_norm:.4g} → "
            f"{again.grad_norm:.4g}, loss {first.loss:.4f} → {again.loss:.4f}): a transient fault of {whose}; "
            "the clean result is used"
        )
        numbers = {"loss": first.loss, "loss again": again.loss, "norm": first.grad_norm, "norm again": again.grad_norm}
        self._say("replayed", again, text, numbers | {f"rank {rank}": 1.0 for rank in ranks})

    def _reproduced(self, stats: StepStats, alarms: tuple[Alarm, ...]) -> Verdict:
        incident = self._open(stats, text_of(alarms))
        if self._can_replay:
            numbers = {"loss": stats.loss, "norm": stats.grad_norm}
            self._say("replayed", stats, f"the replay of batch {stats.batch_index} gave the same alarm", numbers)
        if self._can_examine:
            self._suspect = (stats, alarms)
            return Examine(text_of(alarms))
        incident.kind = "data"
        return self._leave_out(stats, alarms, text_of(alarms))

    def rolled_back(self, rewind: Rewind, history: dict[str, Any], ladder: dict[str, Any]) -> None:
        """A `Rollback` was carried out: go back with the history that the state was saved with, and on with rank 0's
        ladder."""
        self.restore(history, ladder)
        ladder_, incident = self._ladder, self._ladder.open
        assert incident is not None
        incident.target = rewind.to_step
        incident.acted()
        ladder_.verified_step = min(ladder_.verified_step, rewind.to_step)
        if self._pin is not None and self._pin <= rewind.to_step:
            self._pin = None
        text = f"back from step {rewind.from_step} to step {rewind.to_step} ({rewind.source})"
        if rewind.quarantine is None:
            text += ", the same data once more"
        else:
            first, last = rewind.quarantine
            ladder_.left_out.append(LeftOut(first, last, incident.number, rewind.reason))
            ladder_.cooling.cool(self._config.cool, rewind.to_step, self._config.rewarm)
            text += f", batches {first} to {last} are left out"
            if ladder_.cooling.factor < 1:
                text += f", learning rate × {ladder_.cooling.factor:.3g} and back within {self._config.rewarm} steps"
        self._events.append(
            IncidentEvent(
                incident.number, "acted", rewind.attempt, rewind.to_step, rewind.next_batch, text,
                {"from step": rewind.from_step, "to step": rewind.to_step, "seconds": rewind.seconds},
            )
        )  # fmt: skip

    def cannot_roll_back(self, verdict: Rollback, stats: StepStats) -> Halt:
        """The verdict where there is no state to go back to."""
        where = f"there is no snapshot and no checkpoint of at most step {verdict.to_step} to go back to"
        return self._halt(stats, f"{verdict.reason}; {where}. {self._diagnosis((), stats)}")

    def next_revisit(self, steps_left: int) -> int | None:
        """Batch in quarantine to train on now, in the last steps of the run; None: go on with new data."""
        ladder = self._ladder
        if not self._config.revisit:
            return None
        if ladder.revisit is None:
            batches = sorted({index for entry in ladder.left_out for index in range(entry.first, entry.last + 1)})
            if not batches or steps_left > len(batches):
                return None
            ladder.revisit = batches
            self._events.append(
                IncidentEvent(0, "notice", 0, 0, batches[0], f"revisiting {len(batches)} quarantined batches")
            )
        if self._revisited >= len(ladder.revisit):
            return None
        self._revisited += 1
        return ladder.revisit[self._revisited - 1]


def _log_ratio(now: float, then: float) -> float:
    """log(now / then); infinite where now is no number."""
    if not math.isfinite(now):
        return math.inf
    return math.log(now / then) if now > 0 and then > 0 else 0.0
