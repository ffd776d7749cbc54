"""Accounts over anything that can happen to a run, against what a simulation of it knows: starts, skipped attempts,
saves, evaluations, rollbacks, crashes, requeues, starts again in the same allocation, clocks in whole milliseconds."""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.telemetry.books import account
from trainer.telemetry.goodput import PARTS, Accountant
from trainer.telemetry.ledger import FILE_NAME, Record, encode, standing

T = 1_800_000_000_000


@dataclass
class Done:
    """One attempt."""

    attempt: int
    step: int
    computing: int
    waiting: int
    applied: bool
    becomes: str = "stands"


@dataclass
class World:
    """A run in milliseconds. `truth` is kept by hand, and apart from how the accountant does it."""

    now: int = T
    records: list[Record] = field(default_factory=list)
    allocations: list[list[int]] = field(default_factory=list)
    """[began, ended]"""
    done: list[Done] = field(default_factory=list)
    rewinds: list[tuple[int, list[Done]]] = field(default_factory=list)
    truth: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    start: int = 0
    step: int = 0
    attempt: int = 0
    job: int = 0
    alive: bool = False
    ended: bool = False
    trained: bool = False
    positions: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    """(step, attempt) of what can be resumed from."""
    since: dict[str, int] = field(default_factory=dict)
    """What came after the newest attempt."""
    loose: int = 0
    """Of these, what came after the newest event."""
    seen: int = T
    rewound: list[tuple[int, list[Done]]] = field(default_factory=list)
    """All there ever were."""

    def tell(self, kind: str, **fields: Any) -> None:
        self.records.append({"kind": kind, "time": self.now / 1000, "start": self.start, **fields})
        self.seen, self.loose = self.now, 0

    def spend(self, part: str, milliseconds: int) -> None:
        self.now += milliseconds
        self.truth[part] += milliseconds
        self.since[part] = self.since.get(part, 0) + milliseconds

    def standing(self) -> list[Done]:
        return [done for done in self.done if done.becomes == "stands"]

    def begin(self, how: str, waits: int, loads: int, back: int) -> None:
        """how: here (the same allocation) · job (another one) · local (another one, without a scheduler)"""
        told: dict[str, Any] = {"job": None, "relaunched": None}
        if self.trained:
            self.truth["other"] -= self.loose
            self.truth["lost"] += self.loose
        if self.start == 0 or how != "here":
            if self.start:
                # how long it took until somebody noticed, only the allocations tell
                self.allocations[-1][1] = self.seen + waits
                self.now = self.seen + waits
                self.now += 2 * waits
            self.job = 0 if how == "local" else self.job + 1
            self.allocations.append([self.now, self.now])
        else:
            tail = self.now + waits - self.seen
            self.truth["ending" if self.ended else "lost"] += tail
            self.now += waits
            told["relaunched"] = None if self.job else {"ended": self.now / 1000}
        told["allocated"] = self.now / 1000
        if self.job:
            told["job"] = {"job": str(self.job), "restart": 0, "allocated": self.now / 1000, "nodes": [], "parts": {}}
        step, attempt = self.positions[-1 - back % len(self.positions)]
        for before, rows in reversed(self.rewinds):
            if before > attempt:
                for done in rows:
                    done.becomes = "stands"
        self.rewinds = [each for each in self.rewinds if each[0] <= attempt]
        for done in self.standing():
            if done.attempt > attempt or done.step > step:
                done.becomes = "lost"
        # what was taken back before it was lost stays that
        for before, rows in self.rewound:
            for done in rows:
                if done.becomes == "lost" and before > attempt and done.attempt > attempt:
                    done.becomes = "rolled_back"
        self.positions = [each for each in self.positions if each[1] <= attempt]
        self.start, self.step = self.start + 1, step
        self.alive, self.ended, self.trained, self.since = True, False, False, {}
        self.spend("starting", loads)
        self.tell("start", resumed_step=step, resumed_attempt=attempt, began=(self.now - loads) / 1000, **told)

    def pause(self, milliseconds: int) -> None:
        self.spend("other" if self.trained else "starting", milliseconds)
        loose = self.loose + milliseconds
        self.tell("message", text="something")
        self.loose = loose

    def train(self, computing: int, waiting: int, blocked: int, applied: bool) -> None:
        if blocked:
            loose = self.loose
            self.now += waiting + blocked
            self.tell("snapshot", step=self.step, seconds=blocked / 1000)
            self.now -= waiting + blocked
            self.loose = loose
        self.attempt += 1
        self.step += applied
        self.now += computing + waiting + blocked
        self.truth["checkpoints"] += blocked
        self.done.append(Done(self.attempt, self.step if applied else self.step + 1, computing, waiting, applied))
        self.done[-1].becomes = "stands" if applied else "rolled_back"
        self.tell(
            "attempt",
            attempt=self.attempt,
            step=self.done[-1].step,
            seconds=(computing + waiting + blocked) / 1000,
            seconds_data=waiting / 1000,
            applied=applied,
        )
        self.trained, self.since = True, {}

    def save(self, blocked: int) -> None:
        if self.trained:
            self.spend("checkpoints", blocked)
            self.tell("checkpoint", step=self.step, seconds=blocked / 1000)
            self.positions.append((self.step, self.attempt))

    def evaluate(self, milliseconds: int) -> None:
        self.now += milliseconds
        self.truth["evaluation"] += milliseconds
        self.tell("evaluation", step=self.step, seconds=milliseconds / 1000)
        self.trained = True

    def go_back(self, depth: int, milliseconds: int, killed: bool) -> None:
        """`killed`: a crash before what was saved of later steps is removed."""
        if not self.trained or not self.attempt:
            return
        to = max(0, self.step - depth)
        self.now += milliseconds
        self.truth["rolled_back"] += milliseconds
        rows = [done for done in self.standing() if done.step > to]
        for done in rows:
            done.becomes = "rolled_back"
        self.rewinds.append((self.attempt, rows))
        self.rewound.append((self.attempt, rows))
        self.step = to
        self.positions = [each for each in self.positions if each[0] <= to or killed] or [(0, 0)]
        self.tell("rewind", attempt=self.attempt, to_step=to, seconds=milliseconds / 1000)
        self.since = {}

    def end(self, reason: str, milliseconds: int) -> None:
        self.now += milliseconds
        good = reason != "crashed"
        part = "ending" if good else "lost"
        if not self.trained:
            part = "starting"
        self.truth[part] += milliseconds
        if not good and self.trained:
            self.truth["other"] -= self.loose
            self.truth["lost"] += self.loose
        if good and self.trained:
            for name in ("other", "checkpoints"):
                self.truth[name] -= self.since.get(name, 0)
                self.truth["ending"] += self.since.get(name, 0)
        self.tell("outcome", reason=reason)
        self.alive, self.ended = False, good

    def expected(self) -> dict[str, int]:
        found = dict(self.truth)
        for done in self.done:
            if done.becomes == "stands":
                found["steps"] += done.computing
                found["data"] += done.waiting
            else:
                found[done.becomes] += done.computing + done.waiting
        return found


SHORT = st.integers(0, 3000)
EVENTS = st.one_of(
    st.tuples(st.just("train"), SHORT, SHORT, SHORT, st.booleans() | st.just(True)),
    st.tuples(st.just("train"), SHORT, SHORT, st.just(0), st.just(True)),
    st.tuples(st.just("pause"), SHORT),
    st.tuples(st.just("save"), SHORT),
    st.tuples(st.just("evaluate"), SHORT),
    st.tuples(st.just("go_back"), st.integers(0, 9), SHORT, st.booleans()),
    st.tuples(st.just("end"), st.sampled_from(["completed", "stopped", "halted", "crashed"]), SHORT),
    st.tuples(st.just("begin"), st.sampled_from(["here", "job", "local"]), SHORT, SHORT, st.integers(0, 3)),
)


def live(events: list[tuple[Any, ...]]) -> World:
    world = World()
    for name, *arguments in events:
        if name == "begin" or not world.alive:
            how = arguments if name == "begin" else ["job", 50, 500, 0]
            if how[0] == "here" and world.start == 0:
                how = ["job", *how[1:]]
            world.begin(*how)
        if name != "begin":
            getattr(world, name)(*arguments)
    if world.alive:
        world.end("stopped", 1)
    if world.start:
        world.allocations[-1][1] = world.seen
    return world


def microseconds(parts: Any) -> dict[str, int]:
    return {name: round(seconds * 1e6) for name, seconds in parts.items()}


@settings(max_examples=400, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=60))
def test_every_second_is_in_one_part_and_in_the_right_one(events: list[tuple[Any, ...]]) -> None:
    world = live(events)
    accountant = Accountant()
    for record in world.records:
        accountant.feed(record)
        found = accountant.goodput()
        assert min(found.parts.values()) >= 0
        assert abs(math.fsum(found.parts.values()) - found.allocated) < 1e-6
    found = accountant.goodput()
    expected = world.expected()
    # what the ledger alone cannot know: how long an allocation went on after its last record
    assert microseconds(found.parts) == {name: 1000 * value for name, value in expected.items()}
    stand = standing(world.records)
    blocked = math.fsum(record["seconds"] for record in world.records if record["kind"] == "snapshot")
    whole = math.fsum(record["seconds"] for record in stand)
    useful = found.parts["steps"] + found.parts["data"]
    assert whole - blocked - 1e-6 <= useful <= whole + 1e-6

    allocations = [(began / 1000, ended / 1000) for began, ended in world.allocations]
    known = accountant.goodput(allocations)
    assert round(known.allocated * 1000) == sum(ended - began for began, ended in world.allocations)
    assert min(known.parts.values()) >= 0
    assert abs(math.fsum(known.parts.values()) - known.allocated) < 1e-6
    assert {name: known.parts[name] for name in PARTS if name not in ("lost", "ending", "starting")} == {
        name: found.parts[name] for name in PARTS if name not in ("lost", "ending", "starting")
    }


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=60), st.sets(st.integers(0, 80)))
def test_gone_on_with_from_any_record_the_accounts_are_the_same(events: list[tuple[Any, ...]], at: set[int]) -> None:
    world = live(events)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        straight, keeping = Accountant(), account(path)
        with path.open("ab", buffering=0) as file:
            for number, record in enumerate(world.records):
                straight.feed(record)
                keeping.feed(record)
                file.write(encode(record))
                if number in at:
                    file.write(encode({"kind": "goodput", "time": 0.0, "start": record["start"], **straight.record()}))
                    keeping = account(path)
                assert keeping.record() == straight.record()
                assert account(path).record() == straight.record()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "kind": st.sampled_from(
                    ["start", "attempt", "snapshot", "evaluation", "checkpoint", "rewind", "outcome", "message", "new"]
                ),
                "time": st.floats(1e9, 1e9 + 100),
                "start": st.just(1),
                "seconds": st.floats(0, 200),
                "seconds_data": st.floats(0, 200),
                "step": st.integers(0, 8),
                "attempt": st.integers(0, 8),
                "to_step": st.integers(0, 8),
                "resumed_step": st.integers(0, 8),
                "resumed_attempt": st.integers(0, 8),
                "applied": st.booleans(),
                "reason": st.sampled_from(["completed", "crashed"]),
                "began": st.floats(1e9, 1e9 + 100),
                "relaunched": st.none() | st.fixed_dictionaries({"ended": st.floats(1e9, 1e9 + 100)}),
                "job": st.none() | st.fixed_dictionaries({"job": st.just("1"), "restart": st.integers(0, 2)}),
            }
        ),
        max_size=40,
    ),
    st.lists(st.tuples(st.floats(1e9, 1e9 + 50), st.none() | st.floats(1e9, 1e9 + 150)), max_size=4),
)
def test_no_nonsense_makes_a_second_count_twice(
    records: list[Record], allocations: list[tuple[float, float | None]]
) -> None:
    accountant = Accountant()
    for record in records:
        accountant.feed(record)
        for found in (accountant.goodput(), accountant.goodput(allocations, 1e9 + 120)):
            assert min(found.parts.values()) >= 0
            assert abs(math.fsum(found.parts.values()) - found.allocated) < 1e-6
            assert found.allocated <= 150, "all of it lies in these seconds"
