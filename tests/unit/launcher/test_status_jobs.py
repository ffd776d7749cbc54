"""What `trimtab status` shows of jobs: what the scheduler says, what their records say, and where it is silent."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from launcher import status
from launcher.details import details, lasted, node_seconds, start_up, visible
from launcher.slurm import standing
from launcher.slurm.history import Job, append_begin, append_end, read_jobs
from launcher.slurm.requeue import End, decide
from launcher.slurm.scheduler import JobState, SchedulerError
from launcher.slurm.site import SiteConfig
from launcher.slurm.standing import States, allocations, ask, ids_of, queued_seconds, standing_of
from launcher.slurm.submission import Submission, write_submission
from launcher.status import Fitted, overview, sentences, status_of, statuses, table
from trainer.config.files import RunFiles
from trainer.telemetry.goodput import Accountant
from trainer.telemetry.ledger import Record, encode

NOW = 1_800_000_000.0
FIRST = Job("12", 0, NOW - 100, ("a", "b"), 0, NOW - 130)


def state_of(state: str, *, job: str = "12", reason: str = "None", restarts: int = 0, nodes: int = 2) -> JobState:
    return JobState(job, state, reason, tuple("abcd"[:nodes]), restarts, None, None, "", {})


def known(state: str, **options: Any) -> States:
    found = state_of(state, **options)
    return {found.id: found}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "small")


def make_run(root: Path, job: str = "12", **changes: Any) -> Path:
    root.mkdir(parents=True)
    (root / "config.yaml").write_text("")
    submission = Submission(
        name="small", root=str(root), script="", workdir="", nodes=(2, 2), ranks_per_node=1, device="cpu",
        python="python", site=SiteConfig(), submitted=NOW - 130, job=job,
    )  # fmt: skip
    write_submission(submission.model_copy(update=changes))
    return root


def start(job: Job, time: float, number: int = 1, step: int = 0) -> Record:
    parts = {"preflight": 2.5, "prepare": 1.5}
    about = {"job": job.job, "restart": job.restart, "nodes": job.nodes, "allocated": job.began, "parts": parts}
    return {
        "kind": "start", "time": time, "start": number, "steps": 100, "resumed_step": step, "resumed_attempt": step,
        "began": job.began + 5, "seconds_loading": 3.0, "relaunched": None, "allocated": job.began, "job": about,
    }  # fmt: skip


def attempt(time: float, step: int, number: int = 1) -> Record:
    return {
        "kind": "attempt", "time": time, "start": number, "attempt": step, "step": step, "loss": 2.0, "applied": True,
        "seconds": 1.0, "seconds_data": 0.25, "tokens_per_second": 100.0,
    }  # fmt: skip


def write(root: Path, records: list[Record], *, accounts: bool = True) -> None:
    """A ledger as a run writes it, with its accounts where it stands."""
    accountant = Accountant()
    for record in records:
        accountant.feed(record)
    if accounts:
        last = records[-1]
        own = {"kind": "goodput", "time": last["time"], "start": last["start"], **accountant.record()}
        records = [*records, own]
    (root / "ledger.jsonl").write_bytes(b"".join(map(encode, records)))
    os.utime(root / "ledger.jsonl", (NOW - 5, NOW - 5))


def end(root: Path, reason: str, message: str = "") -> None:
    outcome = {"reason": reason, "exit_code": 1, "message": message, "step": 3, "steps": 100}
    (root / "outcome.json").write_text(json.dumps(outcome))
    os.utime(root / "outcome.json", (NOW - 4, NOW - 4))


def shown(*what: RenderableType, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(*what, sep="\n")
    return out.getvalue()


def line_of(found: status.RunStatus) -> str:
    return " ".join(shown(table([found])).splitlines()[1].split())


def test_a_job_that_waits(run: Path) -> None:
    found = status_of(run, NOW, known("PENDING", reason="Priority", nodes=0))
    assert (found.state, found.job, found.nodes) == ("queued", "12 PENDING (Priority)", "2")
    assert line_of(found).startswith("small queued 12 PENDING (Priority) 2 –")
    assert status_of(run, NOW, None).state == "queued", "nobody answered"
    assert status_of(run, NOW, {}).state == "prepared", "it is not known any more"
    make_run(run.parent / "range", nodes=(2, 4))
    assert status_of(run.parent / "range", NOW, known("PENDING", nodes=0)).nodes == "2–4"


def test_a_requeued_job_is_queued_whatever_its_ledger_says(run: Path) -> None:
    append_begin(RunFiles(run), FIRST)
    write(run, [start(FIRST, NOW - 90), attempt(NOW - 80, 1)])
    waiting = known("PENDING", reason="BeginTime", restarts=2, nodes=0)
    for _ in range(2):
        found = status_of(run, NOW, waiting)
        assert (found.state, found.job) == ("queued (requeued 2×)", "12 PENDING (BeginTime), requeued 2×")
        assert found.why == ""
        end(run, "stopped", "stopped by SIGUSR1")
    end(run, "completed")
    assert status_of(run, NOW, waiting).state == "finished"


def test_a_job_that_runs(run: Path) -> None:
    files, second = RunFiles(run), replace(FIRST, restart=1, began=NOW - 20)
    running = known("RUNNING", restarts=1)
    append_begin(files, FIRST)
    write(run, [start(FIRST, NOW - 90), attempt(NOW - 80, 1)])
    end(run, "stopped")
    append_end(files, replace(FIRST, ended=NOW - 60, reached=1, reason="stopped", then="requeue"))
    assert status_of(run, NOW, running).state == "starting", "the newest start is of the job before"
    append_begin(files, second)
    assert status_of(run, NOW, running).state == "starting"
    write(run, [start(FIRST, NOW - 90), attempt(NOW - 80, 1), start(second, NOW - 10, 2, 1), attempt(NOW - 5, 2, 2)])
    (run / "outcome.json").unlink()
    found = status_of(run, NOW, running)
    assert (found.state, found.job, found.nodes) == ("running", "12 RUNNING, requeued 1×", "2")
    # without the scheduler the files tell the same
    assert status_of(run, NOW, None).state == "running"
    assert status_of(run, NOW, None).job == "12, requeued 1×"


def test_goodput_over_the_jobs(run: Path) -> None:
    files = RunFiles(run)
    append_begin(files, FIRST)
    append_end(files, replace(FIRST, ended=NOW - 50, reached=2, reason="node", then="requeue"))
    second = replace(FIRST, restart=1, began=NOW - 20)
    append_begin(files, second)
    records = [start(FIRST, NOW - 90), attempt(NOW - 80, 1), attempt(NOW - 79, 2), attempt(NOW - 78, 3)]
    write(run, [*records, start(second, NOW - 10, 2, 2), attempt(NOW - 8, 3, 2)])
    found = status_of(run, NOW, known("RUNNING", restarts=1))
    # allocated: 50 s, and 20 s until now; two steps stand of the first job, one of the second
    assert found.goodput == pytest.approx(3 / 70)
    assert "4.3%" in line_of(found)
    assert "goodput" in shown(table([found]))
    write(run, records, accounts=False)
    old = status_of(run, NOW, None)
    assert old.goodput is None, "an old ledger is not read whole for a table"
    assert "goodput" not in shown(table([replace(old, job="")]))


@pytest.mark.parametrize(
    ("reason", "why", "answer", "state"),
    [
        ("halted", "", None, "halted"),
        ("crashed", "gave up: 3 starts in a row brought no new checkpoint (max_fruitless: 3)", {}, "crashed"),
        ("refused", "", known("FAILED"), "refused"),
        ("stopped", "", known("CANCELLED"), "cancelled"),
        ("stopped", "gave up: 9 jobs were used (max_jobs: 9)", None, "stopped"),
    ],
)
def test_a_job_that_ended_by_a_decision_says_why(
    run: Path, reason: str, why: str, answer: States | None, state: str
) -> None:
    files = RunFiles(run)
    append_begin(files, FIRST)
    write(run, [start(FIRST, NOW - 90), attempt(NOW - 80, 1)])
    message = "the loss\nis [bold]NaN[/bold]"
    end(run, reason, message)
    told = "; ".join(text for text in (message, why) if text)
    append_end(files, replace(FIRST, ended=NOW - 60, reached=1, reason=reason, then="end", why=told))
    found = status_of(run, NOW, answer)
    assert found.state == state
    (sentence,) = sentences([found])
    assert sentence == f"small: {state}: the loss\\nis [bold]NaN[/bold]{'; ' + why if why else ''}"


def test_a_cancelled_run_without_its_scheduler(run: Path) -> None:
    """The sentence is the one that `requeue.decide` gives."""
    end(run, "stopped", "stopped by SIGUSR1")
    last = replace(FIRST, ended=NOW - 60, reached=1, reason="stopped")
    then = decide([last], NOW, SiteConfig(), nodes_are_well=True, restarts=True, cancelled=True)
    assert isinstance(then, End)
    append_end(RunFiles(run), replace(last, then="end", why=then.why))
    found = status_of(run, NOW, None)
    assert found.state == "cancelled"
    assert sentences([found]) == ["small: cancelled: cancelled by the user; submitting it again goes on"]


@pytest.mark.parametrize("state", ["NODE_FAIL", "TIMEOUT", "FAILED"])
def test_a_job_that_is_over_for_the_scheduler_alone(run: Path, state: str) -> None:
    append_begin(RunFiles(run), FIRST)
    write(run, [start(FIRST, NOW - 90), attempt(NOW - 80, 1)])
    found = status_of(run, NOW, known(state))
    assert (found.state, found.why) == ("crashed", f"job 12 ended as {state}")
    assert sentences([found]) == [f"small: crashed: job 12 ended as {state}"]


def test_a_chain_shows_the_job_that_runs_and_then_the_one_that_waits(run: Path) -> None:
    """The next job is submitted when this one begins."""
    make_run(run.parent / "chain", job="13")
    root = run.parent / "chain"
    append_begin(RunFiles(root), FIRST)
    assert ids_of(root) == {"12", "13"}
    both = {**known("RUNNING"), **known("PENDING", job="13", reason="Dependency", nodes=0)}
    assert status_of(root, NOW, both).job == "12 RUNNING"
    assert status_of(root, NOW, None).job == "12"
    append_end(RunFiles(root), replace(FIRST, ended=NOW, reached=1, reason="signal", then="chain"))
    after = {**known("COMPLETED"), **known("PENDING", job="13", reason="Dependency", nodes=0)}
    found = status_of(root, NOW, after)
    assert (found.state, found.job) == ("queued", "13 PENDING (Dependency)")


def test_what_is_damaged_does_not_end_the_table(run: Path) -> None:
    (run / "submission.json").write_text("{")
    assert standing_of(run, None) is None
    assert status_of(run, NOW).state == "prepared"
    (run / "jobs.jsonl").write_text("nonsense\n[]\n")
    assert standing_of(run, None) is None


def test_names_that_would_do_something_to_a_terminal(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "a\nb\x1b[2J[red]"
    make_run(root, job="12")
    found = status_of(root, NOW, known("PENDING", reason="Priority", nodes=0))
    text = shown(table([found]))
    assert "a\\nb\\x1b[2J[red]" in text
    assert "\x1b" not in text
    assert visible("ä 中\t\u202e") == "ä 中\\t\\u202e"


def test_the_scheduler_is_asked_once_and_its_silence_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(run.parent / "other", job="15")
    asked: list[set[str]] = []

    def answer(ids: set[str]) -> States:
        asked.append(ids)
        return known("PENDING", reason="Priority", nodes=0)

    monkeypatch.setattr(standing.scheduler, "available", lambda: True)
    monkeypatch.setattr(standing.scheduler, "jobs", answer)
    page = overview(run.parent)
    assert page is not None
    assert asked == [{"12", "15"}]
    assert "12 PENDING (Priority)" in shown(page)

    def silent(_: set[str]) -> States:
        raise SchedulerError("squeue: Unable to\ncontact")

    monkeypatch.setattr(standing.scheduler, "jobs", silent)
    page = overview(run.parent)
    assert page is not None
    assert "the scheduler did not answer, jobs are shown as their files have them: squeue: Unable to\\ncontact" in (
        shown(page)
    )
    monkeypatch.setattr(standing.scheduler, "available", lambda: False)
    assert ask([run]) == (None, "there is no Slurm on this machine: jobs are shown as their files have them")
    (run / "submission.json").unlink()
    assert ask([run]) == (None, ""), "of runs that were never submitted nobody asks"
    (run / "logs").mkdir()
    assert overview(run / "logs") is None


def test_one_run_in_detail(run: Path) -> None:
    files = RunFiles(run)
    append_begin(files, FIRST)
    ended = replace(FIRST, ended=NOW - 50, reached=2, reason="signal", then="requeue", why="30 s until the time limit")
    append_end(files, ended)
    second = replace(FIRST, restart=1, began=NOW - 20)
    append_begin(files, second)
    records = [start(FIRST, NOW - 90), attempt(NOW - 80, 1), attempt(NOW - 79, 2), attempt(NOW - 78, 3)]
    write(run, [*records, start(second, NOW - 10, 2, 2), attempt(NOW - 8, 3, 2), attempt(NOW - 7, 4, 2)])
    text = shown(*details(run, NOW, None, alive=True))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(
        line.startswith("12 a,b ") and line.endswith("50.0 s 2 signal requeue 30 s until the time limit")
        for line in lines
    )
    assert any(line.startswith("12, requeued 1× a,b ") and " 20.0 s – runs – " in f"{line} " for line in lines)
    expected = ["steps that stand 3.0 s 4.3%", "waiting for data in them 1.0 s 1.4%", "starting 30.0 s 42.9%"]
    assert [line for line in expected if line in lines] == expected
    # 28 s from the last record of the first job to its end, and the step that was done again
    assert "lost to crashes 29.0 s 41.4%" in lines
    assert "allocated 1:10 100.0%" in lines
    assert "waiting in the queue 1:00 not allocated" in lines
    assert "start 2 time" in lines
    assert lines[-7:] == [
        "preflight 2.5 s", "preparing 1.5 s", "launching 1.0 s", "imports and building 2.0 s", "loading 3.0 s",
        "first step 2.0 s", "to the first step 12.0 s",
    ]  # fmt: skip


def test_a_run_without_jobs_in_detail(tmp_path: Path) -> None:
    root = tmp_path / "local"
    root.mkdir()
    (root / "config.yaml").write_text("")
    assert details(root, NOW, None, alive=False) == []
    local = start(FIRST, NOW - 90) | {"job": None, "allocated": NOW - 95, "began": NOW - 95}
    write(root, [local, attempt(NOW - 80, 1)])
    text = shown(*details(root, NOW, None, alive=False))
    assert "goodput 6.7%" in text
    assert "node hours" not in text
    assert "preflight" not in text


def test_start_up_of_old_ledgers_and_of_one_that_has_not_got_far() -> None:
    begun = start(FIRST, NOW - 90)
    assert list(start_up(begun, None)) == ["preflight", "preparing", "launching", "imports and building", "loading"]
    assert sum(start_up(begun, attempt(NOW - 88, 1)).values()) == pytest.approx(NOW - 88 - FIRST.began)
    assert start_up({"kind": "start", "time": NOW, "start": 1}, None) == {}
    old = {"kind": "start", "time": NOW, "start": 1, "began": NOW - 9}
    assert start_up(old, None) == {"launching": 0.0, "imports and building": 9.0, "loading": 0.0}


def test_allocations_of_jobs(run: Path) -> None:
    files = RunFiles(run)
    died = replace(FIRST, job="1")
    ended = replace(FIRST, job="2", began=NOW - 50, ended=NOW - 40, reason="stopped", then="requeue")
    last = replace(FIRST, job="3", began=NOW - 10)
    append_begin(files, died)
    append_end(files, ended)
    append_begin(files, last)
    jobs = read_jobs(files)
    # when the node died nobody knows: its ledger tells, not the time at which the next began
    assert allocations(jobs, goes_on=True) == [(ended.began, ended.ended), (last.began, None)]
    assert allocations(jobs, goes_on=False) == [(ended.began, ended.ended)]
    assert queued_seconds(jobs) == 30 + 0 + 30
    assert node_seconds(jobs, NOW, goes_on=True) == 2 * 10 + 2 * 10
    assert queued_seconds([]) == 0


@pytest.mark.parametrize(("seconds", "text"), [(4.24, "4.2 s"), (192, "3:12"), (7392.4, "2:03:12")])
def test_durations(seconds: float, text: str) -> None:
    assert lasted(seconds) == text


def test_a_folder_with_and_without_jobs(run: Path) -> None:
    (run.parent / "plain").mkdir()
    (run.parent / "plain" / "config.yaml").write_text("")
    found = statuses(run.parent, NOW, known("PENDING", reason="Resources", nodes=0))
    assert [(each.name, each.state, each.job) for each in found] == [
        ("plain", "prepared", ""),
        ("small", "queued", "12 PENDING (Resources)"),
    ]
    assert shown(table(found)).splitlines()[0].split()[:4] == ["run", "state", "job", "nodes"]
    assert "job" not in shown(table(found[:1])).splitlines()[0].split()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_goes_without_columns_rather_than_without_digits(run: Path, width: int) -> None:
    append_begin(RunFiles(run), FIRST)
    write(run, [start(FIRST, NOW - 90), attempt(NOW - 80, 1)])
    found = status_of(run, NOW, known("RUNNING"))
    header, row = (" ".join(line.split()) for line in shown(Fitted([found]), width=width).splitlines())
    assert header.startswith("run state job ")
    assert row.startswith("small running 12 RUNNING ")
    assert "…" not in row
    assert " 1/100 2.0000 " in f"{row} "
    assert ("start" in header) == (width > 100)
    assert ("tokens/s" in header) == (width >= 80)
    assert header.endswith("goodput last sign") == (width >= 80)
    assert header.endswith("goodput") == (width < 80)
