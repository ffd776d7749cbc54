"""TensorBoard as a view of the ledger. `python -m trainer.telemetry.tensorboard RUN` builds its files anew.

`RUN/tensorboard/main` shows what stands; attempts whose update was not applied go to `RUN/tensorboard/skipped` under
the same tags, so that a NaN is seen as a NaN beside the curve that it did not enter. What a rollback took back is a run
of its own in `RUN/tensorboard/abandoned`; cards and pictures of incidents are in `RUN/tensorboard/incidents`.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.errors import TrimtabError
from trainer.telemetry.abandoned import Abandoned
from trainer.telemetry.confusion import confusion_picture
from trainer.telemetry.events import EventFile, layout_of
from trainer.telemetry.heatmap import HeatMap, load
from trainer.telemetry.ledger import FILE_NAME, Record, history, notice
from trainer.telemetry.markers import Markers
from trainer.telemetry.scalars import (
    COMPOUND_LAYOUT,
    HEAT,
    INCIDENT,
    LAYOUT,
    SECONDS_CHECKPOINT,
    SECONDS_SNAPSHOT,
    SECONDS_WRITTEN,
    SKIPPED,
    Scalars,
)
from trainer.telemetry.writer import say

_PICTURE_EVERY = 500
_PICTURE_EVERY_SECONDS = 60.0
_MAX_MESSAGES = 1000

_OF_AN_ERROR = ("document", "truth", "prediction", "text")
_MARKDOWN = frozenset("\\`*_{}[]()<>#+-!|~&")
CONFUSION = "2 held-out/confusion"

FOLDER = "tensorboard"
COMMAND = "tensorboard --logdir {folder} --samples_per_plugin scalars=100000"
"""What to type to see it. Without the option TensorBoard keeps 1000 points of a curve and drops the spikes between."""


class TensorBoardView:
    """Writes event files into `folder` from ledger records, live or afterwards."""

    def __init__(self, folder: Path, picture_every: int = _PICTURE_EVERY):
        """`picture_every`: steps between heat maps of gradient norms; they are at least a minute apart."""
        load()
        self._folder = folder
        self._main = EventFile(folder / "main")
        self._skipped: EventFile | None = None
        self._markers = Markers(folder / "incidents")
        self._abandoned = Abandoned(folder / "abandoned")
        self._scalars = Scalars()
        self._heat = HeatMap()
        self._picture_every = picture_every
        self._pictured = 0.0
        self._alarm = 0
        """Incident whose picture is due."""
        self._pictured_attempt = 0
        self._step = 0
        self._tried = 0
        """Step of the newest attempt, of those that do not survive too."""
        self._time = 0.0
        self._marked: set[int] = set()
        self._messages: deque[tuple[int, str]] = deque(maxlen=_MAX_MESSAGES)

    def update(self, record: Record) -> None:
        self.take(record)

    def take(self, record: Record, survives: bool = True) -> None:
        """The next record. One that does not survive (`ledger.history`) enters no curve and tells no notice, only
        pictures and what is abandoned."""
        self._time = record["time"]
        match record["kind"]:
            case "start":
                self._start(record)
            case "attempt":
                self._attempt(record, survives)
            case "weights":
                self._points(self._scalars.structure(record), record, survives)
            case "part_norms":
                self._points(self._scalars.part_norms(record), record, survives)
            case "evaluation":
                self._points(self._scalars.evaluation(record), record, survives)
            case "predictions":
                if survives:
                    self._predictions(record)
            case "checkpoint":
                values = {SECONDS_CHECKPOINT: record["seconds"], SECONDS_WRITTEN: record["seconds_written"]}
                self._main.scalars(values, record["step"], record["time"])
            case "snapshot":
                self._main.scalars({SECONDS_SNAPSHOT: record["seconds"]}, record["step"], record["time"])
            case "goodput":
                self._main.scalars(self._scalars.goodput(record), record["step"], record["time"])
            case "incident":
                self._incident(record)
            case "rewind":
                self._rewind(record, survives)
            case _:
                pass  # shown by its notice, or a kind of a later version
        heard = notice(record)
        if heard and survives:
            self._message(*heard, record["time"])

    def flush(self) -> None:
        self._main.flush()
        self._markers.flush()
        if self._skipped:
            self._skipped.flush()

    def close(self) -> None:
        self._picture_of_alarm()
        self._picture()
        self._main.close()
        self._markers.close()
        if self._skipped:
            self._skipped.close()

    def _start(self, record: Record) -> None:
        self._step = record["resumed_step"]
        self._scalars.start(record["parameter_names"], self._step)
        self._heat.rewind(self._step)
        self._abandoned.forget(self._step)
        if record["start"] > 1:
            self._go_back(self._step, record["time"])
        self._main.layout(layout_of(LAYOUT | (COMPOUND_LAYOUT if record.get("parts") else {})), record["time"])
        hidden = {"kind", "time", "parameter_names", "config"}
        facts = {key: value for key, value in record.items() if key not in hidden}
        self._main.text("1 run", _table(facts), self._step, record["time"])
        self._main.text("3 config", f"```yaml\n{record['config']}\n```", self._step, record["time"])

    def _go_back(self, step: int, time: float) -> None:
        """What was written for later steps is superseded."""
        self._step = step
        self._marked = {marked for marked in self._marked if marked <= step}
        self._messages = deque((said for said in self._messages if said[0] <= step), _MAX_MESSAGES)
        self._main.resume(step, time)
        if (self._folder / "skipped").exists():
            self._skipped = self._skipped or EventFile(self._folder / "skipped")
            self._skipped.resume(step, time)

    def _attempt(self, record: Record, survives: bool) -> None:
        step = self._tried = record["step"]
        if survives:
            self._step = step
        if layers := self._scalars.layer_norms(record):
            self._heat.add(step, layers)
        seen = self._scalars.seen(record) | {INCIDENT: float(step in self._marked)}
        if record["applied"]:
            self._points(seen | self._scalars.done(record), record, survives)
            rested = record["time"] - self._pictured >= _PICTURE_EVERY_SECONDS
            if step % self._picture_every == 0 and rested and survives:
                self._pictured = record["time"]
                self._picture()
        else:
            self._abandoned.add(seen, step, record["time"])
            if survives:
                del seen[INCIDENT]
                self._skipped = self._skipped or EventFile(self._folder / "skipped")
                self._skipped.scalars(seen, step, record["time"])
                # the step that comes to stand at the same place shows the same count
                self._main.scalars({SKIPPED: record["num_skipped"]}, step, record["time"])
        self._picture_of_alarm()

    def _points(self, values: Mapping[str, float], record: Record, survives: bool) -> None:
        self._abandoned.add(values, record["step"], record["time"])
        if survives:
            self._main.scalars(values, record["step"], record["time"])

    def _incident(self, record: Record) -> None:
        self._markers.event(record)
        if record["incident"]:
            # told after a rollback, it may be about a step that was taken back
            self._mark(min(record["step"], self._step), record["time"])
            self._abandoned.add({INCIDENT: 1.0}, min(record["step"], self._tried), record["time"])
            if record["phase"] in ("acted", "halted") and record["attempt"] != self._pictured_attempt:
                self._alarm = record["incident"]

    def _rewind(self, record: Record, survives: bool) -> None:
        self._alarm, self._pictured_attempt = record["incident"], record["attempt"]
        self._picture_of_alarm()
        self._markers.rewind(record)
        self._abandoned.rewind(record)
        step = self._tried = record["to_step"]
        self._scalars.rewind(step)
        self._heat.rewind(step)
        if survives:
            # what was said about the steps that are gone is said at the one that it goes on from
            self._messages = deque(((min(at, step), text) for at, text in self._messages), _MAX_MESSAGES)
            self._go_back(step, record["time"])
            self._mark(step, record["time"])

    def _predictions(self, record: Record) -> None:
        if "confusion" in record:
            picture = confusion_picture(record["confusion"], record["classes"])
            self._main.image(CONFUSION, picture, record["step"], record["time"])
        errors = [{name: plain(error[name]) for name in _OF_AN_ERROR} for error in record["errors"]]
        rows = ["| " + " | ".join(error.values()) + " |" for error in errors]
        head = ["| " + " | ".join(_OF_AN_ERROR) + " |", "| --- | --- | --- | --- |"]
        self._main.text("4 worst errors", "\n".join([*head, *rows]), record["step"], record["time"])

    def _mark(self, step: int, time: float) -> None:
        self._marked.add(step)
        self._main.scalars({INCIDENT: 1.0}, step, time)

    def _picture(self) -> None:
        picture = self._heat.picture()
        if picture is not None:
            self._main.image(HEAT, picture, self._step, self._time)

    def _picture_of_alarm(self) -> None:
        """After the attempt that alarmed, and before a rollback takes it away: whichever of their records is first."""
        if self._alarm and (picture := self._heat.picture()):
            self._markers.picture(self._alarm, picture, self._tried, self._time)
        self._alarm = 0

    def _message(self, level: str, text: str, time: float) -> None:
        """One card a step: of two values at one step TensorBoard shows only the later."""
        self._messages.append((self._step, f"- **{level}** {text}"))
        lines = [line for at, line in self._messages if at == self._step]
        self._main.text("2 messages", "\n".join(lines), self._step, time)


def plain(value: object) -> str:
    """Text of a user in a cell of a table: nothing in it is Markdown."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(f"\\{letter}" if letter in _MARKDOWN else letter for letter in text)


def _table(facts: Mapping[str, object]) -> str:
    def cell(value: object) -> str:
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        return text.replace("|", "\\|")

    rows = [f"| {key.replace('_', ' ')} | {cell(value)} |" for key, value in facts.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def rebuild(run_dir: Path) -> Path:
    """Writes the event files of a run anew from its ledger, without what was superseded; returns their folder.

    For a run that is not running: a live one goes on writing into the files that this replaces.

    Raises:
        RunDirectoryError: the run has no ledger.
    """
    folder, fresh = run_dir / FOLDER, run_dir / f"{FOLDER}.new"
    records = history(run_dir / FILE_NAME)
    shutil.rmtree(fresh, ignore_errors=True)
    view = TensorBoardView(fresh)
    for record, survives in records:
        view.take(record, survives)
    view.close()
    for part in ("main", "skipped", "incidents", "abandoned"):
        shutil.rmtree(folder / part, ignore_errors=True)
        if (fresh / part).exists():
            folder.mkdir(exist_ok=True)
            (fresh / part).rename(folder / part)
    fresh.rmdir()
    return folder


def main(arguments: Sequence[str]) -> int:
    """The command line: `python -m trainer.telemetry.tensorboard RUN…`; returns the exit code."""
    if not arguments:
        say("usage: python -m trainer.telemetry.tensorboard RUN…")
        return 2
    try:
        for run in arguments:
            say(COMMAND.format(folder=shlex.quote(str(rebuild(Path(run))))))
    except TrimtabError as error:
        say(str(error))
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
