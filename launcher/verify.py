"""What lies in the checkpoints folder of a run, how much of it is whole, and what the next start goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from launcher.status import is_locked
from trainer.checkpoint.manifest import step_of
from trainer.checkpoint.verify import Examined, examine
from trainer.config.files import RunFiles
from trainer.errors import RunDirectoryError
from trainer.starts import read_starts

_LEFTOVERS = {
    "partial": "was being written when its start ended; removed by the next start",
    "replaced": "was to be replaced when its start ended; put back or removed by the next start",
    "abandoned": "of steps that were rolled back; removed after the next commit",
    "removed": "half deleted; removed by the next start",
    "damaged": "damaged, and put aside when it was to be loaded; delete it when you have seen enough",
    "foreign": "of another run, and in the way; delete it when you have seen enough",
}


@dataclass(frozen=True, slots=True)
class Verification:
    """The checkpoints of a run, by step, and what else lies beside them."""

    checkpoints: tuple[Examined, ...]
    run: str | None
    """Identity of the run; None: not known."""
    leftovers: tuple[tuple[str, str], ...]
    """(name, what it is)"""
    running: bool
    """On this machine, now: what is there changes."""

    def counts(self, checkpoint: Examined) -> bool:
        """Whether it is of the history that the next start goes on with, as far as a damaged one tells."""
        return not checkpoint.start or (checkpoint.admitted and not self.is_foreign(checkpoint))

    def is_foreign(self, checkpoint: Examined) -> bool:
        """Whether another run wrote it."""
        return bool(checkpoint.start) and self.run not in (None, checkpoint.run)

    @property
    def newest(self) -> Examined | None:
        """Of the history, whole or not."""
        return max(filter(self.counts, self.checkpoints), key=lambda found: found.step, default=None)

    @property
    def resumable(self) -> Examined | None:
        """What the next start goes on from; None: there is nothing whole."""
        whole = (found for found in self.checkpoints if self.counts(found) and not found.problems)
        return max(whole, key=lambda found: found.step, default=None)

    @property
    def passed(self) -> bool:
        """The newest of the history is whole."""
        return self.newest is not None and self.newest is self.resumable


def verify(root: Path) -> Verification:
    """Read every file of every checkpoint of a run and compare it with its manifest. Changes nothing.

    Raises:
        RunDirectoryError: `root` is no run, or what it says about its starts is damaged.
    """
    files = RunFiles(root)
    if not files.config.is_file():
        raise RunDirectoryError(f"{root} is not a run directory: it holds no config.yaml")
    known = read_starts(files)
    running = is_locked(root)
    found = examine(files.checkpoints, known.history.admits)
    others = sorted(files.checkpoints.iterdir()) if files.checkpoints.is_dir() else []
    leftovers = tuple((path.name, _what(path.name)) for path in others if step_of(path.name) is None)
    return Verification(tuple(found), known.run, leftovers, running)


def _what(name: str) -> str:
    kind = name.partition(".")[2].partition("-")[0]
    return _LEFTOVERS.get(kind, "not a checkpoint; ignored")


def table(result: Verification) -> Table:
    """One row a checkpoint, by step, then what else lies there."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("checkpoint", no_wrap=True)
    for title in ("step", "start", "ranks × ZeRO", "size", "healthy"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("state", overflow="fold")
    for found in sorted(result.checkpoints, key=lambda found: found.step):
        known = found.start > 0
        shown.add_row(
            Text(found.name),
            Text(str(found.step)),
            Text(str(found.start) if known else "?"),
            Text(f"{found.world_size} × {found.stage}" if known else "?"),
            Text(size(found.num_bytes) if known else "?"),
            Text("yes" if found.healthy else "–"),
            _state(result, found),
        )
    for name, what in result.leftovers:
        shown.add_row(Text(name, "dim"), *[Text("–", "dim")] * 5, Text(what, "dim"))
    return shown


def _state(result: Verification, found: Examined) -> Text:
    if found.problems:
        return Text("damaged: " + "; ".join(found.problems), "bold red")
    if result.is_foreign(found):
        return Text("whole, but of another run: not used", "yellow")
    if not found.admitted:
        return Text(f"whole, but not of this history: start {found.start} was cut off when it wrote it", "yellow")
    text = Text("whole", "green")
    if found.strange:
        text.append(f"; also holds {', '.join(found.strange)}, which nobody reads", "yellow")
    return text


def closing(result: Verification) -> str:
    """In words what can be resumed."""
    newest, resumable = result.newest, result.resumable
    if newest is None:
        text = "There is no checkpoint yet: the next start begins from nothing."
    elif resumable is None:
        text = f"Nothing of the run's history is whole: the next start begins from nothing. {_damaged(result)}"
    elif result.passed:
        text = f"All is well: the next start goes on from {resumable.name}."
    else:
        text = f"The next start goes on from {resumable.name}. {_damaged(result)}"
    if result.running:
        text += " The run is being trained on this machine: what it is writing now is not counted."
    return text


def _damaged(result: Verification) -> str:
    """What the run's history has lost."""
    lost = sorted((found.step, found.name) for found in result.checkpoints if result.counts(found) and found.problems)
    return f"Not whole: {', '.join(name for _, name in lost)}; restore the files from a copy if there is one."


def size(num_bytes: int) -> str:
    """A number of bytes in its largest unit: 512 B, 1.5 GB."""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
