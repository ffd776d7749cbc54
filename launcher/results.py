"""What the runs of a sweep, of a pipeline or of any folder came to: one row a run, and means over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Group as Parts
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from launcher.pipelines.record import read_record
from launcher.pipelines.sweep import FILE_NAME as SWEEP_FILE
from launcher.pipelines.sweep import read_points
from launcher.slurm.history import Job, read_jobs
from launcher.slurm.standing import States
from launcher.status import age, status_of
from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.errors import ConfigError, RunDirectoryError
from trainer.telemetry.ledger import decode, last_record, newest_first

_NUM_ATTEMPTS = 50
"""Of which the speed is the median."""
_MAX_COLUMNS = 6
_PLACE = ("name", "runs")
"""Options that say only where a run lies."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one run came to."""

    name: str
    """Of its directory, relative to the folder."""
    options: Mapping[str, Any]
    """Those that vary between the runs, by dotted path; None where a run does not have it."""
    swept: tuple[str, ...]
    """Those of them in which it differs from others of its sweep."""
    state: str
    """As `launcher.status` has it; `absent`: there is no directory yet."""
    step: int | None = None
    steps: int | None = None
    held_out_loss: float | None = None
    """Nats a token: at the end, or the newest."""
    seconds: float | None = None
    """That its jobs ran together; of a run without jobs from its first start to its last sign of life."""
    tokens_per_second: float | None = None
    """Median of its newest attempts."""
    incidents: int = 0


@dataclass(frozen=True, slots=True)
class Mean:
    """Runs that differ in nothing but their seed."""

    options: Mapping[str, Any]
    """Those that vary, without the seed."""
    runs: int
    finished: int
    """How many of them, of which the figures are."""
    held_out_loss: float | None
    """Mean; None: none has finished, or one is not finite."""
    deviation: float | None
    """Standard deviation (n − 1); None: fewer than two."""
    tokens_per_second: float | None
    """Mean."""


def results(folder: Path, now: float | None = None, states: States | None = None) -> list[Result]:
    """The runs below `folder`, best held-out loss first, those without one last.

    A sweep's are its points, a pipeline's the runs of its stages; any other folder's the runs in it and those of the
    sweeps and pipelines in it.

    Args:
        states: what the scheduler says of their jobs (`standing.ask`, with `roots_of`); None: it was not asked.

    Raises:
        RunDirectoryError: there is no such folder, or the record of a sweep or a pipeline is damaged.
    """
    now = time.time() if now is None else now
    roots = roots_of(folder)
    given = [_options_of(root) for root in roots]
    varying = _varying(given)
    siblings: dict[Path, list[Mapping[str, Any] | None]] = {}
    for root, options in zip(roots, given, strict=True):
        if (root.parent / SWEEP_FILE).exists():
            siblings.setdefault(root.parent, []).append(options)
    swept = {parent: tuple(_varying(runs)) for parent, runs in siblings.items()}
    found = []
    for root, options in zip(roots, given, strict=True):
        chosen = {option: None if options is None else options.get(option) for option in varying}
        name = root.name if root == folder else root.relative_to(folder).as_posix()
        found.append(_result(root, Result(name, chosen, swept.get(root.parent, ()), "absent"), now, states))
    return sorted(found, key=lambda result: (*_worse(result.held_out_loss), result.name))


def roots_of(folder: Path) -> list[Path]:
    """The run directories that `results` looks at; some may not be there yet.

    Raises:
        RunDirectoryError: there is no such folder, or the record of a sweep or a pipeline is damaged.
    """
    if not folder.is_dir():
        raise RunDirectoryError(f"there is no folder {folder}; name a sweep, a pipeline, or a folder that holds runs")
    return _runs_in(folder)


def _worse(loss: float | None) -> tuple[int, float]:
    """Sorts the best first."""
    if loss is None:
        return 2, 0.0
    return (0, loss) if math.isfinite(loss) else (1, 0.0)


def _runs_in(folder: Path) -> list[Path]:
    if RunFiles(folder).config.is_file():
        return [folder]
    if (points := read_points(folder)) is not None:
        return [folder / point.name for point in points]
    if (record := read_record(folder)) is not None:
        return [run for stage in record.stages for run in _runs_of(folder / Path(stage.root).name)]
    return [run for child in sorted(folder.iterdir()) if child.is_dir() for run in _runs_below(child)]


def _runs_of(stage: Path) -> list[Path]:
    return _runs_in(stage) if read_points(stage) is not None else [stage]


def _runs_below(child: Path) -> list[Path]:
    is_ours = RunFiles(child).config.is_file() or read_points(child) is not None or read_record(child) is not None
    return _runs_in(child) if is_ours else []


def _options_of(root: Path) -> dict[str, Any] | None:
    """Every option of the run by dotted path; None: there is no config that can be read."""
    try:
        return dict(_leaves("", read_run_config(root).model_dump(mode="json")))
    except (RunDirectoryError, ConfigError):
        return None


def _leaves(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), below)
    else:
        yield path, value


def _varying(runs: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """The options that are not the same in all runs, in the order of the schema."""
    known = [run for run in runs if run is not None]
    options = dict.fromkeys(option for run in known for option in run)
    return [
        option
        for option in options
        if option not in _PLACE and len({json.dumps(run.get(option), sort_keys=True) for run in known}) > 1
    ]


def _result(root: Path, absent: Result, now: float, states: States | None) -> Result:
    files = RunFiles(root)
    if not files.config.is_file():
        return absent
    status = status_of(root, now, states)
    return replace(
        absent,
        state=status.state,
        step=status.step,
        steps=status.steps,
        held_out_loss=status.held_out_loss,
        seconds=_seconds(files, now, running=status.state == "running"),
        tokens_per_second=_speed(files),
        incidents=status.incidents,
    )


def _seconds(files: RunFiles, now: float, *, running: bool) -> float | None:
    if jobs := read_jobs(files):
        return sum(_length(job, now if running else None) for job in jobs)
    newest = last_record(files.ledger, lambda _: True)
    try:
        with files.ledger.open("rb") as file:
            first = decode(file.readline())
    except (OSError, ValueError):
        return None
    return None if newest is None else max(0.0, float(newest["time"]) - float(first["time"]))


def _length(job: Job, now: float | None) -> float:
    ended = job.ended if job.ended is not None else now
    return 0.0 if ended is None else max(0.0, ended - job.began)


def _speed(files: RunFiles) -> float | None:
    attempts = (
        float(record["tokens_per_second"])
        for record in newest_first(files.ledger)
        if record["kind"] == "attempt" and record.get("tokens_per_second") is not None
    )
    newest = list(islice(attempts, _NUM_ATTEMPTS))
    return statistics.median(newest) if newest else None


def means(found: Sequence[Result]) -> list[Mean]:
    """Means of two runs or more that differ in their seed only, best first."""
    groups: dict[str, list[Result]] = {}
    for result in found:
        if "seed" in result.options and result.state != "absent":
            groups.setdefault(json.dumps(_without_seed(result), sort_keys=True), []).append(result)
    made = [_mean(group) for group in groups.values() if len(group) > 1]
    return sorted(made, key=lambda mean: _worse(mean.held_out_loss))


def _without_seed(result: Result) -> dict[str, Any]:
    return {option: value for option, value in result.options.items() if option != "seed"}


def _mean(group: Sequence[Result]) -> Mean:
    finished = [result for result in group if result.state == "finished"]
    losses = [result.held_out_loss for result in finished if result.held_out_loss is not None]
    known = bool(losses) and all(map(math.isfinite, losses))
    speeds = [result.tokens_per_second for result in finished if result.tokens_per_second is not None]
    return Mean(
        options=_without_seed(group[0]),
        runs=len(group),
        finished=len(finished),
        held_out_loss=statistics.fmean(losses) if known else None,
        deviation=statistics.stdev(losses) if known and len(losses) > 1 else None,
        tokens_per_second=statistics.fmean(speeds) if speeds else None,
    )


def as_json(found: Sequence[Result]) -> str:
    """Everything, as one object: `runs` and `means`. A number that is not finite is null."""
    rows = {"runs": [asdict(result) for result in found], "means": [asdict(mean) for mean in means(found)]}
    return json.dumps(_finite(rows), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    return [_finite(below) for below in value] if isinstance(value, list | tuple) else value


def as_csv(found: Sequence[Result]) -> str:
    """One line a run, below a line of names; what is not there is empty."""
    options = list(found[0].options) if found else []
    names = ["name", "state", "step", "steps", "held_out_loss", "seconds", "tokens_per_second", "incidents"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([names[0], *options, *names[1:]])
    for result in found:
        cells = [_plain(result.options[option]) for option in options]
        writer.writerow([result.name, *cells, *(_cell(getattr(result, name)) for name in names[1:])])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _plain(value: Any) -> str:
    """An option's value as a config has it; absent: empty."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def table(found: Sequence[Result]) -> RenderableType:
    """The runs as a table, and below it the means over seeds where there are any."""
    options = list(found[0].options) if found else []
    shown = options
    if len(options) > _MAX_COLUMNS:
        swept = {option for result in found for option in result.swept}
        shown = [option for option in options if option in swept][:_MAX_COLUMNS]
    titles = [*_short(shown), "held-out", "step", "seconds", "tokens/s", "incidents"]
    runs = _empty("run", "state", *titles)
    for result in found:
        runs.add_row(
            Text(result.name),
            Text(result.state),
            *(Text(_plain(result.options[option]) or "–") for option in shown),
            Text(_number(result.held_out_loss, ".4f")),
            Text("–" if result.step is None else f"{result.step}/{'?' if result.steps is None else result.steps}"),
            Text("–" if result.seconds is None else age(result.seconds)),
            Text(_number(result.tokens_per_second, ",.0f")),
            Text(str(result.incidents) if result.incidents else "–"),
        )
    parts: list[RenderableType] = [runs]
    if len(options) > len(shown):
        parts.append(Text(f"\nThey differ in {len(options)} options; --json shows them all."))
    if averaged := means(found):
        parts += [Text("\nOver seeds, of the runs that have finished:", style="bold"), _means(averaged, shown)]
    return Parts(*parts)


def _means(averaged: Sequence[Mean], shown: Sequence[str]) -> Table:
    options = [option for option in shown if option != "seed"]
    result = _empty(*(_short(shown)[shown.index(option)] for option in options), "held-out", "tokens/s", "finished")
    for mean in averaged:
        loss = _number(mean.held_out_loss, ".4f")
        result.add_row(
            *(Text(_plain(mean.options[option]) or "–") for option in options),
            Text(loss if mean.deviation is None else f"{loss} ± {mean.deviation:.4f}"),
            Text(_number(mean.tokens_per_second, ",.0f")),
            Text(f"{mean.finished} of {mean.runs}"),
        )
    return result


def _empty(*titles: str) -> Table:
    result = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        is_name = title in ("run", "state")
        # a title is an option's path, in which brackets are no markup
        result.add_column(Text(title), overflow="fold", justify="left" if is_name else "right", no_wrap=not is_name)
    return result


def _short(options: Sequence[str]) -> list[str]:
    """Their last parts, where these tell them apart."""
    ends = [option.rpartition(".")[2] for option in options]
    return [
        end if ends.count(end) == 1 and not end.isdigit() else option for option, end in zip(options, ends, strict=True)
    ]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if math.isfinite(value) else str(value).replace("nan", "NaN")
