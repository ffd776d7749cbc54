"""Pipelines on this machine: their stages one after the other, each when those before it have ended well.

Folders and record are those of a pipeline that is submitted. The runs of a sweep are trained one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import comparison, here, local, start
from launcher.pipelines.progress import (
    forget_cancellation,
    is_done,
    needed_exports,
    note_cancellation,
    refuse_other_configs,
    whence,
)
from launcher.pipelines.record import FILE_NAME, PipelineRecord, StageRecord, read_record, write_record
from launcher.pipelines.stages import Pipeline, Stage
from launcher.pipelines.sweep import enter_sweep, make_folder, require_folder
from launcher.run_directory import locked
from trainer.config.files import RunFiles
from trainer.errors import ConfigError, ExitCode, LaunchError, TrimtabError

if TYPE_CHECKING:
    from rich.console import RenderableType

Say = Callable[[str], None]
Show = Callable[["str | RenderableType"], None]

GOES_ON = "the same command goes on"
_VERBS = {"refused": "was refused", "superseded": "was taken over by another start of it"}


def run_pipeline(pipeline: Pipeline, say: Say, show: Show, *, fresh: bool = False) -> int:
    """Train what is not complete yet, up to the end or the first run that does not end well.

    Must be called from the main thread: requests to stop are held back over all stages.

    Args:
        fresh: begin anew; all runs of the stages are moved aside first.

    Returns:
        The exit code: of the run that did not end well, 0 where all did.

    Raises:
        LaunchError, ConfigError: a stage cannot run on this machine.
        RunDirectoryError: a folder is in use, something else's, or of a run with another config.
    """
    require_folder(pipeline.root, FILE_NAME, "pipeline")
    _require_startable(pipeline)
    if not fresh:
        refuse_other_configs(pipeline)
    make_folder(pipeline.root, FILE_NAME, "pipeline")
    with locked(pipeline.root), local.Requests() as requests:
        _enter(pipeline, fresh, say)
        code = _through(pipeline, requests, say, show)
    _show_all(pipeline, show)
    return code


def _require_startable(pipeline: Pipeline) -> None:
    """Before the first stage, not when hours later the last one is reached."""
    needed = needed_exports(pipeline)
    for stage in pipeline.stages:
        for request in stage.requests:
            if is_done(request.root, needed):
                continue
            try:
                start.require_startable(request.config)
            except ConfigError as error:
                raise ConfigError(error.problems, f"stage {stage.name}") from None
            except LaunchError as error:
                raise LaunchError(f"stage {stage.name}: {error}") from None


def _enter(pipeline: Pipeline, fresh: bool, say: Say) -> None:
    """Directories and configs of all runs, so that `trimtab status` shows what is to come; and the record."""
    needed = needed_exports(pipeline)
    known = {} if (record := read_record(pipeline.root)) is None else {stage.name: stage for stage in record.stages}
    stages = []
    for stage in pipeline.stages:
        if stage.sweep is not None:
            enter_sweep(stage.sweep, say)
        done = not fresh and all(is_done(request.root, needed) for request in stage.requests)
        for request in stage.requests:
            forget_cancellation(request.root)
            if fresh or not is_done(request.root, needed):
                with start.entered(request, fresh, say):
                    pass
        runs = tuple(str(request.root) for request in stage.requests)
        job = known[stage.name].job if done and stage.name in known else ""
        stages.append(StageRecord(name=stage.name, root=str(stage.root), runs=runs, after=stage.after, job=job))
    write_record(pipeline.root, PipelineRecord(name=pipeline.name, file=str(pipeline.file), stages=tuple(stages)))


def _through(pipeline: Pipeline, requests: local.Requests, say: Say, show: Show) -> int:
    needed = needed_exports(pipeline)
    for place, stage in enumerate(pipeline.stages, 1):
        title = f"stage {place} of {len(pipeline.stages)}, {stage.name}"
        left = [each for each in stage.requests if not (is_done(each.root, needed) and comparison.is_done(each))]
        if not left:
            say(f"{title}: it is complete")
        for request in left:
            point = f" {request.root.name}" if stage.sweep is not None else ""
            if (stop := requests.wait(0)) is not None:
                say(f"{local.words_of(stop)}: stopped before {stage.name}{point}; {GOES_ON}")
                return ExitCode.STOPPED
            say(f"{title}{point}{whence(pipeline, stage)}")
            outcome = _outcome(request, needed, requests, say, show)
            if outcome["exit_code"] != ExitCode.COMPLETED:
                _end(pipeline, stage, outcome, say)
                return int(outcome["exit_code"])
    return ExitCode.COMPLETED


def _outcome(
    request: start.Request, needed: frozenset[Path], requests: local.Requests, say: Say, show: Show
) -> here.Outcome:
    """Of a run that is trained now; of one that could not be started one in the same form."""
    exported = RunFiles(request.root).export in needed
    try:
        return here.run(request, say, show, exported=exported, requests=requests).outcome
    except TrimtabError as error:
        return {"reason": "refused", "exit_code": int(error.exit_code), "message": str(error)}
    except SystemExit as ended:
        # its preparation, which has said why
        code = int(ended.code or 0)
        reasons = {ExitCode.STOPPED: "stopped", ExitCode.USAGE: "refused"}
        message = "what it needs could not be prepared, see above"
        return {"reason": reasons.get(ExitCode(code), "crashed"), "exit_code": code, "message": message}


def _end(pipeline: Pipeline, stage: Stage, outcome: here.Outcome, say: Say) -> None:
    """Say what a stage that did not end well means for the others, and note it with those that wait for it."""
    reason, message = str(outcome["reason"]), str(outcome.get("message") or "")
    if reason == "stopped":
        say(f"stage {stage.name} stopped; {GOES_ON} with it")
        return
    why = f"{_VERBS.get(reason, reason)}{f': {message}' if message else ''}"
    for other in _waiting_for(pipeline, stage.name):
        for request in other.requests:
            note_cancellation(request.root, f"not started: stage {stage.name!r} {why}")
    say(f"the pipeline ends with stage {stage.name!r}, which {why}")


def _waiting_for(pipeline: Pipeline, name: str) -> Iterator[Stage]:
    """The stages that wait for it, also through others."""
    stopped = {name}
    for stage in pipeline.stages:
        if stopped & set(stage.after):
            stopped.add(stage.name)
            yield stage


def _show_all(pipeline: Pipeline, show: Show) -> None:
    """Where every run stands, as `trimtab status` does."""
    from launcher.status import Fitted, status_of

    now = time.time()
    roots = []
    for request in (request for stage in pipeline.stages for request in stage.requests):
        roots += [request.root, *([comparison.plain(request).root] if comparison.is_wanted(request.config) else [])]
    there = [root for root in roots if RunFiles(root).config.is_file()]
    show("")
    show(Fitted([replace(status_of(root, now), name=str(root.relative_to(pipeline.root))) for root in there]))
