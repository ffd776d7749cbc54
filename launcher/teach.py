"""`trimtab teach`: starts the ranks that write a teacher's knowledge, on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from launcher import accelerate, local, start
from launcher.lookout import Lookout, beats_folder
from launcher.run_directory import create, locked, read_outcome, write_atomically
from trainer.config.facts import facts_from_json
from trainer.config.files import RunFiles
from trainer.config.load import dump_config
from trainer.config.schema import RunConfig
from trainer.config.teaching import distill_of, writing
from trainer.errors import SUPERVISED, ExitCode, LaunchError
from trainer.heartbeat import FOLDER_VARIABLE

SPLITS = ("train", "held_out")
REQUEST = "teach.json"
"""What the ranks are asked for, in their folder."""
STOPPED = "stopped; complete blocks stay, and the same command goes on"


def teach(request: start.Request, splits: Sequence[str], sharded: bool, say: start.Say) -> int:
    """Write the caches of the run's teacher; the exit code.

    Args:
        splits: of the data, in this order.
        sharded: the teacher lies over the ranks (`zero3`), whatever its place in the config.

    Raises:
        ConfigError, LaunchError: it cannot be started as asked.
    """
    # as the ranks will have it: the cache that the run reads need not be there yet
    config = writing(request.config, sharded=sharded)
    root = folder_of(config)
    if unknown := [split for split in splits if split not in SPLITS]:
        raise LaunchError(f"--split takes {' or '.join(SPLITS)}, not {unknown[0]!r}")
    if config.cluster.nodes > 1:
        raise LaunchError(
            f"the config asks for {config.cluster.nodes} machines, and `trimtab teach` starts this one only: set "
            "cluster.nodes=1 (docs/teacher-cache.md shows how to use several)"
        )
    start.require_startable(config)
    create(root)
    with locked(root) as lock:
        files = RunFiles(root)
        write_atomically(files.config, dump_config(config))
        write_atomically(root / REQUEST, json.dumps({"splits": list(dict.fromkeys(splits)), "sharded": sharded}))
        # the data may be others than when this folder was used before
        files.data.unlink(missing_ok=True)
        files.outcome.unlink(missing_ok=True)
        start.prepare(root, lock, say)
        layout = _write_launcher_files(files, config)
        ended, killed = _launch(root, layout, config, lock, say)
    outcome = read_outcome(root)
    if outcome is None and ended.stop_requested and not killed:
        outcome = {"reason": "stopped", "exit_code": ExitCode.STOPPED, "message": STOPPED}
    elif outcome is None or outcome["reason"] == "crashed":
        # what other ranks say is only that they miss the one that was killed
        said = outcome["message"] if outcome else f"the ranks ended with exit code {ended.exit_code}"
        text = f"{killed or said}; complete blocks stay, and the same command goes on"
        outcome = {"reason": "crashed", "exit_code": ExitCode.CRASHED, "message": text}
    if outcome["reason"] in ("stopped", "crashed"):
        say(str(outcome["message"]))
    return int(outcome["exit_code"])


def folder_of(config: RunConfig) -> Path:
    """What the ranks that teach work from: config, prepared data, launcher files.

    Raises:
        ConfigError: there is no teacher, or none whose knowledge can be kept.
    """
    return Path(distill_of(config).cache.folder) / ".teach" / config.name


def _write_launcher_files(files: RunFiles, config: RunConfig) -> accelerate.Layout:
    plan = start.plan_of(config, facts_from_json(files.model.read_text(encoding="utf-8")))
    layout = start.layout_of(config, plan)
    write_atomically(files.plan, json.dumps(dataclasses.asdict(plan), indent=1, default=str))
    write_atomically(files.accelerate, accelerate.accelerate_yaml(layout))
    return layout


def _launch(
    root: Path, layout: accelerate.Layout, config: RunConfig, lock: int | None, say: start.Say
) -> tuple[local.Ended, str | None]:
    """How the ranks ended, and why they were killed, if they were."""
    with beats_folder(layout.ranks) as beats:
        lookout = Lookout(beats, config.supervision.hang_seconds, root / "hangs")
        ended = local.supervise(
            accelerate.accelerate_argv(root, module="trainer.teach"),
            {
                **os.environ,
                **accelerate.environment(layout),
                "PET_SHUTDOWN_TIMEOUT": str(accelerate.SHUTDOWN_SECONDS),
                FOLDER_VARIABLE: str(beats),
                SUPERVISED: "1",
            },
            targets=local.children_of,
            inherit=() if lock is None else (lock,),
            stopping="stopping; complete blocks stay",
            say=say,
            watch=lookout,
        )
        death = lookout.first_death
        was_killed = death is not None and (death.status is None or death.status < 0)
        return ended, ended.alarm or (str(death) if was_killed else None)
