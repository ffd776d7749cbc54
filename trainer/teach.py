"""What every rank runs that writes a teacher's knowledge: `accelerate launch … -m trainer.teach FOLDER`."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.__main__ import note_end, orderly, quieten, settle, use_cpu
from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.config.teaching import writing
from trainer.errors import ExitCode, TrimtabError
from trainer.heartbeat import Heartbeat, die_with_parent, open_heartbeat, watch_yourself
from trainer.records import Outcome
from trainer.stop import StopRequest

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.stages.teach import Progress, Taught

REQUEST = "teach.json"
"""File in the folder: `splits`, their names, and `sharded`."""

_SECONDS_BETWEEN_LINES = 10.0


def main(arguments: Sequence[str]) -> int:
    """Write this rank's part of the caches that FOLDER/teach.json asks for; the exit code of the process.

    FOLDER holds a resolved config and prepared data like a run directory; rank 0 writes FOLDER/outcome.json.
    """
    die_with_parent()
    if len(arguments) != 1:
        print("name a folder: accelerate launch … -m trainer.teach FOLDER", file=sys.stderr)
        return ExitCode.USAGE
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    files, stop, heartbeat = RunFiles(Path(arguments[0]).absolute()), StopRequest().listen(), open_heartbeat(rank)
    try:
        return _teach(files, stop, heartbeat)
    except TrimtabError as error:
        reason = "crashed" if error.exit_code == ExitCode.CRASHED else "refused"
        if note_end(files, Outcome(reason, error.exit_code, str(error), 0, 0, None)):
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the outcome must say why, whatever it was
        text = f"rank {rank}: {type(error).__name__}: {error}"
        note_end(files, Outcome("crashed", ExitCode.CRASHED, text, 0, 0, None))
        print(f"rank {rank}:\n{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
        return ExitCode.CRASHED


def _teach(files: RunFiles, stop: StopRequest, heartbeat: Heartbeat) -> int:
    quieten()
    config = read_run_config(files.root)
    request = json.loads((files.root / REQUEST).read_text(encoding="utf-8"))
    device, precision = settle(config)
    from trainer.engine.ranks import join, leave

    ranks = join(device)
    if device == "cpu":
        use_cpu(files, config)
    from trainer.stages.build import Setting
    from trainer.stages.prepare import open_run
    from trainer.stages.teach import Teaching
    from trainer.stages.teachers import open_teacher

    heartbeat = watch_yourself(heartbeat, config.supervision.hang_seconds, files.root / "hangs", ranks.rank)
    config = writing(config, sharded=request["sharded"])
    prepared, facts = open_run(files, config)
    setting = Setting(files, config, ranks, device, precision, prepared, facts, stop, heartbeat=heartbeat)
    taught: list[Taught] = []
    for split in request["splits"]:
        with _Shown(ranks.is_first) as progress:
            result = Teaching(setting, split, open_teacher, progress).run()
        if result is None:
            text = "stopped; complete blocks stay, and the same command goes on"
            outcome = Outcome("stopped", ExitCode.STOPPED, text, 0, 0, None)
            break
        taught.append(result)
    else:
        text = "; ".join(f"{one.header.samples:,} samples in {one.folder}" for one in taught)
        outcome = Outcome("completed", ExitCode.COMPLETED, text, 0, 0, None)
    if ranks.is_first:
        if taught:
            from rich.console import Console

            Console(highlight=False, markup=False, emoji=False).print(table(taught))
        note_end(files, outcome)
    heartbeat.beat("ending")
    leave()
    return orderly(outcome.exit_code)


def table(taught: Sequence[Taught]) -> Table:
    """What is in the caches, one column each."""
    from rich import box
    from rich.table import Table

    result = Table("", *(one.header.split for one in taught), box=box.SIMPLE)
    columns = [_about(one) for one in taught]
    for name in columns[0]:
        result.add_row(name, *(column[name] for column in columns))
    return result


def _about(one: Taught) -> dict[str, str]:
    header, tally = one.header, one.tally
    form, targets = header.form, max(1.0, tally.targets)
    entropy = tally.entropy / targets
    kept = {
        "top": f"the {form.width} most probable tokens, {form.precision}",
        "sampled": f"{form.width} draws",
        "complete": f"all {form.width} tokens, {form.precision}",
        "logits": f"logits of {form.width} classes",
    }
    return {
        "cache": os.path.relpath(one.folder),
        "teacher": f"{header.teacher_name}, {header.teacher_precision}",
        "kept at each position": kept[form.kind],
        "samples": f"{header.samples:,}",
        "tokens": f"{tally.tokens:,.0f}",
        "bytes": f"{one.num_bytes:,}",
        "bytes a token": f"{one.num_bytes / max(1.0, tally.tokens):,.1f}",
        "different tokens a position": f"{tally.entries / targets:,.1f}",
        "probability that they cover": f"{tally.mass / targets:.4f}",
        "entropy of the teacher": "not known" if entropy != entropy else f"{entropy:.4f} nats",
        "tokens a second": f"{one.new_tokens / one.seconds:,.0f}" if one.new_tokens else "nothing was missing",
    }


class _Shown:
    """Progress: a bar on a terminal, a line now and then elsewhere; both on standard error, and of rank 0 alone."""

    def __init__(self, shown: bool):
        from rich.console import Console

        self._shown = shown
        self._console = Console(stderr=True, highlight=False)
        self._began = self._said = time.monotonic()
        self._stage, self._first = "", 0

    def __enter__(self) -> Progress:
        if not self._shown:
            return lambda _stage, _done, _total: None
        if not self._console.is_terminal:
            return self._say
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True)
        self._bars.start()
        self._task = self._bars.add_task("looking")
        return self._draw

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_bars"):
            self._bars.stop()

    def _draw(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._bars.reset(self._task)
        self._bars.update(self._task, description=stage, completed=done, total=total)

    def _say(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done
        elif now - self._said < _SECONDS_BETWEEN_LINES and done < total:
            return
        self._said = now
        speed = (done - self._first) / max(1e-9, now - self._began)
        left = f", {(total - done) / speed:,.0f} s left" if speed and done < total else ""
        print(f"{stage}: {done:,} of {total:,} samples{left}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # all is written and closed; threads of torch and gloo that are still alive could abort an ordinary exit
    os._exit(code)
