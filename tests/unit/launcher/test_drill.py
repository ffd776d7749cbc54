"""What a drill runs, and what it says at its end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.drill import closing, drill_config, passed, table
from trainer.config.load import load_config
from trainer.config.resolve import arithmetic
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.optim.schedule import learning_rate

ROOT = Path(__file__).parents[3]


def config_of(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs/quickstart.yaml", overrides)


def test_a_drill_is_the_users_run_only_shorter() -> None:
    config = config_of(
        "schedule.duration=5200", "schedule.warmup=400", "guard.spike=7", "faults=[at(step=9).disagree()]"
    )
    short = drill_config(config, 60, 20)
    for section in ("data", "model", "objective", "batch", "optim", "zero", "cluster", "seed"):
        assert getattr(short, section) == getattr(config, section)
    assert short.name == "drill-quickstart"
    assert short.guard.spike == 7
    assert short.faults == ()
    assert (short.schedule.duration, short.schedule.warmup, short.schedule.kind) == (80, 6, config.schedule.kind)
    assert short.snapshots.every == 3
    assert short.checkpoint.every is None


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_its_schedule_is_the_users_drawn_together(kind: str, unit: str) -> None:
    amount = 1 if unit == "steps" else 8 * 256
    long = config_of(
        f"schedule.kind={kind}", f"schedule.unit={unit}", f"schedule.duration={800 * amount}",
        f"schedule.warmup={200 * amount}",
    )  # fmt: skip
    short = drill_config(long, 60, 20)
    for step in (1, 10, 20, 40, 60, 79, 80):
        expected = learning_rate(long.optim, long.schedule, arithmetic(long, 2), step * 10)
        found = learning_rate(short.optim, short.schedule, arithmetic(short, 2), step)
        assert found == pytest.approx(expected, rel=0.02)


def test_too_short_a_drill_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 40 steps, not 39"):
        drill_config(config_of(), 39, 100)


def report(**changes: Any) -> dict[str, Any]:
    result = {
        "name": "weight-bit",
        "sentence": "at(step=40, rank=0).flip_bit_in_weight()",
        "passed": True,
        "outcome": "recovered",
        "why": "",
        "detected_after": 1,
        "rungs": ["rollback"],
        "lost": 6,
        "seconds_recovering": 0.41,
        "seconds": 3.0,
        "held_out_loss": 2.5,
        "difference": 0.0,
        "same_bits": "clean",
        "quarantine": [],
    }
    clean = {"held_out_loss": 2.5, "seconds": 3.0, "alarms": []}
    return {
        "root": "runs/x",
        "steps": 60,
        "before": 20,
        "ranks": 2,
        "stage": 2,
        "clean": clean,
        "results": [result | changes],
    }


def shown(told: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(table(told))
    return file.getvalue()


def test_the_table_and_the_verdict() -> None:
    good = report()
    assert passed(good)
    assert "✓ recovered" in shown(good)
    assert "the clean run" in shown(good)
    assert closing(good) == ["1 of 1 faults ended as they should; ledgers and incidents: runs/x"]
    bad = report(passed=False, outcome="failed", why="60 steps were lost", held_out_loss=None, difference=None)
    assert not passed(bad)
    assert "✗ failed" in shown(bad)
    assert closing(bad)[:2] == ["weight-bit failed: 60 steps were lost", "  at(step=40, rank=0).flip_bit_in_weight()"]
    alarmed = report()
    alarmed["clean"]["alarms"] = ["Skip(...)"]
    assert not passed(alarmed)
    assert closing(alarmed)[0] == "the clean run raised an alarm: Skip(...)"
