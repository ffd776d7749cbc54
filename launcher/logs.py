"""`trimtab logs`: what the jobs of a run printed, `RUN/logs/JOB.log`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from launcher.slurm.history import read_jobs
from launcher.slurm.standing import States, ask, standing_of
from launcher.slurm.submission import read_submission
from launcher.words import visible
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError

LINES = 200
POLL_SECONDS = 0.5
ASK_SECONDS = 15.0
"""Time between two questions to the scheduler whether a silent job still lives."""

_BLOCK_BYTES = 1 << 16
_LABEL = re.compile(r"\s*\d+: ")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # CSI: colours, the cursor, clearing
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC: titles, links, the clipboard
    r"|[PX^_][^\x1b]*(?:\x1b\\)?"  # strings for the terminal
    r"|[ -/]*[0-~])?"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")


def logs(
    root: Path,
    *,
    job: str | None = None,
    node: int | None = None,
    lines: int = LINES,
    follow: bool = False,
    colours: bool = True,
    say: Callable[[str], None],
    pause: Callable[[], None] = lambda: time.sleep(POLL_SECONDS),
    ask: Callable[[], States | None] | None = None,
) -> Iterator[str]:
    """Lines of the log of a run's newest job, without their ends; with `follow` until the run has ended.

    Args:
        job: the log of this one; with `follow` no other.
        node: only what the ranks on the node of this number (from 0, as srun labels lines) printed.
        lines: how many of those that are there; all that match count.
        colours: keep them. Whatever else a terminal would obey is dropped.
        say: told in a sentence what is no line of a log.
        pause: waits a little.
        ask: what the scheduler says of the run's jobs; None: as `standing.ask`, not too often.

    Raises:
        RunDirectoryError: `root` is no run, or there is no such log.
    """
    files = RunFiles(root)
    if not files.config.is_file():
        raise RunDirectoryError(f"{root} is not a run directory: it holds no config.yaml")
    path = newest_log(root, job)
    if path is None and not (follow and job is None and read_submission(root) is not None):
        raise RunDirectoryError(_no_log(root, job))
    if path is None:
        say(_no_log(root, job))
    else:
        say(f"{visible(str(path.relative_to(root)))}:")
    wanted = _of_node(node)
    ended = _Ended(root, job, ask or (lambda: _asked(root)))
    shown = _Shown()
    if path is not None:
        with path.open("rb") as file:
            for line in shown.last(file, lines, wanted, whole=not follow):
                yield clean(line, colours)
    was_over = False
    while follow:
        fresh = False
        # looked at before what is there is read: what comes with the end is shown
        over = ended()
        if path is not None:
            with path.open("rb") as file:
                for line in shown.new(file):
                    fresh = True
                    if wanted(line):
                        yield clean(line, colours)
        if fresh:
            continue
        following = newest_log(root, job)
        if following is not None and following != path:
            path, shown = following, _Shown()
            say(f"{visible(str(path.relative_to(root)))}:")
        elif over and was_over:
            if shown.unfinished and wanted(shown.unfinished):
                yield clean(shown.unfinished, colours)
            return
        else:
            # a job says a last word when it has noted its end
            was_over = over
            pause()


def newest_log(root: Path, job: str | None = None) -> Path | None:
    """The log of the newest job of a run that has one, or of `job`; None: there is none."""
    folder = RunFiles(root).logs
    if job is not None:
        # the name of a file, not a way out of the folder
        path = folder / f"{job}.log"
        return path if path.parent == folder and path.is_file() else None
    for each in reversed(read_jobs(RunFiles(root))):
        if (path := folder / f"{each.job}.log").is_file():
            return path
    # of a job that has not come to write down that it began
    present = [path for path in folder.glob("*.log") if path.is_file()]
    return max(present, key=lambda path: path.stat().st_mtime, default=None)


def clean(line: bytes, colours: bool = True) -> str:
    """A line as a terminal would show it, without what would do more to the terminal than colour the line."""
    text = line.decode(errors="replace").rstrip("\r\n")
    if text.isprintable():
        return text
    if "\r" in text:
        # a progress bar: what is overwritten is gone, but the label of the node stays
        last = text.rpartition("\r")[2]
        label = _LABEL.match(text)
        text = last if label is None or _LABEL.match(last) else label.group() + last
    text = _CONTROL.sub("", _SEQUENCE.sub(lambda found: _colour(found.group()) if colours else "", text))
    coloured = _COLOUR.findall(text)
    # nothing after the line takes its colour
    return text if not coloured or coloured[-1] in ("\x1b[m", "\x1b[0m") else f"{text}\x1b[0m"


def _colour(sequence: str) -> str:
    return sequence if _COLOUR.fullmatch(sequence) else ""


def _of_node(node: int | None) -> Callable[[bytes], bool]:
    """Whether a line is one of a node."""
    if node is None:
        return lambda _: True
    # srun pads labels to the same width
    return re.compile(rb"\s*0*%d: " % node).match  # type: ignore[return-value]


class _Shown:
    """How much of one log was shown."""

    def __init__(self) -> None:
        self._offset = 0
        self.unfinished = b""
        """A last line without an end."""

    def last(self, file: BinaryIO, number: int, wanted: Callable[[bytes], bool], *, whole: bool) -> list[bytes]:
        """The last lines, found from the end of the file. `whole`: an unfinished one is one too."""
        end = file.seek(0, os.SEEK_END)
        found: list[bytes] = []
        self._offset = end
        for line in _backwards(file, end):
            if not line.endswith(b"\n") and not whole:
                self._offset = end - len(line)
                continue
            if len(found) >= number:
                break
            if wanted(line):
                found.append(line)
        return found[::-1]

    def new(self, file: BinaryIO) -> Iterator[bytes]:
        """Lines that have come since."""
        if file.seek(0, os.SEEK_END) < self._offset:
            # written anew from its beginning
            self._offset, self.unfinished = 0, b""
        file.seek(self._offset)
        pieces = [self.unfinished]
        while piece := file.readline(_BLOCK_BYTES):
            self._offset += len(piece)
            pieces.append(piece)
            if piece.endswith(b"\n"):
                yield b"".join(pieces)
                pieces = []
        self.unfinished = b"".join(pieces)


def _backwards(file: BinaryIO, end: int) -> Iterator[bytes]:
    """The lines before a byte with their ends, the last first."""
    tails: list[bytes] = []
    while end:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        lines = _split(file.read(end - start))
        end = start
        # what a line of the block before goes on with
        if tails and lines and lines[-1].endswith(b"\n"):
            yield b"".join(reversed(tails))
            tails = []
        for line in reversed(lines[1:]):
            yield b"".join([line, *reversed(tails)])
            tails = []
        tails.append(lines[0])
    if tails:
        yield b"".join(reversed(tails))


def _split(block: bytes) -> list[bytes]:
    """Lines with their ends; splitlines() would split at more than newlines."""
    lines = [line + b"\n" for line in block.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


class _Ended:
    """Whether nothing more is to come. The scheduler is asked rarely."""

    def __init__(self, root: Path, job: str | None, ask: Callable[[], States | None]):
        self._root, self._job, self._ask = root, job, ask
        self._dead = 0
        """How often in a row the scheduler said that no job of the run is left."""
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        states = None
        if self._asked + ASK_SECONDS <= time.monotonic():
            states, self._asked = self._ask(), time.monotonic()
        standing = standing_of(self._root, states)
        if standing is None:
            return True
        if states is not None:
            self._dead = 0 if standing.alive else self._dead + 1
        if self._job is not None and standing.job not in ("", self._job):
            return True
        # once may be between a job and the one that follows it
        return self._dead > 1 or (standing.last is not None and standing.last.then == "end")


def _asked(root: Path) -> States | None:
    return ask([root])[0]


def _no_log(root: Path, job: str | None) -> str:
    name = visible(str(root))
    present = sorted(path.stem for path in RunFiles(root).logs.glob("*.log"))
    if job is not None:
        those = f"there are logs of {', '.join(map(visible, present))}" if present else "there are no logs"
        return f"{name} has no log of job {visible(job)}; {those}"
    standing = standing_of(root, None)
    if standing is None:
        return f"{name} has no logs: it was not submitted, and a run on this machine prints where it was started"
    if not standing.jobs:
        return f"{name} has no log yet: job {visible(standing.job) or '(not submitted yet)'} waits in the queue"
    return f"{name} has no log: {visible(str(RunFiles(root).logs))} holds none of job {visible(standing.jobs[-1].job)}"
