"""`trimtab run` by itself: what is killed or stops is noticed, started again, and ends with the bits of a run to which
nothing happened; what crashes every time is given up; and nothing is ever left behind."""

from __future__ import annotations

import re
import signal
import sys

import psutil
import pytest
from test_run import wait_for_step
from workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

AT_ONCE = "checkpoint.background=false"
"""So that a checkpoint is there when the next step begins."""

STOPS = ", ".join(f'"at(step={step}, rank=0, start=3).stop()"' for step in (24, 25, 26))
"""A stopped rank is let go on for a moment to write down its stacks: it stops again before it gets any further."""

HARM = f'faults=["at(step=14, rank=1, start=2).kill()", {STOPS}]'


def test_killed_and_stopped_in_turn_it_ends_with_the_same_bits(prepared: Workspace, uninterrupted: Workspace) -> None:
    """Start 1: trimtab and the agent are killed, with a rank stopped. Start 2: a rank is killed. 3: one is stopped."""
    run = prepared.run_dir("small")
    options = ("config.yaml", HARM, "supervision.hang_seconds=30", "supervision.backoff_seconds=0.1", AT_ONCE)
    process = prepared.start(sys.executable, "-m", "launcher.cli", "run", *options)
    wait_for_step(process, run, 3)
    trimtab = psutil.Process(process.pid)
    (agent,) = trimtab.children()
    family = trimtab.children(recursive=True)
    ranks = agent.children()
    assert len(ranks) == 2
    ranks[0].send_signal(signal.SIGSTOP)
    trimtab.kill()
    agent.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    process.communicate()

    code, output = prepared.trimtab("run", *options)
    assert code == 0, output
    # on a machine with much else to do the agent can collect it before anybody has seen what it died of
    killed = re.search(
        r"(rank 1 (?:was killed by signal 9 \(.*\)|died)): starting again now from step-00000010", output
    )
    assert killed, output
    assert "from rank 0 (computing, step 23; stopped by a signal)" in output
    assert "starting again now from step-00000020" in output
    started = [record for record in prepared.ledger("small") if record["kind"] == "start"]
    assert [record["start"] for record in started] == [1, 2, 3, 4]
    assert [(record["relaunched"] or {"reason": None})["reason"] for record in started][:3] == [None, None, killed[1]]
    stacks = [path.read_text() for path in sorted((run / "hangs").glob("*/rank-*.txt"))]
    assert ["stopped by a signal" in text.splitlines()[0] for text in stacks] == [True, False]
    assert all("loop.py" in text for text in stacks)
    assert prepared.final_state("small") == uninterrupted.final_state("small")


def test_a_run_that_crashes_every_time_is_given_up(prepared: Workspace) -> None:
    deaths = 'faults=["at(step=2, rank=1, start=1).kill()", "at(step=2, rank=1, start=2).kill()"]'
    options = ("supervision.restarts=1", "supervision.backoff_seconds=0.1")
    code, output = prepared.trimtab("run", "config.yaml", deaths, *options)
    assert code == 1, output
    assert "starting again in 0.1 s from the beginning (1 of 1 without a new checkpoint)" in output
    assert "gave up: 2 starts in a row brought no new checkpoint (supervision.restarts=1)" in output
    outcome = prepared.outcome("small")
    assert (outcome["reason"], outcome["exit_code"], outcome["start"]) == ("crashed", 1, 2)
    code, output = prepared.trimtab("status")
    assert "crashed" in output
