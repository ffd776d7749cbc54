"""Which cache of a teacher's knowledge belongs to a run: fingerprints of teacher, tokenizer and data.

Imports torch only where ranks need it: a missing cache is refused before there are any.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import xxhash

from trainer.config.distill import TeacherConfig
from trainer.config.schema import RunConfig
from trainer.config.teaching import distill_of
from trainer.data.hashes import ContentHashes, content_hash
from trainer.data.prepared import Prepared, Split
from trainer.errors import ConfigError, DataError, TrimtabError
from trainer.teacher.header import Header, Wanted, find, require_complete, why_none

if TYPE_CHECKING:
    from trainer.stages.build import Setting
    from trainer.teacher.cache import CacheTeacher

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
T = TypeVar("T")


def check_knowledge(config: RunConfig, prepared: Prepared, split: Split = "train") -> tuple[Path, Header]:
    """The cache of the run's teacher, looked for and not read.

    Raises:
        ConfigError: there can be no cache for such a run.
        DataError: there is none, for another teacher, tokenizer, data or form only, or not all of it; the text says
            what to do.
    """
    folder, wanted = folder_of(config), wanted_of(config, prepared, split)
    found = find(folder, wanted)
    if found is None:
        raise DataError(why_none(folder, wanted))
    require_complete(found[0])
    return found


def open_knowledge(setting: Setting, split: Split = "train") -> CacheTeacher:
    """The knowledge of the run's teacher, as `trimtab teach` wrote it. A collective.

    Raises:
        ConfigError, DataError: as :func:`check_knowledge`, on all ranks.
    """
    from trainer.teacher.cache import CacheReader, CacheTeacher

    return CacheTeacher(CacheReader(*agreed(lambda: check_knowledge(setting.config, setting.prepared, split))))


def agreed(choose: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks. A collective, where there are several.

    Raises:
        TrimtabError: on all ranks; rank 0 found out.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return choose()
    box: list[T | TrimtabError | None] = [None]
    if dist.get_rank() == 0:
        try:
            box = [choose()]
        except TrimtabError as error:
            box = [error if not isinstance(error, ConfigError) else DataError(str(error))]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], TrimtabError):
        raise box[0]
    return box[0]  # type: ignore[return-value]


def folder_of(config: RunConfig) -> Path:
    """Where the caches are."""
    return Path(distill_of(config).cache.folder)


def wanted_of(config: RunConfig, prepared: Prepared, split: Split) -> Wanted:
    """What a cache for this run must be.

    Raises:
        ConfigError: there can be none.
        DataError: the teacher cannot be read, or the split has no samples.
    """
    distill, data = distill_of(config), config.data
    teacher, cache = distill.teacher, distill.cache
    classes = prepared.classes
    objective: Literal["causal", "classification"] = "causal" if classes is None else "classification"
    return Wanted(
        teacher=fingerprint_of(teacher, Path(cache.folder) / "hashes.json"),
        teacher_precision=None if teacher.precision == "auto" or teacher.pretrained is None else teacher.precision,
        tokenizer=content_hash(prepared.tokenizer_path / "tokenizer.json"),
        data=prepared.fingerprint,
        split=split,
        samples=len(prepared.samples(split, data.sequence_length, data.boundaries)),
        length=data.sequence_length,
        boundaries=data.boundaries,
        objective=objective,
        targets=cache.targets,
        width=cache.top if cache.targets == "top" else cache.draws,
        precision=cache.precision,
        vocabulary=prepared.vocabulary if classes is None else len(classes.names),
    )


def name_of(teacher: TeacherConfig) -> str:
    """The teacher, for people."""
    if teacher.pretrained is None:
        return teacher.server.model if teacher.server else "unknown"
    path = Path(teacher.pretrained)
    return path.name if path.exists() else teacher.pretrained


def fingerprint_of(teacher: TeacherConfig, memory: Path) -> str | None:
    """What tells a teacher from others: the content of its configuration and weights, or its name where it is behind a
    server. None: the config names none.

    Args:
        memory: file in which hashes of large files are remembered.

    Raises:
        DataError: it cannot be read.
    """
    if teacher.pretrained is None:
        return f"server {teacher.server.model}" if teacher.server else None
    path = Path(teacher.pretrained)
    try:
        content = _hashes_of(path, memory) if path.exists() else [["hub", _revision_of(teacher)]]
    except OSError as error:
        text = f"distill.teacher.pretrained: {teacher.pretrained} cannot be read: {str(error).splitlines()[0]}"
        raise DataError(text + "; where only its knowledge is needed, leave it out") from error
    about = json.dumps([content, teacher.overrides], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(about.encode())


def _hashes_of(path: Path, memory: Path) -> list[list[str]]:
    if path.is_file():
        files = [path]
    else:
        weights: list[Path] = next((found for pattern in _WEIGHTS if (found := sorted(path.glob(pattern)))), [])
        if not weights:
            raise DataError(f"distill.teacher.pretrained: {path} holds no weights ({', '.join(_WEIGHTS)})")
        files = [path / "config.json", *weights]
    memory.parent.mkdir(parents=True, exist_ok=True)
    hashes = ContentHashes(memory)
    # a .gguf file may be called otherwise elsewhere; of a folder the names belong to it
    result = [["" if path.is_file() else file.name, hashes.of(file)] for file in files]
    hashes.save()
    return result


def _revision_of(teacher: TeacherConfig) -> str:
    """Commit of a model of the hub."""
    from transformers import AutoConfig

    assert teacher.pretrained is not None
    config = AutoConfig.from_pretrained(teacher.pretrained, trust_remote_code=teacher.trust_remote_code)
    return str(config._commit_hash)
