"""What a terminal shows: the renderable, the lines of a log, and what is always said."""

import io
import math
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trainer.telemetry.console import RunView, _compact, _duration, seconds_left
from trainer.telemetry.display import ConsoleView, Mode
from trainer.telemetry.ledger import Record

START: Record = {
    "kind": "start",
    "time": 0.0,
    "start": 1,
    "name": "quickstart",
    "ranks": 2,
    "device": "cpu",
    "precision": "fp32",
    "hostname": "node-1",
    "steps": 400,
    "resumed_step": 0,
}


def attempt(step: int, loss: float = 4.0, applied: bool = True, **fields: object) -> Record:
    return {
        "kind": "attempt",
        "time": 0.0,
        "start": 1,
        "attempt": step,
        "batch": step - 1,
        "step": step,
        "epoch": 0,
        "loss": loss,
        "grad_norm": 2.5,
        "clip": 1.0,
        "clipped": True,
        "lr": 3e-4,
        "applied": applied,
        "agree": True,
        "verdict": "step" if applied else "skip",
        "reason": None if applied else "not finite",
        "num_skipped": int(not applied),
        "num_clipped": step,
        "seconds": 0.5,
        "seconds_data": 0.005,
        "tokens_per_second": 12345.0,
        "flop_utilisation": 0.375,
        "memory_bytes": 3 << 29,
        "loss_scale": 1.0,
        **fields,
    }


def evaluation(step: int, loss: float) -> Record:
    fields = {"step": step, "loss": loss, "targets": 9, "seconds": 1.0}
    return {"kind": "evaluation", "time": 0.0, "start": 1, **fields, "scores": {"perplexity": 7.0, "accuracy": 0.25}}


def message(level: str, text: str) -> Record:
    return {"kind": "message", "time": 0.0, "start": 1, "step": 1, "level": level, "text": text}


OUTCOME: Record = {"kind": "outcome", "time": 0.0, "start": 1, "reason": "completed", "message": "All steps done."}


def shown(view: RunView, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def view_of(*records: Record) -> RunView:
    view = RunView()
    for record in records:
        view.update(record)
    return view


def test_the_view_shows_every_figure_whole() -> None:
    view = view_of(START, *(attempt(step, loss=8 - step / 50) for step in range(1, 101)), evaluation(100, 6.5))
    page = shown(view)
    assert max(map(len, page.splitlines())) <= 80
    figures = [
        r"quickstart  2 × cpu · fp32 · on node-1",
        r"step 100 of 400 .* 25% 2:30 left",
        r"loss +6\.0000 +gradient norm +2\.5 → 1  \(clipped 100%\)",
        r"held-out loss +6\.5000  \(step 100\) +learning rate +3\.000e-04",
        r"tokens/s +12,345 +waiting for data +1\.0%",
        r"FLOP utilisation +37\.5% +memory a rank +1\.50 GiB",
        r"skipped +0 +epoch +0",
        r"7\.98 [⠁-⣿]",
        r"6\.00 [⠀-⣿]",
    ]
    assert [pattern for pattern in figures if not re.search(pattern, page)] == []


def test_nan_is_shown_as_nan_and_a_skip_as_a_warning() -> None:
    view = view_of(
        START, attempt(1), attempt(2, math.nan, applied=False), attempt(2, math.nan), evaluation(2, math.nan)
    )
    page = shown(view)
    assert re.search(r"loss +nan", page)
    assert re.search(r"held-out loss +nan", page)
    assert "warning: skipped batch 1 (attempt 2): not finite" in page
    assert "nan" in view.line()


def test_a_resume_takes_the_view_back() -> None:
    view = view_of(START, *(attempt(step) for step in range(1, 51)), evaluation(50, 3.0))
    view.update({**START, "start": 2, "resumed_step": 20})
    assert view.step == 20
    assert view.evaluation is None
    assert view.time_left is None
    page = shown(view)
    assert "step 20 of 400" in page
    assert "start 2, resumed at step 20" in page
    assert "step 21/400" not in page


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 200), st.integers(0, 100))
def test_the_view_renders_at_any_width_and_any_time(width: int, num_steps: int) -> None:
    assert shown(view_of(*[START, *map(attempt, range(1, num_steps + 1)), OUTCOME]), width)


def test_before_the_first_record_the_view_says_what_it_waits_for() -> None:
    assert "waiting for the first record" in shown(RunView())
    assert RunView().line() == "no step yet"


def printed(mode: Mode, *records: Record, terminal: bool = False) -> str:
    file = io.StringIO()
    view = ConsoleView(mode, Console(file=file, width=100, force_terminal=terminal, color_system=None))
    for record in records:
        view.update(record)
    view.close()
    return file.getvalue()


RUN = [
    START,
    message("info", "14 documents"),
    *(attempt(step) for step in range(1, 31)),
    message("warning", "the disk is nearly full"),
    attempt(31, applied=False),
    evaluation(30, math.log(7)),
    attempt(400),
    OUTCOME,
]


def test_of_many_scores_the_first_are_told_and_the_others_counted() -> None:
    scores = {"accuracy": 0.5, "precision_macro": 0.25, "f1_macro": 0.75, "auc": 0.5, "matthews": 0.1, "ece": 0.2}
    many = {**evaluation(30, 1.0), "scores": scores}
    (line,) = [line for line in printed("lines", START, attempt(1), many).splitlines() if "held-out" in line]
    told = "accuracy 50.0%  f1_macro 0.75  matthews 0.10  precision_macro 0.25  (2 more in the ledger)  at step 30"
    assert line == f"held-out loss 1.0000  {told}"


def test_lines_are_few_aligned_and_end_with_the_end() -> None:
    lines = printed("auto", *RUN).splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("  loss")[0] for line in steps] == [
        "step   1/400",
        "step   2/400",
        "step   3/400",
        "step 400/400",
    ]
    assert len({line.index("tokens/s") for line in steps}) == 1
    assert any("held-out loss 1.9459  perplexity 7.00  accuracy 25.0%  at step 30" in line for line in lines)
    assert any("warning: the disk is nearly full" in line for line in lines)
    assert any("warning: skipped batch 30 (attempt 31): not finite" in line for line in lines)
    assert lines[-1].endswith("completed: All steps done.")


def test_quiet_says_warnings_and_the_end_only() -> None:
    lines = printed("quiet", *RUN).splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "warning: the disk is nearly full",
        "warning: skipped batch 30 (attempt 31): not finite",
        "completed: All steps done.",
    ]


def test_live_ends_with_the_whole_view_and_the_end() -> None:
    text = printed("auto", *RUN, terminal=True)
    assert "warning: the disk is nearly full" in text
    assert re.search(r"step 400 of 400 .*100% completed", text)
    assert text.rstrip().endswith("completed: All steps done.")


def test_a_warning_is_printed_while_the_run_goes_on() -> None:
    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if "nearly full" in self.getvalue():
                heard.set()
            return written

    heard = threading.Event()
    view = ConsoleView("quiet", Console(file=Heard(), width=100))
    view.update(message("warning", "the disk is nearly full"))
    assert heard.wait(timeout=10)
    view.close()


def test_time_left_is_not_moved_by_one_slow_step() -> None:
    assert seconds_left(100, [2.0, 2.0, 50.0, 2.0]) == 200
    assert seconds_left(0, [2.0]) == 0
    assert seconds_left(100, []) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (4.4, "4 s"), (192, "3:12"), (7392, "2:03:12"), (4 * 86400 + 7200, "4 d 02 h"), (math.inf, "–")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert _duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8314, "0.831"),
        (12.34, "12.3"),
        (25300.0, "25.3k"),
        (1.5e7, "15M"),
        (2e10, "20G"),
        (1e-9, "1e-09"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert _compact(value) == text


def test_goodput_is_shown_once_something_stands() -> None:
    told: Record = {"kind": "goodput", "time": 0.0, "start": 1, "step": 0, "fraction": 0.0}
    view = view_of(START, told, attempt(1))
    assert "goodput" not in shown(view) + view.line()
    view.update(told | {"step": 1, "fraction": 0.9312})
    assert view.line().endswith("  goodput 93.1%")
    page = shown(view)
    assert "left · goodput 93.1%" in page
    assert max(map(len, page.splitlines())) <= 80
