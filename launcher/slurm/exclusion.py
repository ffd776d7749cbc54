"""Nodes that are left out for a while: `RUNS/.excluded/NODE.json`, one file a node, for all runs of a folder.

A file of its own for each node makes locks needless: jobs that write at once, on machines of their own, write different
nodes, or two true records of the same one, of which the later stands. Files appear whole.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from pydantic import ValidationError

from launcher.run_directory import write_atomically
from trainer.config.section import NonNegativeFloat, Section
from trainer.errors import LaunchError, RunDirectoryError

FOLDER = ".excluded"

_NODE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


class Exclusion(Section):
    """Why a node is not used, and until when."""

    node: str
    """As the scheduler calls it."""
    why: str
    """A sentence for a person."""
    run: str
    """Name of the run that found it out."""
    since: NonNegativeFloat
    """Unix seconds."""
    until: NonNegativeFloat
    """Unix seconds."""


def checked(node: str) -> str:
    """A node's name, which may be part of a path and of an argument of Slurm.

    Raises:
        LaunchError: it is no name of a node.
    """
    if _NODE.fullmatch(node) is None:
        raise LaunchError(f"{node!r} is not the name of a node; use one as `sinfo --Node` shows it")
    return node


def exclude(folder: Path, node: str, why: str, run: str, now: float, hours: float) -> Exclusion:
    """Leave a node out of all runs of a folder.

    Args:
        folder: of runs.
        run: name of the one that found it out.
        now: Unix seconds.
        hours: from now; where it is left out for longer already, that stays.

    Returns:
        What holds from now on.

    Raises:
        LaunchError: `node` is no name of a node.
        RunDirectoryError: it cannot be written.
    """
    path = _path(folder, node)
    before = _read(path)
    until = max(now + hours * 3600, before.until if before is not None else 0.0)
    exclusion = Exclusion(node=node, why=why, run=run, since=now, until=until)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{path.parent} cannot be made: {error.strerror}") from error
    write_atomically(path, exclusion.model_dump_json(indent=1) + "\n")
    return exclusion


def excluded(folder: Path, now: float) -> dict[str, Exclusion]:
    """The nodes that are left out at present, by name. What is over is swept away; what cannot be read is said and does
    not count."""
    try:
        paths = sorted((folder / FOLDER).glob("*.json"))
    except OSError as error:
        _warn(folder / FOLDER, error.strerror)
        return {}
    found = {}
    for path in paths:
        if (exclusion := _read(path)) is None:
            continue
        if exclusion.until > now:
            found[exclusion.node] = exclusion
        else:
            _sweep(path, now)
    return found


def forgive(folder: Path, node: str) -> bool:
    """Use a node again; False: it was not left out.

    Raises:
        LaunchError: `node` is no name of a node.
        RunDirectoryError: that cannot be noted.
    """
    path = _path(folder, node)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be removed: {error.strerror}") from error
    return True


def _path(folder: Path, node: str) -> Path:
    return folder / FOLDER / f"{checked(node)}.json"


def _read(path: Path) -> Exclusion | None:
    """None: there is none, or none that makes sense, which is said."""
    try:
        exclusion = Exclusion.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(path, error.strerror)
        return None
    except ValidationError:
        _warn(path, "it is damaged")
        return None
    if exclusion.node != path.stem:
        _warn(path, f"it is about {exclusion.node!r}")
        return None
    return exclusion


def _sweep(path: Path, now: float) -> None:
    """Remove what is over, and nothing that another job has written in its place meanwhile."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.over")
    try:
        path.rename(aside)
        exclusion = _read_aside(aside)
        if exclusion is not None and exclusion.until > now and not path.exists():
            aside.rename(path)
        else:
            aside.unlink()
    except FileNotFoundError:
        # another job has swept it
        pass
    except OSError as error:
        _warn(path, error.strerror)


def _read_aside(path: Path) -> Exclusion | None:
    try:
        return Exclusion.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _warn(path: Path, why: str | None) -> None:
    print(f"warning: {path} does not count ({why}); repair or remove it", file=sys.stderr, flush=True)
