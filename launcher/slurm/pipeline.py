"""Pipelines: stages are submitted in order, each waiting for those before it, and what failed takes along what waits.

`RUNS/PIPELINE/pipeline.json` says which job each stage got. The same command again submits what has not ended well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.pipelines.progress import (
    forget_cancellation,
    is_done,
    listed,
    needed_exports,
    note_cancellation,
    refuse_other_configs,
    whence,
)
from launcher.pipelines.record import FILE_NAME, PipelineRecord, StageRecord, held, read_record, write_record
from launcher.pipelines.stages import Pipeline, Stage
from launcher.pipelines.sweep import enter_sweep, make_folder, require_folder
from launcher.slurm.history import read_jobs
from launcher.slurm.stage_jobs import current_jobs, job_of_runs
from launcher.start import Request
from trainer.config.files import RunFiles
from trainer.errors import LaunchError

Say = Callable[[str], None]
Submit = Callable[[Stage, Sequence[Request], Sequence[str]], str | None]
"""(stage, its runs that are to be submitted, ids of the jobs that must have ended well) → id of the job."""
States = Callable[[Sequence[str]], Mapping[str, str]]
"""Ids of jobs → those of them that wait or run: PENDING, NEVER (waits for what can no longer be), else another word. An
array's id stands for its tasks, each by its own."""
Cancel = Callable[[Sequence[str]], None]
"""End jobs by their ids."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done about a stage."""

    stage: Stage
    action: Literal["submit", "keep", "leave", "hold"]
    """keep: its job goes on. leave: it is complete. hold: it is not submitted while what it waits for goes on without
    some of its runs."""
    requests: tuple[Request, ...] = ()
    """The runs that are to be submitted."""
    jobs: tuple[str, ...] = ()
    """keep: its jobs. submit: those that wait in vain and are to be removed."""
    lost: int = 0
    """keep: how many of its runs are not complete and have no job."""


def submit_pipeline(
    pipeline: Pipeline,
    submit: Submit,
    states: States,
    cancel: Cancel,
    *,
    fresh: bool = False,
    dry_run: bool = False,
    say: Say,
) -> dict[str, str]:
    """Submit every stage that has not ended well and has no job any more; stage → id of its job now.

    Args:
        fresh: submit complete stages too; `submit` moves their runs aside.
        dry_run: only say what would be submitted.

    Raises:
        RunDirectoryError: the folder is something else's, or a run in it was trained with another config.
        LaunchError: fresh, and a stage has a job.
        TrimtabError: whatever `submit` raises; what was submitted before stays, and is noted.
    """
    require_folder(pipeline.root, FILE_NAME, "pipeline")
    if not fresh:
        refuse_other_configs(pipeline)
    if not dry_run:
        make_folder(pipeline.root, FILE_NAME, "pipeline")
    with contextlib.nullcontext() if dry_run else held(pipeline.root, say):
        record = read_record(pipeline.root)
        steps = decide(pipeline, record, states, fresh=fresh)
        for line in _told(pipeline, record, steps, dry_run):
            say(line)
        if dry_run:
            return {}
        if in_vain := [job for step in steps if step.action == "submit" for job in step.jobs]:
            cancel(in_vain)
        return _carry_out(pipeline, record, steps, submit, say)


def _carry_out(
    pipeline: Pipeline, record: PipelineRecord | None, steps: Sequence[Step], submit: Submit, say: Say
) -> dict[str, str]:
    known = {} if record is None else {stage.name: stage for stage in record.stages}
    entries = {
        step.stage.name: _entry(step.stage, known.get(step.stage.name), submitted=step.action == "submit")
        for step in steps
    }

    def note() -> None:
        stages = tuple(entries.values())
        write_record(pipeline.root, PipelineRecord(name=pipeline.name, file=str(pipeline.file), stages=stages))

    note()
    jobs: dict[str, str] = {}
    waited: dict[str, tuple[str, ...]] = {}
    for step in steps:
        stage = step.stage
        if step.action == "keep":
            waited[stage.name] = step.jobs
            jobs[stage.name] = entries[stage.name].job
        if step.action != "submit":
            continue
        if stage.sweep is not None:
            enter_sweep(stage.sweep, say)
        for request in step.requests:
            forget_cancellation(request.root)
        after = [job for name in stage.after for job in waited.get(name, ())]
        if (job := submit(stage, step.requests, after)) is None:
            continue
        waited[stage.name], jobs[stage.name] = (job,), job
        runs = tuple(str(request.root) for request in step.requests)
        entries[stage.name] = entries[stage.name].model_copy(update={"job": job, "runs": runs})
        note()
        say(f"{stage.name}: job {job}{f', when {listed(after)} ended well' if after else ''}")
    return jobs


def _entry(stage: Stage, known: StageRecord | None, *, submitted: bool) -> StageRecord:
    job = known.job if known is not None and not submitted else ""
    runs = known.runs if known is not None and not submitted else tuple(str(each.root) for each in stage.requests)
    return StageRecord(name=stage.name, root=str(stage.root), runs=runs, after=stage.after, job=job)


def decide(
    pipeline: Pipeline, record: PipelineRecord | None, states: States, *, fresh: bool = False
) -> tuple[Step, ...]:
    """What is to be done about each stage, in the order of submission.

    Raises:
        LaunchError: fresh, and a stage has a job.
    """
    known = {} if record is None else {stage.name: stage for stage in record.stages}
    asked = [job for stage in known.values() for job in current_jobs(stage)]
    alive = states(asked) if asked else {}
    needed = needed_exports(pipeline)
    steps: dict[str, Step] = {}
    for stage in pipeline.stages:
        left = tuple(each for each in stage.requests if fresh or not is_done(each.root, needed))
        jobs = job_of_runs(known[stage.name]) if stage.name in known else {}
        words = {run: alive[job] for run, job in jobs.items() if job in alive}
        if fresh and words:
            raise LaunchError(f"{stage.name} has job {listed(current_jobs(known[stage.name]))}; end it before --fresh")
        before = [steps[name] for name in stage.after]
        waits_in_vain = bool(words) and (
            set(known[stage.name].after) != set(stage.after)
            or any(step.action == "submit" for step in before)
            or "NEVER" in words.values()
        )
        if not left:
            step = Step(stage, "leave")
        elif words and not (waits_in_vain and {*words.values()} <= {"PENDING", "NEVER"}):
            lost = sum(each.root not in words for each in left)
            step = Step(stage, "keep", (), current_jobs(known[stage.name]), lost)
        elif any(step.action == "hold" or step.lost for step in before):
            step = Step(stage, "hold")
        else:
            step = Step(stage, "submit", left, current_jobs(known[stage.name]) if words else ())
        steps[stage.name] = step
    return tuple(steps.values())


def _told(pipeline: Pipeline, record: PipelineRecord | None, steps: Sequence[Step], dry_run: bool) -> Iterator[str]:
    would = "would be" if dry_run else "is"
    yield f"pipeline {pipeline.name} in {pipeline.root}"
    for number, step in enumerate(steps, 1):
        stage = step.stage
        match step.action:
            case "leave":
                what = "is complete"
            case "keep":
                what = f"goes on in job {listed(step.jobs)}"
                if step.lost:
                    what += f", without {step.lost} of its {len(stage.requests)} runs; then submit it again"
            case "hold":
                what = f"{would} not submitted before that"
            case "submit":
                what = f"{would} submitted{_amount(step)}"
                if waits := [other.stage.name for other in steps if other.stage.name in stage.after]:
                    what += f" after {listed(waits)}"
                what += whence(pipeline, stage)
        yield f"  {number}. {stage.name} {what}"
        if step.action == "submit" and step.jobs:
            yield f"     job {listed(step.jobs)}, which waits in vain, {would} cancelled"
    names = {step.stage.name for step in steps}
    for gone in [] if record is None else [stage for stage in record.stages if stage.name not in names]:
        yield f"  {gone.name} is no longer a stage; its run{f' and its job {gone.job}' if gone.job else ''} stay"


def _amount(step: Step) -> str:
    stage = step.stage
    parts = []
    if stage.sweep is not None:
        total, number = len(stage.requests), len(step.requests)
        parts.append(f"an array of {number} runs" if number == total else f"{number} of its {total} runs")
    if stage.nodes is not None:
        fewest, most = stage.nodes
        number_of_nodes = str(most) if fewest == most else f"{fewest}-{most}"
        parts.append(f"{number_of_nodes} node{'' if most == 1 else 's'}{' each' if stage.sweep else ''}")
    return f" ({', '.join(parts)})" if parts else ""


def cancel_after(root: Path, why: str, cancel: Cancel) -> list[str]:
    """Cancel what waits for the run in `root`, which has ended for good otherwise than well.

    Every run of the stages that wait for it, also through others, that has not begun gets an outcome which says why.

    Args:
        why: how it ended: `halted: the loss is not finite`.

    Returns:
        The names of the stages; none where the run is of no pipeline.

    Raises:
        RunDirectoryError: the record of the pipeline is damaged, or an outcome cannot be written.
    """
    found = _pipeline_of(root)
    if found is None:
        return []
    folder, failed = found
    with held(folder, print):
        record = read_record(folder)
        stages = [] if record is None else _waiting_for(record, failed)
        jobs = [job for stage in stages for job in current_jobs(stage)]
        for stage in stages:
            for run in map(Path, stage.runs):
                note_cancellation(run, f"not started: stage {failed!r} {why}")
        if record is not None and stages:
            without = [each.model_copy(update={"job": ""}) if each in stages else each for each in record.stages]
            write_record(folder, record.model_copy(update={"stages": tuple(without)}))
    if jobs:
        cancel(jobs)
    return [stage.name for stage in stages]


def _pipeline_of(root: Path) -> tuple[Path, str] | None:
    """(folder of the pipeline, stage) that the run is of."""
    for folder in (root.parent, root.parent.parent):
        record = read_record(folder)
        for stage in () if record is None else record.stages:
            if str(root) in stage.runs:
                return folder, stage.name
    return None


def _waiting_for(record: PipelineRecord, name: str) -> list[StageRecord]:
    """The stages that wait for it, also through others, and have not begun."""
    stopped, found = {name}, []
    for stage in record.stages:
        if not stopped & set(stage.after) or not stage.job or _has_begun(stage):
            continue
        stopped.add(stage.name)
        found.append(stage)
    return found


def _has_begun(stage: StageRecord) -> bool:
    jobs = {job.job for run in stage.runs for job in read_jobs(RunFiles(Path(run)))}
    return any(job == stage.job or job.startswith(f"{stage.job}_") for job in jobs)
