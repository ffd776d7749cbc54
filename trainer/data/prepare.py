"""Prepares data once: whoever asks again, or at the same time, gets the same folder."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from trainer.config.objective import EACH_ALONE, TEXTS, Kind
from trainer.config.schema import DataConfig, SourceConfig
from trainer.data import corpus, tokenize
from trainer.data.build import FORMAT, build, task_of
from trainer.data.corpus import Source
from trainer.data.hashes import ContentHashes
from trainer.data.parts import Progress, guards_held_out
from trainer.data.prepared import Prepared
from trainer.data.tokenize import Choice
from trainer.data.windows import Reading
from trainer.errors import DataError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class _Plan:
    sources: Sequence[Source]
    files: Sequence[Sequence[tuple[str, str]]]
    """(name, hash) of the files of each source."""
    choice: Choice
    key: str
    folder: Path
    task: Kind | None
    """As of :func:`task_of`."""


def _no_progress(_stage: str, _done: int, _total: int | None) -> None:
    pass


def prepare(
    config: DataConfig,
    *,
    base: Path,
    tokenizer_fallback: str | None,
    trust_remote_code: bool,
    kind: Kind | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """The prepared data of a config; made where it does not exist.

    The folder appears at once and complete, or not at all. Of several processes that ask for the same data one makes
    it and the others wait.

    Args:
        base: folder that relative paths of the sources and the tokenizer begin in.
        tokenizer_fallback: `model.pretrained`, whose tokenizer is used where the config names none.
        kind: what the data is for (`objective.kind`); options of sources that it does not use change nothing. None:
            classification where sources have labels, else predicting tokens.
        progress: called with (stage, documents done, documents in all where that is known).

    Raises:
        DataError: a source cannot be read, nothing is left of it, or the disk is full.
        ConfigError: `data.tokenizer.keep` does not fit the tokenizer.
        WorkerDiedError: a worker process was killed.
    """
    progress = progress or _no_progress
    root = Path(config.prepared)
    try:
        root.mkdir(parents=True, exist_ok=True)
        plan = _plan(config, base, tokenizer_fallback, trust_remote_code, kind)
        prepared = _open(plan, config)
        if prepared is None:
            with _lock(root / f".{plan.key}.lock", progress):
                prepared = _open(plan, config)
                if prepared is None:
                    _build_whole(plan, config, progress)
                    prepared = _open(plan, config)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DataError(
                f"the disk of {root.absolute()} is full: free space there, or set data.prepared to a folder elsewhere"
            ) from error
        raise DataError(f"data cannot be prepared in {root.absolute()}: {error}") from error
    assert prepared is not None
    return prepared


def find(
    config: DataConfig,
    *,
    base: Path,
    tokenizer_fallback: str | None,
    trust_remote_code: bool,
    kind: Kind | None = None,
) -> Prepared | None:
    """The prepared data of a config, None where it was not made yet. Arguments as of :func:`prepare`."""
    return _open(_plan(config, base, tokenizer_fallback, trust_remote_code, kind), config)


def _plan(
    config: DataConfig, base: Path, tokenizer_fallback: str | None, trust_remote_code: bool, kind: Kind | None
) -> _Plan:
    root = Path(config.prepared).absolute()
    hashes = ContentHashes(root / "hashes.json")
    sources = corpus.resolve([_used(source, kind) for source in config.sources], base, kind)
    task = task_of(sources, kind)
    files = [_files(source, hashes) for source in sources]
    choice = tokenize.choose(config.tokenizer, tokenizer_fallback, base, trust_remote_code, hashes)
    # absent where it says nothing, as below
    keep = config.tokenizer.model_dump(include={"keep"}, exclude_defaults=True)
    choice = replace(choice, identity=choice.identity | keep)
    if root.is_dir():
        hashes.save()
    what_matters = {
        "format": FORMAT,
        "sources": [
            # how often a source is seen is decided when samples are read
            {"name": source.name, "files": own, **source.config.model_dump(include={"column", "template", "split"})}
            # absent where they say nothing: data that was prepared before there were these options stays what it is
            | source.config.model_dump(include=_OF_SOURCES, exclude_defaults=True)
            for source, own in zip(sources, files, strict=True)
        ],
        "clean": config.clean.model_dump(),
        "tokenizer": choice.identity,
        "held_out": config.held_out,
        **({"kind": task} if task not in {None, "classification"} else {}),
        **({"leaks": "left out of train"} if guards_held_out(sources) else {}),
    }
    key = xxhash.xxh3_64_hexdigest(json.dumps(what_matters, sort_keys=True).encode("utf-8", "backslashreplace"))
    return _Plan(sources, files, choice, key, root / key, task)


_OF_SOURCES = {"label", "label_from_folder", "pair", "messages", "prompt", "answer", "classes", "use"}
"""Options that decide what is prepared."""


def _used(source: SourceConfig, kind: Kind | None) -> SourceConfig:
    """The source without the options that a kind of objective does not use: packed texts have no labels."""
    if kind is None:
        return source
    labels = {"label": None, "label_from_folder": False}
    asked = {"prompt": None, "answer": None}
    without: dict[str, Any] = {}
    if kind not in EACH_ALONE or kind in {"question_answering", "seq2seq"}:
        without |= labels
    if kind != "classification":
        without["classes"] = ()
    if kind not in TEXTS:
        without["pair"] = None
    if kind != "causal":
        without["messages"] = None
    if kind not in {"causal", "question_answering", "seq2seq"}:
        without |= asked
    return source.model_copy(update=without)


def _files(source: Source, hashes: ContentHashes) -> list[tuple[str, str]]:
    if not source.files:
        # a hub dataset: the library's fingerprint follows its revision, configuration and split
        return [(source.name, str(source.dataset._fingerprint))]
    try:
        return [(name, hashes.of(path)) for name, path in source.files]
    except OSError as error:
        raise DataError(f"source {source.name}: {error.filename} cannot be read: {error.strerror}") from error


def _open(plan: _Plan, config: DataConfig) -> Prepared | None:
    if not plan.folder.exists():
        return None
    return Prepared.open(plan.folder, [source.weight for source in config.sources], Reading.of(config))


def _build_whole(plan: _Plan, config: DataConfig, progress: Progress) -> None:
    temporary = plan.folder.with_name(f".{plan.key}.tmp")
    # left by a process that was killed: the lock is ours, so nobody works on it
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        build(temporary, config, plan.sources, plan.choice, plan.files, plan.key, progress, plan.task)
        hashes = ContentHashes(plan.folder.with_name("hashes.json"))
        for source, files in zip(plan.sources, plan.files, strict=True):
            changed = sorted({name for name, _ in set(_files(source, hashes)) ^ set(files)})
            if changed:
                raise DataError(f"source {source.name}: {changed[0]} changed while it was prepared: start again")
        temporary.rename(plan.folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the file's lock. The kernel releases it when a process dies, so a file that is left over blocks nobody."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the same data", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
