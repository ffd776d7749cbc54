"""What jobs leave behind of themselves, whole or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launcher.slurm.history import Job, append_begin, append_end, read_jobs
from trainer.config.files import RunFiles

FIRST = Job("7", 0, 1000.0, ("a", "b"), position=0, submitted=1.0)


def test_a_beginning_and_its_end_are_one_job(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    assert read_jobs(files) == []
    append_begin(files, FIRST)
    assert read_jobs(files) == [FIRST]
    ended = replace(FIRST, ended=1010.0, reached=4, reason="stopped", then="requeue", why="stopped by SIGUSR1")
    append_end(files, ended)
    assert read_jobs(files) == [ended]


def test_a_job_that_was_lost_ended_when_the_next_began(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    append_begin(files, FIRST)
    second = replace(FIRST, restart=1, began=1100.0, position=20)
    append_begin(files, second)
    lost = replace(FIRST, ended=1100.0, reached=20, reason="node", then="requeue")
    assert read_jobs(files) == [lost, second]


def test_the_end_of_a_cut_off_job_may_come_late(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    second = replace(FIRST, restart=1, began=1100.0, position=20)
    append_begin(files, FIRST)
    append_begin(files, second)
    append_end(files, replace(FIRST, ended=1200.0, reached=20, reason="superseded", then="end"))
    first, last = read_jobs(files)
    assert (first.ended, first.reason) == (1200.0, "superseded")
    assert last == second


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    append_begin(files, FIRST)
    with files.jobs.open("ab") as file:
        file.write(b'[1]\n{"kind": "begin"}\nnot JSON\n{"kind": "end", "job": "7", "rest')
    assert read_jobs(files) == [FIRST]
