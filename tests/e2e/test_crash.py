"""Killed at three instants, resumed each time, a run ends with the bits of one that nobody killed.

`benchmarks/crash.py` makes a hundred of these kills, at random.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from workspace import Workspace

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from crash import Kill, Plan, check, endure, ways_back  # noqa: E402

PLANS = (
    Plan("rank", seconds=0.0, save=2, rank=1),
    Plan("everything", seconds=5.0),
    Plan("ranks and agent", seconds=0.0, save=1),
)


@pytest.mark.timeout(400)
def test_three_kills_leave_no_trace(prepared: Workspace, uninterrupted: Workspace) -> None:
    options = ("checkpoint.every=4", "supervision.backoff_seconds=0.0", "telemetry.tensorboard=false")
    root, output = prepared.run_dir("small"), prepared.root / "output.txt"
    noted: list[Kill] = []
    argv = (sys.executable, "-m", "launcher.cli", "run", "config.yaml", *options)
    kills = endure(argv, root, PLANS, output=output, note=noted.append, cwd=prepared.root)
    assert [kill.victim for kill in kills] == [plan.victim for plan in PLANS]
    assert kills == noted
    check(root, uninterrupted.run_dir("small"), output)
    in_save, starting, at_first_save = ways_back(root, kills)
    assert in_save.resumed in (4, 8)
    assert starting.resumed == in_save.resumed, "it was killed before it had done anything"
    assert at_first_save.resumed - starting.resumed in (0, 4)
    assert in_save.noticing is None or in_save.noticing < 30
    starts = [record["start"] for record in prepared.ledger("small") if record["kind"] == "start"]
    assert starts == sorted(set(starts))
    assert prepared.outcome("small")["start"] == starts[-1]
