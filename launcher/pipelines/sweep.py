"""One config as many runs, one for each combination of the values that some of its options take.

`RUNS/NAME/` is the folder of a sweep, each point a run of its own in it, named by what sets it apart:
`RUNS/NAME/lr=0.001,seed=1`. `sweep.json` keeps the points, so that the same command goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from launcher.pipelines.points import Axis, Point, Problem, as_yaml, points_of, read_axes, refused
from launcher.run_directory import LOCK_FILE, write_atomically
from launcher.start import Request, read_request
from trainer.config.files import RunFiles
from trainer.config.load import load_config
from trainer.config.section import Section
from trainer.errors import ConfigError, LaunchError, RunDirectoryError

Say = Callable[[str], None]

FILE_NAME = "sweep.json"


class _Points(Section):
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that was asked for."""

    root: Path
    """Its folder."""
    points: tuple[Point, ...]
    """In the order of the array."""
    requests: tuple[Request, ...]
    """One for each."""
    added: tuple[str, ...]
    """Names of the points that an earlier sweep in this folder did not have."""


def expand(
    source: Path,
    overrides: Sequence[str],
    sweep: Sequence[str],
    seeds: int | None,
    ranks: int | None,
    *,
    dry_run: bool,
    say: Say,
) -> list[Request]:
    """The runs that `--sweep` and `--seeds` make of the config in `source`, in the order of the array. Writes the
    folder of the sweep, unless it is a dry run.

    Raises:
        ConfigError, RunDirectoryError, LaunchError: see `read_sweep` and `enter_sweep`.
    """
    found = read_sweep(source, overrides, read_axes(sweep), seeds=seeds, ranks=ranks)
    if not dry_run:
        enter_sweep(found, say)
    return list(found.requests)


def read_sweep(
    source: Path,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    *,
    seeds: int | None = None,
    ranks: int | None = None,
) -> Sweep:
    """The sweep of the config in `source` with `overrides`; reads what is there and writes nothing.

    Args:
        seeds: so many seeds, the config's and those after it, as one more axis.
        ranks: `cluster.ranks_per_node`.

    Raises:
        ConfigError: with everything that is wrong, each once however many points it is wrong in.
        RunDirectoryError: the folder is something else's, or of a sweep that has other points.
        LaunchError: `source` is a run.
    """
    if source.is_dir():
        raise LaunchError(f"a sweep is made from a config file, and {source} is a directory; name the YAML file")
    if seeds is not None:
        axes = [*axes, Axis("seed", tuple(range(first := _first_seed(source, overrides, axes), first + seeds)))]
    points = points_of(axes)
    try:
        root = read_request(source, [*overrides, *points[0].overrides], ranks).root
    except ConfigError:
        # the others may have problems of their own
        _requests(source, overrides, Path.cwd(), points, ranks)
        raise
    require_folder(root, FILE_NAME, "sweep")
    known = read_points(root) or []
    points, added = _joined(root, known, points_of(_as_before(known, axes)))
    return Sweep(root, tuple(points), tuple(_requests(source, overrides, root, points, ranks)), tuple(added))


def _first_seed(source: Path, overrides: Sequence[str], axes: Sequence[Axis]) -> int:
    if any(axis.option == "seed" for axis in axes):
        raise refused("seed", "is swept, and a number of seeds is given too; give one of them")
    points = points_of(axes)
    return load_config(source, [*overrides, *points[0].overrides]).seed


def _requests(
    source: Path, overrides: Sequence[str], root: Path, points: Sequence[Point], ranks: int | None
) -> list[Request]:
    requests: list[Request] = []
    problems: dict[Problem, None] = {}
    known: dict[str, str] = {}
    for point in points:
        place = [f"name={as_yaml(point.name)}", f"runs={as_yaml(str(root))}"]
        try:
            request = read_request(source, [*overrides, *point.overrides, *place], ranks)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        same = known.setdefault(request.config.model_dump_json(exclude={"name", "runs"}), point.name)
        if same != point.name:
            problems["", f"the points {same} and {point.name} are the same run; leave one out"] = None
        requests.append(request)
    if problems:
        raise ConfigError(list(problems), str(source))
    return requests


def _as_before(known: Sequence[Point], axes: Sequence[Axis]) -> Sequence[Axis]:
    """The axes in the order that the names of the points have them in."""
    order = [override.partition("=")[0] for override in known[0].overrides] if known else []
    return sorted(axes, key=lambda axis: order.index(axis.option)) if {*order} == {a.option for a in axes} else axes


def _joined(root: Path, known: Sequence[Point], points: Sequence[Point]) -> tuple[list[Point], list[str]]:
    """The points that there were, in their order, and after them those that are new, by name too."""
    wanted = {point.name: point for point in points}
    before = {point.name: point for point in known}
    if lost := [name for name in before if wanted.get(name) != before[name]]:
        more = f" and {len(lost) - 1} more of its {len(before)} points" if len(lost) > 1 else ""
        raise RunDirectoryError(
            f"{root} is a sweep with other points: {lost[0]}{more} would no longer be in it; give its values too, or "
            "use another `name`"
        )
    added = [name for name in wanted if name not in before]
    return [*known, *(wanted[name] for name in added)], added if known else []


def read_points(root: Path) -> list[Point] | None:
    """The points of the sweep in `root`, in their order; None: there is no sweep.

    Raises:
        RunDirectoryError: its record is damaged.
    """
    path = root / FILE_NAME
    try:
        return list(_Points.model_validate_json(path.read_bytes()).points)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({type(error).__name__}); restore it, or move {root} away"
        ) from error


def enter_sweep(sweep: Sweep, say: Say) -> None:
    """Make the folder of the sweep and note its points.

    Raises:
        RunDirectoryError: it cannot be written, or has become something else's.
    """
    make_folder(sweep.root, FILE_NAME, "sweep")
    if sweep.added:
        number = len(sweep.added)
        what = f"{number} points are" if number > 1 else f"the point {sweep.added[0]} is"
        say(f"{what} added to the {len(sweep.points) - number} of {sweep.root}")
    write_atomically(sweep.root / FILE_NAME, _Points(points=sweep.points).model_dump_json(indent=1) + "\n")


def require_folder(root: Path, file_name: str, noun: str) -> None:
    """Refuse a folder that is not a `noun`'s, which it shows by holding `file_name`, and could not become one.

    Raises:
        RunDirectoryError: what it is instead.
    """
    if RunFiles(root).config.exists():
        raise RunDirectoryError(f"{root} is the directory of a run; use another name for the {noun}")
    try:
        entries = {entry.name for entry in root.iterdir()} - {LOCK_FILE}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise RunDirectoryError(f"{root} is a file; use another name, or move it away") from None
    except OSError as error:
        raise RunDirectoryError(f"{root} cannot be read: {error.strerror}") from error
    if entries and file_name not in entries:
        raise RunDirectoryError(f"{root} exists and is not the folder of a {noun} (it holds no {file_name})")


def make_folder(root: Path, file_name: str, noun: str) -> None:
    """Make it, or accept it.

    Raises:
        RunDirectoryError: it cannot be made, or is something else's.
    """
    require_folder(root, file_name, noun)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{root} cannot be made ({error.strerror}); change `runs` or `name`") from error
