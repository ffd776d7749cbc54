"""How far the stages of a pipeline have come, as their folders say it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from launcher.pipelines.stages import Pipeline, Stage
from launcher.run_directory import differences, has_trained, read_outcome, write_atomically
from launcher.start import completed_before, is_exported
from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.errors import ExitCode, RunDirectoryError

CANCELLED = "cancelled"
"""Reason in the outcome of a run that was not started, because one that it waited for did not end well."""


def needed_exports(pipeline: Pipeline) -> frozenset[Path]:
    """The exports that later stages go on with or are taught by."""
    return frozenset(path for stage in pipeline.stages for path in (stage.source, stage.teacher) if path is not None)


def is_done(root: Path, needed: frozenset[Path]) -> bool:
    """Complete, and exported where a later stage needs that."""
    return completed_before(root) is not None and (RunFiles(root).export not in needed or is_exported(root))


def whence(pipeline: Pipeline, stage: Stage) -> str:
    """What the stage begins with, as the end of a sentence; empty: nothing of an earlier one."""
    parts = (("going on with", stage.source), ("taught by", stage.teacher))
    return "".join(f", {how} {os.path.relpath(path, pipeline.root)}" for how, path in parts if path is not None)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def refuse_other_configs(pipeline: Pipeline) -> None:
    """
    Raises:
        RunDirectoryError: a run of a stage was trained with options that it no longer has.
    """
    for stage in pipeline.stages:
        for request in stage.requests:
            if not (has_trained(request.root) and RunFiles(request.root).config.exists()):
                continue
            found = differences(read_run_config(request.root), request.config)
            if changed := [difference for difference in found if not difference.harmless]:
                lines = "\n".join(f"  {difference}" for difference in changed)
                raise RunDirectoryError(
                    f"{request.root} holds a run with another config:\n{lines}\n"
                    f"use another name for the stage {stage.name} or for the pipeline, or --fresh, which moves the old "
                    "runs aside"
                )


def note_cancellation(run: Path, message: str) -> None:
    """Give a run that was to come and will not an outcome that says why, where nothing of it has begun."""
    files = RunFiles(run)
    if not run.is_dir() or has_trained(run) or read_outcome(run) is not None:
        return
    about = {
        "reason": CANCELLED, "exit_code": int(ExitCode.USAGE), "message": message, "step": 0, "steps": None,
        "checkpoint": None, "held_out_loss": None, "start": 0,
    }  # fmt: skip
    write_atomically(files.outcome, json.dumps(about, indent=1, ensure_ascii=False))


def forget_cancellation(run: Path) -> None:
    """It is to come all the same."""
    outcome = read_outcome(run)
    if outcome is not None and outcome["reason"] == CANCELLED:
        RunFiles(run).outcome.unlink(missing_ok=True)
