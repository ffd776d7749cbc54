"""Goodput: what became of the time that a run was allocated. Pure; standard library only; `books.py` reads ledgers.

Time is cut at the records of a ledger, in whole microseconds: every moment of a run's allocations goes to exactly one
part, so that the parts sum to what was allocated. Wall time, whatever the number of nodes.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Span = tuple[int, int, str]
"""Accounted for: from, until (µs since 1970), and the part that the rest of its allocation belongs to."""

PARTS = ("steps", "data", "starting", "evaluation", "checkpoints", "rolled_back", "lost", "ending", "other")
"""What time is spent on; `docs/goodput.md` says what belongs to each."""

Phase = str
"""none · starting (no attempt yet) · training · ended"""

_FAILED = ("crashed", "superseded")
_MICRO = 1_000_000
_ATTEMPT, _STEP, _COMPUTING, _WAITING, _AFTER = range(5)
_WIDTH = 5


@dataclass(frozen=True, slots=True)
class Goodput:
    """What became of the time that a run was allocated so far, in seconds of wall time."""

    parts: Mapping[str, float]
    """By name, in the order of `PARTS`."""
    allocated: float
    queued: float = 0.0
    """Between jobs, waiting for the next: not allocated."""

    @property
    def fraction(self) -> float:
        """Time in standing steps, with their waiting for data, over time allocated; 0.0 where none was."""
        return (self.parts["steps"] + self.parts["data"]) / self.allocated if self.allocated else 0.0

    def share(self, part: str) -> float:
        """Of a part in the time allocated."""
        return self.parts[part] / self.allocated if self.allocated else 0.0


class _Attempts:
    """Attempts whose updates stand, 40 bytes each. Of each row: attempt, step, and in µs its computing, its waiting for
    data, and what came after it that nothing explains. Attempts and steps both ascend."""

    def __init__(self) -> None:
        self.rows = array("q")

    def __len__(self) -> int:
        return len(self.rows) // _WIDTH

    def push(self, attempt: int, step: int, computing: int, waiting: int) -> None:
        self.rows.extend((attempt, step, computing, waiting, 0))

    def take(self, row: int, column: int, at_most: int) -> int:
        """Takes from a time of a row as much as there is."""
        taken = min(at_most, self.rows[row * _WIDTH + column])
        self.rows[row * _WIDTH + column] -= taken
        return taken

    def until(self, column: int, limit: float) -> int:
        """How many rows, from the first, have at most `limit` in a column that ascends."""
        return bisect_right(range(len(self)), limit, key=lambda row: self.rows[row * _WIDTH + column])

    def cut(self, number: int) -> array[int]:
        """Removes and gives back all rows after the first `number`."""
        rows = self.rows[number * _WIDTH :]
        del self.rows[number * _WIDTH :]
        return rows


class Accountant:
    """Takes the records of a ledger in order, and says at any time what became of the time.

    Args:
        earlier: of an accountant that was restored: the accounts of what came before, kept from a place on that lies
            at most at the given step and attempt. Asked when a resume or a rollback goes back that far.
    """

    def __init__(self, earlier: Callable[[float, float], Accountant] | None = None) -> None:
        self._seconds = dict.fromkeys(PARTS, 0)
        self._queued = 0
        self._spans: list[Span] = []
        self._from = self._until = 0
        """The newest span, up to where it is accounted for."""
        self._seen = 0
        """Last sign of life."""
        self._phase: Phase = "none"
        self._tail = "lost"
        self._job: list[Any] | None = None
        self._step = self._attempt = 0
        self._after = self._saved = 0
        """Since the newest attempt: what nothing explains, and what saving took of it."""
        self._blocked = 0
        """By snapshots, within the attempt whose record comes next."""
        self._attempts = _Attempts()
        self._undone: list[tuple[int, array[int]]] = []
        """What each rollback took back, by the attempt that asked for it."""
        self._base: tuple[float, float] = (0, 0)
        """Step and attempt from which on rows are kept."""
        self._earlier = earlier

    @classmethod
    def restored(cls, record: Record, earlier: Callable[[float, float], Accountant] | None = None) -> Accountant:
        """As it was when it gave `record`.

        Raises:
            KeyError, TypeError, ValueError: it is no record of this version.
        """
        self, state = cls(earlier), record["state"]
        self._seconds = {part: _micro(record["parts"][part]) for part in PARTS}
        self._queued = _micro(record["queued"])
        self._spans = [(_micro(began), _micro(until), tail) for began, until, tail in state["spans"]]
        self._from, self._until, self._seen = (_micro(state[name]) for name in ("from", "until", "seen"))
        self._phase, self._tail, self._job = state["phase"], state["tail"], state["job"]
        self._after, self._saved, self._blocked = (_micro(state[name]) for name in ("after", "saved", "blocked"))
        self._step, self._attempt = record["step"], record["attempt"]
        self._base = self._step, self._attempt
        return self

    def record(self) -> Record:
        """The fields of a `goodput` record: the figures, and in `state` what it takes to go on from here."""
        now = self.goodput()
        return {
            "step": self._step,
            "attempt": self._attempt,
            "fraction": now.fraction,
            "allocated": now.allocated,
            "queued": now.queued,
            "parts": dict(now.parts),
            "state": {
                "from": self._from / _MICRO,
                "until": self._until / _MICRO,
                "seen": self._seen / _MICRO,
                "phase": self._phase,
                "tail": self._tail,
                "job": self._job,
                "after": self._after / _MICRO,
                "saved": self._saved / _MICRO,
                "blocked": self._blocked / _MICRO,
                "spans": [[began / _MICRO, until / _MICRO, tail] for began, until, tail in self._spans],
            },
        }

    def goodput(self, allocations: Iterable[tuple[float, float | None]] = (), now: float | None = None) -> Goodput:
        """What became of the time so far: up to the newest record, and of all of `allocations`.

        Args:
            allocations: (began, ended) of each, in Unix seconds; None: it goes on.
            now: Unix seconds, up to which an allocation that goes on counts; None: up to the newest record.
        """
        seconds, spans = dict(self._seconds), list(self._spans)
        if self._phase != "none":
            spans.append((self._from, self._until, self._tail))
        for began, ended in allocations:
            # what an allocation that goes on does right now, no record tells yet
            until = now if ended is None else ended
            present = {"starting": "starting", "training": "other"}.get(self._phase) if ended is None else None
            if until is not None:
                _cover(seconds, spans, _micro(began), _micro(until), present, goes_on=ended is None)
        parts = {part: seconds[part] / _MICRO for part in PARTS}
        return Goodput(parts, sum(seconds.values()) / _MICRO, self._queued / _MICRO)

    def feed(self, record: Record) -> None:
        """Take in the next record."""
        kind = record["kind"]
        if kind == "goodput" or (self._phase == "none" and kind != "start"):
            return
        time = _micro(record["time"])
        match kind:
            case "start":
                self._start(record, time)
            case "attempt":
                self._take_attempt(record, time)
            case "snapshot":
                self._blocked += _micro(record["seconds"])
            case "evaluation":
                self._pass(time - _micro(record["seconds"]), self._meanwhile)
                self._pass(time, "evaluation")
                self._phase = "training"
            case "checkpoint" if self._phase == "training":
                self._pass(time, "other")
                self._claim(record["step"], _micro(record["seconds"]))
            case "rewind":
                self._rewind(record, time)
            case "outcome":
                self._end(record["reason"], time)
        self._seen = max(self._seen, time)

    @property
    def _meanwhile(self) -> str:
        """Part of the time that no record explains."""
        return "starting" if self._phase == "starting" else "other"

    def _pass(self, time: int, part: str) -> None:
        """What lies between what is accounted for and `time` belongs to `part`."""
        seconds = time - self._until
        if seconds <= 0:
            return
        self._seconds[part] += seconds
        self._until = time
        if part == "other":
            self._after += seconds
            if self._attempts:
                self._attempts.rows[-1] += seconds

    def _move(self, seconds: int, source: str, target: str) -> None:
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def _move_rows(self, rows: array[int], target: str, sign: int = 1) -> None:
        """The time of attempts that no longer stand."""
        self._move(sign * sum(rows[_COMPUTING::_WIDTH]), "steps", target)
        self._move(sign * sum(rows[_WAITING::_WIDTH]), "data", target)

    def _unexplained(self, at_most: int) -> int:
        """Takes from what came since the newest attempt."""
        seconds = max(0, min(at_most, self._after))
        self._after -= seconds
        if self._attempts:
            self._attempts.take(len(self._attempts) - 1, _AFTER, seconds)
        return seconds

    def _start(self, record: Record, time: int) -> None:
        job, relaunched = record.get("job"), record.get("relaunched")
        told = (record.get("allocated"), relaunched and relaunched["ended"], record.get("began"))
        began = min(time, next((_micro(moment) for moment in told if moment), time))
        identity = [job["job"], job["restart"]] if job else None
        local = identity is None and self._job is None
        goes_on = self._phase != "none" and (relaunched is not None if local else identity == self._job)
        if self._phase != "none":
            self._pass(self._seen, "starting" if self._phase == "starting" else self._tail)
        if goes_on:
            self._pass(began, self._tail)
        else:
            if self._phase != "none":
                self._close(job, began)
            self._from = self._until = max(self._until, began)
        self._job, self._phase, self._tail = identity, "starting", "lost"
        self._after = self._saved = self._blocked = 0
        self._resume(record["resumed_step"], record.get("resumed_attempt", math.inf))
        self._pass(time, "starting")

    def _close(self, job: Record | None, began: int) -> None:
        """The allocation of the start before this one is over; how long it was, only the new job may know."""
        self._spans.append((self._from, self._until, self._tail))
        for earlier, ended in (job or {}).get("earlier", ()):
            _cover(self._seconds, self._spans, _micro(earlier), _micro(ended))
        self._until = max(until for _, until, _ in self._spans)
        if job and self._job:
            self._queued += max(0, began - self._until)

    def _take_attempt(self, record: Record, time: int) -> None:
        self._pass(time - _micro(record["seconds"]), self._meanwhile)
        seconds = max(0, time - self._until)
        self._until += seconds
        waiting = min(seconds, _micro(record["seconds_data"]))
        blocked = min(seconds - waiting, self._blocked)
        self._seconds["checkpoints"] += blocked
        computing = seconds - waiting - blocked
        if record["applied"]:
            step = record["step"]
            if self._attempts and self._attempts.rows[_STEP - _WIDTH] >= step:
                self._move_rows(self._attempts.cut(self._attempts.until(_STEP, step - 1)), "rolled_back")
            self._attempts.push(record["attempt"], step, computing, waiting)
            self._seconds["steps"] += computing
            self._seconds["data"] += waiting
            self._step = step
        else:
            self._seconds["rolled_back"] += computing + waiting
        self._attempt, self._phase = record["attempt"], "training"
        self._after = self._saved = self._blocked = 0

    def _claim(self, step: int, seconds: int) -> None:
        """A save of `step` held up the loop for so long: right after that step, and within the next attempt."""
        number = self._attempts.until(_STEP, step)
        if number == len(self._attempts):
            recent = self._unexplained(seconds)
            self._saved += recent
            self._move(recent, "other", "checkpoints")
            seconds -= recent
        if number and self._attempts.rows[(number - 1) * _WIDTH + _STEP] == step:
            earlier = self._attempts.take(number - 1, _AFTER, seconds)
            self._move(earlier, "other", "checkpoints")
            seconds -= earlier
            if number < len(self._attempts):
                self._move(self._attempts.take(number, _COMPUTING, seconds), "steps", "checkpoints")

    def _rewind(self, record: Record, time: int) -> None:
        began = time - _micro(record["seconds"])
        self._pass(began, "other")
        # a save that it had to wait for may have been told meanwhile
        self._move(self._unexplained(self._until - began), "other", "rolled_back")
        self._pass(time, "rolled_back")
        self._deepen(record["to_step"], math.inf)
        rows = self._attempts.cut(self._attempts.until(_STEP, record["to_step"]))
        self._move_rows(rows, "rolled_back")
        self._undone.append((record["attempt"], rows))
        self._step, self._attempt = record["to_step"], max(self._attempt, record["attempt"])
        self._after = self._saved = self._blocked = 0

    def _resume(self, step: int, attempt: float) -> None:
        """The run went on from the state after `attempt`: as if nothing had come after it, rollbacks included."""
        self._deepen(step, attempt)
        self._move_rows(self._attempts.cut(self._attempts.until(_ATTEMPT, attempt)), "lost")
        while self._undone and self._undone[-1][0] > attempt:
            back = _Attempts()
            back.rows = self._undone.pop()[1]
            back.cut(back.until(_ATTEMPT, attempt))
            self._move_rows(back.rows, "rolled_back", -1)
            self._attempts.rows.extend(back.rows)
        self._move_rows(self._attempts.cut(self._attempts.until(_STEP, step)), "lost")
        self._step = step
        self._attempt = self._attempt if math.isinf(attempt) else int(attempt)

    def _deepen(self, step: float, attempt: float) -> None:
        """Sees to it that the rows begin at most at a step and an attempt."""
        if self._earlier is None or (step >= self._base[0] and attempt >= self._base[1]):
            return
        older = self._earlier(step, attempt)
        self._attempts.rows = older._attempts.rows + self._attempts.rows
        self._undone = older._undone + self._undone
        self._base, self._earlier = older._base, older._earlier

    def _end(self, reason: str, time: int) -> None:
        self._tail = "lost" if reason in _FAILED else "ending"
        self._pass(time, "starting" if self._phase == "starting" else self._tail)
        if self._tail == "ending":
            # what came after the last attempt was the end already
            self._move(self._unexplained(self._after), "other", "ending")
            self._move(self._saved, "checkpoints", "ending")
            self._saved = 0
        self._phase = "ended"


def _cover(
    seconds: dict[str, int],
    spans: list[Span],
    began: int,
    ended: int,
    present: str | None = None,
    *,
    goes_on: bool = False,
) -> None:
    """Accounts for what `spans` leave out of an allocation, which is a span of its own from then on.

    Args:
        present: part of what comes after the last of the spans; None: what the span says.
    """
    if ended <= began:
        return
    within = sorted(span for span in spans if span[1] > began and span[0] < ended)
    # without any, no start of it ever gave a sign of life
    at, part = began, "starting" if within or goes_on else "lost"
    for start, until, tail in within:
        seconds[part] += max(0, start - at)
        at, part = max(at, until), tail
    if within and present is not None:
        part = present
    seconds[part] += max(0, ended - at)
    spans[:] = [span for span in spans if span not in within]
    first, last = within[0][0] if within else began, at
    spans.append((min(first, began), max(last, ended), part))


def _micro(seconds: float) -> int:
    return round(seconds * _MICRO)
