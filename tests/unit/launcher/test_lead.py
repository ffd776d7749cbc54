"""When ranks are asked to stop before a time limit."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.slurm.lead import MARGIN_SECONDS, Lead, needed
from trainer.config.files import RunFiles


def write_ledger(root: Path, *records: dict[str, object]) -> RunFiles:
    files = RunFiles(root)
    files.ledger.write_text("".join(json.dumps({"start": 1, "time": 0.0} | record) + "\n" for record in records))
    return files


def test_without_a_limit_nothing_is_asked(tmp_path: Path) -> None:
    assert Lead(RunFiles(tmp_path), lambda: None, 120).due(1e12) is None


def test_the_sites_lead_holds_where_saves_are_quick(tmp_path: Path) -> None:
    lead = Lead(RunFiles(tmp_path), lambda: 10_000.0, 120)
    assert lead.due(9_879.0) is None
    assert lead.due(9_881.0) == "119 s until the time limit of the job"


def test_slow_saves_are_begun_earlier_and_said(tmp_path: Path) -> None:
    files = write_ledger(
        tmp_path,
        {"kind": "attempt", "seconds": 10.0},
        {"kind": "checkpoint", "seconds": 1.0, "seconds_written": 100.0},
    )
    assert needed(files) == 2 * 10 + 2 * 100 + MARGIN_SECONDS
    lead = Lead(files, lambda: 10_000.0, 120)
    assert lead.due(9_764.0) is None
    why = lead.due(9_766.0)
    assert why is not None
    assert why.startswith("234 s until the time limit of the job; a step and a save need up to 235 s here, more than")
    assert "signal_seconds (120)" in why


def test_saves_that_become_slow_are_noticed(tmp_path: Path) -> None:
    files = write_ledger(tmp_path, {"kind": "checkpoint", "seconds": 1.0, "seconds_written": 1.0})
    lead = Lead(files, lambda: 10_000.0, 30)
    assert lead.due(9_000.0) is None
    write_ledger(tmp_path, {"kind": "checkpoint", "seconds": 1.0, "seconds_written": 400.0})
    assert lead.due(9_190.0) is not None


def test_a_limit_that_is_moved_is_noticed(tmp_path: Path) -> None:
    ends = [10_000.0]
    lead = Lead(RunFiles(tmp_path), lambda: ends[0], 120)
    assert lead.due(9_000.0) is None
    ends[0] = 20_000.0
    assert lead.due(9_900.0) is None
    assert lead.due(19_900.0) is not None
