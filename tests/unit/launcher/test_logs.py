"""What the jobs of a run printed: from the end, by node, followed over jobs, and harmless to a terminal."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import logs as showing
from launcher.logs import clean, logs, newest_log
from launcher.slurm.history import Job, append_begin, append_end
from launcher.slurm.scheduler import JobState
from launcher.slurm.site import SiteConfig
from launcher.slurm.submission import Submission, write_submission
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError

T = 1_800_000_000.0
FIRST = Job("12", 0, T, ("a", "b"), 0, T - 9)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    (root / "logs").mkdir(parents=True)
    (root / "config.yaml").write_text("")
    submission = Submission(
        name="run", root=str(root), script="", workdir="", nodes=(2, 2), ranks_per_node=1, device="cpu",
        python="python", site=SiteConfig(), submitted=T - 9, job="12",
    )  # fmt: skip
    write_submission(submission)
    return root


def shown(root: Path, **options: object) -> tuple[list[str], list[str]]:
    """(lines, what was said)"""
    said: list[str] = []
    return list(logs(root, say=said.append, **options)), said  # type: ignore[arg-type]


def put(root: Path, job: str, text: bytes) -> None:
    with (root / "logs" / f"{job}.log").open("ab") as file:
        file.write(text)


def test_the_last_lines_of_the_newest_job(run: Path) -> None:
    append_begin(RunFiles(run), FIRST)
    append_begin(RunFiles(run), replace(FIRST, job="13", began=T + 9))
    put(run, "13", b"".join(b"%d\n" % number for number in range(1, 501)) + b"unfinished")
    put(run, "12", b"older, but written later\n")
    assert newest_log(run) == run / "logs" / "13.log"
    lines, said = shown(run, lines=3)
    assert (lines, said) == (["499", "500", "unfinished"], ["logs/13.log:"])
    assert len(shown(run)[0]) == 200
    assert shown(run, job="12")[0] == ["older, but written later"]
    with pytest.raises(RunDirectoryError, match=r"has no log of job 14; there are logs of 12, 13$"):
        shown(run, job="14")
    (run / "config.log").touch()
    with pytest.raises(RunDirectoryError, match="has no log of job"):
        shown(run, job="../config")


@pytest.mark.parametrize("width", [1, 2])
def test_one_node(run: Path, width: int) -> None:
    put(run, "12", b"".join(b"%*d: line %d\n" % (width, n % 11, n) for n in range(2000)) + b"trimtab: 1: no label\n")
    lines, _ = shown(run, node=1, lines=4)
    assert lines == [f"{1:>{width}}: line {number}" for number in (1959, 1970, 1981, 1992)]
    assert shown(run, node=12)[0] == []


@given(st.text("ab\n\r", max_size=60), st.integers(1, 9), st.integers(1, 20))
def test_from_the_end_as_from_the_beginning(text: str, size: int, number: int) -> None:
    content = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showing, "_BLOCK_BYTES", size)
        found = showing._Shown().last(io.BytesIO(content), number, lambda _: True, whole=True)
        whole = [line + b"\n" for line in content.split(b"\n")]
        whole[-1] = whole[-1][:-1]
        whole = whole if whole[-1] else whole[:-1]
        assert found == whole[-number:]
        reader = showing._Shown()
        reader.last(io.BytesIO(content), number, lambda _: True, whole=False)
        then = list(reader.new(io.BytesIO(content + b"x\ny")))
        assert b"".join(then) == (b"" if content.endswith(b"\n") or not content else whole[-1]) + b"x\n"
        assert reader.unfinished == b"y"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"plain \xc3\xa4\tx\n", "plain ä\tx"),
        (b"\x1b[1;31mred\x1b[0m and not", "\x1b[1;31mred\x1b[0m and not"),
        (b"\x1b[32mgreen", "\x1b[32mgreen\x1b[0m"),
        (b"\x1b[2J\x1b[1;1H\x1b[?25lgone", "gone"),
        (b"\x1b]0;title\x07\x1b]52;c;cm0gLXJm\x1b\\x", "x"),
        (b"\x1bPq#0\x1b\\\x1bcreset\x1b", "reset"),
        (b"a\x07\x08\x00\x7fb\xff", "ab\ufffd"),
        ("c\u009b2Jd\u0085".encode(), "c2Jd"),
        (b"0:  10%\r 50%\r100%\r\n", "0: 100%"),
        (b"10%\r100%\n", "100%"),
    ],
)
def test_what_a_terminal_may_obey(line: bytes, text: str) -> None:
    assert clean(line) == text
    assert "\x1b" not in clean(line, colours=False)


@given(st.text(st.characters(max_codepoint=0x2FF)) | st.text(st.sampled_from("\x1b[]0;m1HPX\\\x07\x9b\r\n\t :")))
def test_nothing_but_colours_gets_through(text: str) -> None:
    left = re.sub(r"\x1b\[[0-9;:]*m", "", clean(text.encode()))
    assert all(letter.isprintable() or ord(letter) > 0x9F or letter in "\t\n" for letter in left)


def test_where_there_is_no_log(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"run has no log yet: job 12 waits in the queue$"):
        shown(run)
    (run / "submission.json").unlink()
    with pytest.raises(RunDirectoryError, match="it was not submitted, and a run on this machine prints where"):
        shown(run, follow=True)
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        shown(tmp_path)


def followed(root: Path, *happens: Callable[[], None], **options: object) -> tuple[list[str], list[str]]:
    """Each pause something happens."""
    waiting: Iterator[Callable[[], None]] = iter([*happens, *[lambda: None] * 3])
    return shown(root, follow=True, pause=lambda: next(waiting)(), **options)


def test_followed_from_the_queue_over_a_requeue_and_another_job_to_the_end(run: Path) -> None:
    files = RunFiles(run)
    second = replace(FIRST, restart=1, began=T + 50)
    third = replace(FIRST, job="13", began=T + 100)
    lines, said = followed(
        run,
        lambda: put(run, "12", b"0: one\n0: tw"),
        lambda: append_begin(files, FIRST),
        lambda: put(run, "12", b"o\n1: other\n"),
        lambda: append_end(files, replace(FIRST, ended=T + 40, then="requeue")),
        lambda: (append_begin(files, second), put(run, "12", b"0: three\n")),
        lambda: append_end(files, replace(second, ended=T + 90, then="chain")),
        lambda: (append_begin(files, third), put(run, "13", b"0: four\n")),
        lambda: append_end(files, replace(third, ended=T + 120, reason="completed", then="end")),
        lambda: put(run, "13", b"0: last word"),
        node=0,
    )
    assert lines == ["0: one", "0: two", "0: three", "0: four", "0: last word"]
    assert said[0].endswith("waits in the queue")
    assert said[1:] == ["logs/12.log:", "logs/13.log:"]


def test_followed_until_the_scheduler_has_twice_said_that_no_job_is_left(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that died with its node notes no end."""
    monkeypatch.setattr(showing, "ASK_SECONDS", 0.0)
    append_begin(RunFiles(run), FIRST)
    put(run, "12", b"a\n")
    state = JobState("12", "RUNNING", "None", ("a", "b"), 0, T, None, "", {})
    answers = iter([{"12": state}, None, {}, {"12": state}, {}, {}, {}, {}])
    lines, _ = followed(run, *[lambda: put(run, "12", b"b\n")] * 3, ask=lambda: next(answers))
    assert lines == ["a", "b", "b", "b"]
    assert list(answers) == []


def test_a_log_that_is_written_anew(run: Path) -> None:
    append_begin(RunFiles(run), FIRST)
    put(run, "12", b"a long line\n")
    path = run / "logs" / "12.log"
    lines, _ = followed(
        run,
        lambda: path.write_bytes(b"new\n") and None,  # type: ignore[func-returns-value]
        lambda: append_end(RunFiles(run), replace(FIRST, ended=T + 1, then="end")),
    )
    assert lines == ["a long line", "new"]
