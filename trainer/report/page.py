"""From a story and its evidence to what the template needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from trainer.report.samples import Sample
from trainer.report.story import Story
from trainer.report.template import number
from trainer.telemetry.ledger import Record, batches

_NUM_WORST = 5
_NUM_DROPPED = 40
_NUM_RANKS = 16
_NUM_LAYERS = 8
_ODD = 2.0
"""A rank stands out when it differs from the median rank by this factor."""

_VERDICTS = {
    "recovered": "Recovered: the loss is back on the trajectory that it had.",
    "not verified": "Closed without proof: no alarm followed, but the loss is not back on the trajectory that it had.",
    "halted": "Halted: the run stopped with a diagnosis.",
    "open": "Open: the run had not yet proved that it recovered when this was written.",
}
_VERIFIED = {"recovered": "yes", "not verified": "no", "halted": "no, the run halted", "open": "not yet"}


def context_of(
    story: Story,
    samples: Sequence[Sample],
    usual: Mapping[str, float],
    spike: Mapping[str, float],
) -> dict[str, object]:
    """What the report says. `usual`, `spike`: gradient norm by layer; empty where they are not known."""
    odd, ranks_note, ranks_attempt = _ranks(story)
    taken_back = len(story.abandoned)
    steps_lost = f"{_count(taken_back, 'step')} taken back, {_count(len(story.dropped), 'attempt')} not applied"
    return {
        "number": story.incident,
        "title": " ".join(story.opened["text"].split()) or "an alarm",
        "verdict": _VERDICTS[story.outcome],
        "verified": _VERIFIED[story.outcome],
        "opened": story.opened,
        "left_out": ", ".join(batches(*ends) for ends in story.left_out) or "none",
        "rollbacks": len(story.rewinds),
        "steps_lost": steps_lost,
        "seconds_lost": f"{story.seconds_lost:.2f} s",
        "loss_before": _known(story.loss_before),
        "loss_at": number(story.loss_at),
        "loss_after": _known(story.loss_after),
        "events": story.events,
        "rewinds": [rewind | {"left_out": _range(rewind)} for rewind in story.rewinds],
        "dropped": story.dropped[:_NUM_DROPPED],
        "dropped_more": max(0, len(story.dropped) - _NUM_DROPPED),
        "ranks": odd,
        "ranks_note": ranks_note,
        "ranks_attempt": ranks_attempt,
        "has_norms": bool(spike),
        "grown": _grown(usual, spike),
        "samples": list(samples[:_NUM_WORST]),
        "num_samples": len(samples),
    }


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _known(value: float) -> str:
    return "–" if math.isnan(value) else number(value)


def _range(rewind: Record) -> str:
    ends = rewind["quarantine"]
    return "none: the same data again" if ends is None else f"{ends[0]}–{ends[1]}"


def _ranks(story: Story) -> tuple[list[dict[str, float]], str, int]:
    """The ranks of the first alarm, those that stand out only where there are many; a note; the attempt."""
    alarm = next((record for record in story.dropped if len(record.get("rank_grad_norms", [])) > 1), None)
    if alarm is None:
        return [], "", 0
    norms, losses = alarm["rank_grad_norms"], alarm["rank_losses"]
    losses = losses if len(losses) == len(norms) else [math.nan] * len(norms)
    strange = _stand_out(norms) | _stand_out(losses)
    shown = range(len(norms)) if len(norms) <= _NUM_RANKS else sorted(strange)[:_NUM_RANKS]
    note = f"{_count(len(norms), 'rank')}; " + (
        f"rank{'' if len(strange) == 1 else 's'} {', '.join(map(str, sorted(strange)))} "
        f"stand{'s' if len(strange) == 1 else ''} out"
        if 0 < len(strange) <= len(norms) // 2
        else "none stands out from the others"
    )
    return [{"rank": rank, "loss": losses[rank], "norm": norms[rank]} for rank in shown], f"{note}.", alarm["attempt"]


def _stand_out(values: Sequence[float]) -> set[int]:
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    if not finite.any():
        return set()
    middle = float(np.median(array[finite]))
    odd = ~finite | (np.abs(array) > _ODD * abs(middle)) | (np.abs(array) * _ODD < abs(middle))
    return {int(rank) for rank in np.flatnonzero(odd)}


def _grown(usual: Mapping[str, float], spike: Mapping[str, float]) -> list[dict[str, object]]:
    """The layers that grew most; a norm that is not finite grew without bound."""

    def ratio(label: str) -> float:
        before, now = usual[label], spike[label]
        return math.inf if not math.isfinite(now) else now / before if before > 0 else math.nan

    grown = {label: ratio(label) for label in spike if label in usual}
    largest = sorted(grown, key=lambda label: -math.inf if math.isnan(grown[label]) else grown[label], reverse=True)[
        :_NUM_LAYERS
    ]
    return [{"name": label, "usual": usual[label], "now": spike[label], "ratio": grown[label]} for label in largest]
