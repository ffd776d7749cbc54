"""What can be refused before the ranks start: data prepared, model known. `python -m trainer.stages.prepare RUN`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from trainer.config.facts import facts_from_json, facts_to_json
from trainer.config.files import RunFiles
from trainer.config.load import read_run_config
from trainer.config.resolve import loads_teacher, tokenizer_reference
from trainer.config.schema import RunConfig
from trainer.data import report
from trainer.data.changes import check_unchanged
from trainer.data.parts import Progress
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared
from trainer.data.several import SeveralPrepared, open_several, prepare_several
from trainer.data.windows import Reading
from trainer.errors import DataError, ExitCode, RunDirectoryError, TrimtabError
from trainer.records import Classes, ModelFacts


def prepare_run(files: RunFiles, config: RunConfig, progress: Progress | None = None) -> tuple[Prepared, ModelFacts]:
    """Prepare the data of a run (nothing to do when it is there), check its model, and note both in the run directory.

    Raises:
        DataError: unusable or changed data.
        ConfigError: a model that does not fit.
    """
    options: dict[str, Any] = {
        "base": files.root,
        "tokenizer_fallback": tokenizer_reference(config),
        "trust_remote_code": config.model.trust_remote_code,
        "progress": progress,
    }
    if config.objective.kind == "several":
        prepared: Prepared = prepare_several(config.data, config.objective.tasks, **options)
    else:
        prepared = prepare(config.data, kind=config.objective.kind, **options)
    if files.data.exists():
        began_with = json.loads(files.data.read_text())["fingerprint"]
        if warning := check_unchanged(prepared, began_with, config.data.accept_changed):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    # both splits must be readable at this length before any rank starts
    for split in ("train", "held_out"):
        prepared.samples(split, config.data.sequence_length, config.data.boundaries)
    if config.distill is not None:
        _check_teacher(config, prepared)
    described = _description(config, prepared.vocabulary, prepared.classes)
    known = None if described is None else Path(config.data.prepared) / "models" / f"{described}.json"
    facts = _facts_before(files, described) or _known_facts(known)
    if facts is None:
        # takes seconds to import, which a run that goes on need not wait for
        from trainer.model.describe import describe, describe_teacher

        facts = describe(config, prepared.vocabulary, prepared.classes, prepared.kept)
        if loads_teacher(config):
            write_whole(files.teacher, facts_to_json(describe_teacher(config)))
        _remember(known, facts)
    note = {
        "path": str(prepared.path),
        **({"paths": _paths(prepared)} if isinstance(prepared, SeveralPrepared) else {}),
        "fingerprint": prepared.fingerprint,
        "report": prepared.report_at(config.data.sequence_length),
        "described": described,
    }
    write_whole(files.data, json.dumps(note, indent=1))
    write_whole(files.model, facts_to_json(facts))
    return prepared, facts


def _paths(prepared: SeveralPrepared) -> dict[str, str]:
    """Folder of each task's data."""
    return {name: str(part.path) for name, part in prepared.parts.items()}


def _check_teacher(config: RunConfig, prepared: Prepared) -> None:
    """Refuse a teacher that means something else by a token, or does not answer."""
    assert config.distill is not None
    if config.distill.teacher.place == "server" and config.distill.teacher.server is not None:
        from trainer.teacher.server import ServerTeacher

        teacher = ServerTeacher(
            config.distill.teacher.server,
            tokenizer=prepared.tokenizer_path,
            vocabulary=prepared.vocabulary,
            boundaries=config.data.boundaries,
        )
        try:
            teacher.check(config.data.sequence_length)
        finally:
            teacher.close()
    elif config.distill.teacher.place == "cache":
        from trainer.stages.caching import check_knowledge

        check_knowledge(config, prepared)
    else:
        from trainer.teacher.vocabulary import check_tokenizer

        check_tokenizer(config.distill, prepared.tokenizer_path, prepared.kept)


def _description(config: RunConfig, vocabulary: int, classes: Classes | None) -> str | None:
    """Digest of all that the facts of a model follow from; None: of files elsewhere too, which may have changed."""
    if config.model.pretrained is not None or loads_teacher(config):
        return None
    # what weight decay acts on is among the facts
    parts = [config.model.model_dump(), config.optim.model_dump(), config.objective.model_dump()]
    lengths = [
        config.data.sequence_length,
        config.data.boundaries,
        vocabulary,
        version("transformers"),
        version("torch"),
        *(classes.names if classes else ()),
    ]
    text = json.dumps([*parts, *lengths], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _facts_before(files: RunFiles, described: str | None) -> ModelFacts | None:
    """The facts that an earlier start noted, where nothing has changed that they follow from."""
    if described is None:
        return None
    try:
        if json.loads(files.data.read_text())["described"] != described:
            return None
        return facts_from_json(files.model.read_text())
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _known_facts(path: Path | None) -> ModelFacts | None:
    """The facts that another run with the same model noted beside the data."""
    try:
        return None if path is None else facts_from_json(path.read_text())
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _remember(path: Path | None, facts: ModelFacts) -> None:
    """For further runs with this model: runs of a sweep need not import what describes it."""
    if path is not None:
        # what cannot be written here is found out again
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, facts_to_json(facts))


def open_run(files: RunFiles, config: RunConfig) -> tuple[Prepared, ModelFacts]:
    """What :func:`prepare_run` left, without looking at the sources again.

    Raises:
        DataError: the prepared data is gone or another.
    """
    try:
        note = json.loads(files.data.read_text())
        facts = facts_from_json(files.model.read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{files.root} is not prepared ({error}); run `trimtab prepare {files.root}`") from None
    path = Path(note["path"])
    for folder in map(Path, note.get("paths", {"": path}).values()):
        if not folder.is_dir():
            raise DataError(f"the prepared data {folder} is gone; run `trimtab prepare {files.root}`")
    if config.objective.kind == "several":
        prepared: Prepared = open_several(config.data, config.objective.tasks, note["paths"])
    else:
        prepared = Prepared.open(path, [source.weight for source in config.data.sources], Reading.of(config.data))
    if prepared.fingerprint != note["fingerprint"] and not config.data.accept_changed:
        raise DataError(
            f"the prepared data {path} is not what {files.root} began with; restore it, or set data.accept_changed=true"
        )
    return prepared, facts


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or what was there before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def shown() -> Iterator[Progress]:
    """A progress bar a stage on a terminal, a line a stage elsewhere; both on standard error."""
    console = Console(stderr=True, highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if not console.is_terminal:
                    print(f"preparing: {stage}", file=sys.stderr, flush=True)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def main(arguments: Sequence[str]) -> int:
    """Prepare RUN; the exit code of the process."""
    if len(arguments) != 1:
        print("name a run directory: python -m trainer.stages.prepare RUN", file=sys.stderr)
        return ExitCode.USAGE
    files = RunFiles(Path(arguments[0]).absolute())
    try:
        config = read_run_config(files.root)
        with shown() as progress:
            prepared, _ = prepare_run(files, config, progress)
        found = prepared.report_at(config.data.sequence_length)
        Console(stderr=True, highlight=False).print(report.table(found))
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return ExitCode.COMPLETED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
