"""Promise 1 through the whole loop: with guard, snapshots, audit, checksums and measurements on, the bits are those of
a bare DeepSpeed loop. And of the ladder what no drill shows: batches that come back, and nothing to go back to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pool import RankPool
from test_engine import LR, bare_loop
from workload import make_batch, make_config, make_engine, weights

from trainer.config.schema import RunConfig
from trainer.data.order import Quarantine
from trainer.engine.snapshot import SnapshotRing
from trainer.errors import RunHaltedError
from trainer.heartbeat import NoHeartbeat
from trainer.loop import Parts, Progress, train
from trainer.records import Batch, Position, Rewind, StepStats, Verdict
from trainer.recovery import NoReports, Notes, Recovery
from trainer.saving import NoSaving
from trainer.stability import Guard
from trainer.stop import StopRequest
from trainer.telemetry.silent import NoTelemetry
from trainer.telemetry.timing import StepTimer

STEPS = 12


class MadeUp:
    """The batches of the workload, as a stream."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, bad: tuple[int, ...] = ()):
        self._config, self._rank, self._world_size = config, rank, world_size
        self._bad = list(bad)
        self.next_batch = 0
        self.quarantine = Quarantine()

    def __next__(self) -> Batch:
        index = self.quarantine.next_allowed(self.next_batch)
        self.next_batch = index + 1
        return self.read(index)

    def read(self, batch_index: int) -> Batch:
        batch = make_batch(self._config, batch_index, self._rank, self._world_size)
        if batch_index in self._bad and self.next_batch < 100:
            for micro in batch.micro_batches:
                micro["labels"] = np.flip(micro["input_ids"], axis=1).copy()
        return batch

    def seek(self, next_batch: int) -> None:
        self.next_batch = next_batch

    def leave_out(self, first: int, last: int) -> None:
        self.quarantine = self.quarantine.with_range(first, last)

    def close(self) -> None:
        pass


class Heard(NoTelemetry):
    def __init__(self) -> None:
        self.attempts: list[tuple[int, int, str]] = []
        self.rewinds: list[Rewind] = []
        self.snapshots: list[int] = []
        self.measured: list[int] = []

    def record_attempt(self, stats: StepStats, verdict: Verdict, *_: object, **__: object) -> None:
        self.attempts.append((stats.step, stats.batch_index, type(verdict).__name__))

    def record_rewind(self, rewind: Rewind) -> None:
        self.rewinds.append(rewind)

    def record_snapshot(self, step: int, *_: object) -> None:
        self.snapshots.append(step)

    def record_structure(self, step: int, *_: object) -> None:
        self.measured.append(step)


class Settling(NoSaving):
    """Notes that what was being written was waited for."""

    settled = 0

    def settle(self) -> None:
        self.settled += 1


def loop(
    rank: int, world_size: int, config: RunConfig, steps: int, *, bad: tuple[int, ...] = (), start: int = 0
) -> dict[str, Any]:
    engine = make_engine(config, rank, world_size)
    guard = Guard(
        config.guard,
        clip=config.optim.clip,
        clipping=config.optim.clipping,
        parameter_names=engine.names,
        can_replay=True,
        can_examine=True,
        can_roll_back=True,
    )
    stream, heard, saver = MadeUp(config, rank, world_size, bad), Heard(), Settling()
    ring = SnapshotRing(engine, config.snapshots.keep)

    def load(step: int) -> Notes | None:
        return None

    recovery = Recovery(
        engine, stream, guard, heard, NoReports(), saver, ring=ring, every=config.snapshots.every or 1, load=load
    )
    parts = Parts(
        config=config,
        steps=steps,
        engine=engine,
        stream=stream,
        guard=guard,
        recovery=recovery,
        telemetry=heard,
        timer=StepTimer(1, 1.0, None, lambda: 0),
        stop=StopRequest(),
        learning_rate=lambda _: LR,
        evaluate=lambda _: math.nan,
        saver=saver,
        heartbeat=NoHeartbeat(),
    )
    halted = None
    try:
        train(parts, Progress(Position(step=start)))
    except RunHaltedError as error:
        halted = str(error)
    ring.close()
    return {
        "weights": weights(engine),
        "heard": vars(heard),
        "halted": halted,
        "left_out": stream.quarantine.ranges,
        "settled": saver.settled,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_of_it_changes_a_bit(two_ranks: RankPool, stage: int, precision: str) -> None:
    config = make_config(
        zero={"stage": stage},
        precision=precision,
        snapshots={"every": 3, "keep": 2},
        guard={"checksum_every": 2},
        telemetry={"weights_every": 2},
        evaluation={"every": None},
        checkpoint={"every": None},
    )
    bare = two_ranks(bare_loop, config=config, steps=STEPS)
    for result, expected in zip(two_ranks(loop, config=config, steps=STEPS), bare, strict=True):
        heard = result["heard"]
        assert [verdict for _, _, verdict in heard["attempts"]] == ["Step"] * STEPS
        assert heard["snapshots"] == [0, 3, 6, 9]
        assert heard["measured"] == [2, 4, 6, 8, 10, 12]
        for name, value in expected.items():
            np.testing.assert_array_equal(result["weights"][name], value, err_msg=name)


def test_quarantined_batches_come_back_in_the_last_steps(two_ranks: RankPool) -> None:
    """Harmful from the state that they came to; from the last one they are ordinary."""
    config = make_config(guard={"revisit": True, "spike": 3.0}, evaluation={"every": None}, checkpoint={"every": None})
    results = two_ranks(loop, config=config, steps=104, bad=(60, 61))
    for result in results:
        attempts = result["heard"]["attempts"]
        assert result["left_out"] == ((60, 61),)
        assert [batch for _, batch, verdict in attempts if verdict == "Skip"] == [60, 61]
        assert attempts[-2:] == [(103, 60, "Step"), (104, 61, "Step")]
        assert [step for step, _, verdict in attempts if verdict == "Step"] == list(range(1, 105))


def test_where_there_is_nothing_to_go_back_to_it_halts_and_says_so(two_ranks: RankPool) -> None:
    """A run that begins at step 50 has no older state."""
    config = make_config(
        guard={"clean_steps": 90}, snapshots={"every": 25}, evaluation={"every": None}, checkpoint={"every": None}
    )
    results = two_ranks(lost_learning_rate, config=config)
    for result in results:
        assert "no snapshot and no checkpoint of at most step" in result["halted"]
        # before going back, and before the run ends: what was begun becomes whole
        assert result["settled"] == 2
        assert not result["heard"]["rewinds"]


def lost_learning_rate(rank: int, world_size: int, config: RunConfig) -> dict[str, Any]:
    import trainer.engine.zero as zero

    usual = zero.Engine.apply
    calls = 0

    def apply(self: Any, clip: float, lr: float, scales: Any = None) -> bool:
        nonlocal calls
        calls += 1
        return usual(self, clip, lr * (3000 if calls == 60 else 1), scales)

    zero.Engine.apply = apply  # type: ignore[method-assign]
    try:
        return loop(rank, world_size, config, 140, start=50)
    finally:
        zero.Engine.apply = usual  # type: ignore[method-assign]
