"""What a cache of a teacher's knowledge says of itself, and whether it is what a run needs. Without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from trainer.errors import DataError
from trainer.teacher.blocks import Grid, choose_per_block
from trainer.teacher.forms import Form

FORMAT = 1
FILE = "header.json"
COMPLETE = "complete"
"""File that is there once all blocks are."""

_WORDS = {
    "tokenizer": "was written with another tokenizer",
    "data": "was written for other data",
    "split": "is of the {mine} split, not of {theirs}",
    "samples": "has {mine} samples, and there are {theirs}",
    "length": "is for samples of {mine} tokens, and data.sequence_length is {theirs}",
    "boundaries": "is for data.boundaries: {mine}, not {theirs}",
    "objective": "is for objective.kind: {mine}, not {theirs}",
    "targets": "holds {mine} targets, and distill.cache.targets is {theirs}",
    "width": "holds {mine} tokens a position, and distill.cache asks for {theirs}",
    "precision": "holds {mine}, and distill.cache.precision is {theirs}",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run needs of a cache."""

    teacher: str | None
    """Fingerprint of the teacher; None: whichever it is."""
    teacher_precision: str | None
    """That it computes in; None: whichever."""
    tokenizer: str
    """Fingerprint."""
    data: str
    """Fingerprint of the prepared data."""
    split: str
    samples: int
    length: int
    """Tokens of a sample."""
    boundaries: str
    objective: Literal["causal", "classification"]
    targets: Literal["top", "sampled"]
    width: int
    """Tokens kept at each position, or draws."""
    precision: Literal["fp16", "fp32"]
    vocabulary: int
    """Real tokens, without what pads a vocabulary; or classes."""


@dataclass(frozen=True, slots=True)
class Header:
    """The content of `header.json`."""

    format: int
    teacher: str
    teacher_name: str
    teacher_precision: str
    tokenizer: str
    data: str
    split: str
    samples: int
    length: int
    boundaries: str
    objective: Literal["causal", "classification"]
    targets: Literal["top", "sampled"]
    width: int
    precision: Literal["fp16", "fp32"]
    vocabulary: int
    """Tokens of which something can be known: the real ones that the teacher has."""
    teacher_vocabulary: int
    seed: int
    """Of the draws."""
    per_block: int
    """Samples in a block."""

    @classmethod
    def of(cls, wanted: Wanted, teacher: tuple[str, str, str], teacher_vocabulary: int, seed: int) -> Header:
        """The header of a cache that is to be written.

        Args:
            teacher: fingerprint, name and precision.
        """
        kept: dict[str, Any] = {name: value for name, value in asdict(wanted).items() if not name.startswith("teacher")}
        kept["vocabulary"] = min(wanted.vocabulary, teacher_vocabulary)
        header = cls(FORMAT, *teacher, **kept, teacher_vocabulary=teacher_vocabulary, seed=seed, per_block=1)
        per_block = choose_per_block(wanted.samples, wanted.length, header.form.record_bytes)
        return replace(header, per_block=per_block)

    @property
    def form(self) -> Form:
        if self.objective == "classification":
            return Form("logits", 1, self.vocabulary, self.vocabulary, "fp32")
        if self.targets == "top" and self.width >= self.vocabulary:
            return Form("complete", self.length, self.vocabulary, self.vocabulary, self.precision)
        return Form(self.targets, self.length, self.width, self.vocabulary, self.precision)

    @property
    def grid(self) -> Grid:
        return Grid(self.samples, self.per_block)

    @property
    def key(self) -> str:
        """Name of the cache's folder."""
        return xxhash.xxh3_64_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())

    def differences(self, wanted: Wanted) -> list[str]:
        """Why this is not what a run needs, the gravest first; empty: it is."""
        found = []
        if self.format != FORMAT:
            return ["was written by another version of Trimtab"]
        if wanted.teacher not in (None, self.teacher):
            found.append(f"is of another teacher ({self.teacher_name})")
        for name, words in _WORDS.items():
            mine, theirs = getattr(self, name), getattr(wanted, name)
            if name in ("targets", "width", "precision") and self.objective == "classification":
                continue
            if name == "precision" and self.targets == "sampled":
                continue
            if mine != theirs and not (name == "width" and wanted.targets == "top" and self._all(theirs)):
                found.append(words.format(mine=mine, theirs=theirs))
        if self.vocabulary != min(wanted.vocabulary, self.teacher_vocabulary):
            found.append(f"knows {self.vocabulary} tokens, and there are {wanted.vocabulary}")
        if wanted.teacher_precision not in (None, self.teacher_precision):
            found.append(
                f"was computed in {self.teacher_precision}, and distill.teacher.precision is {wanted.teacher_precision}"
            )
        return found

    def _all(self, width: int) -> bool:
        """Whether so many tokens a position are all of them, and all are here."""
        return self.form.kind == "complete" and width >= self.vocabulary


def read_header(folder: Path) -> Header | None:
    """The header of a cache; None: there is none that can be read, or it is not one of ours."""
    try:
        content: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            return None
        header = Header(**content)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    kinds = {"str": str, "int": int}
    if any(not isinstance(getattr(header, field.name), kinds.get(str(field.type), str)) for field in fields(header)):
        return None
    return header if folder.name == header.key else None


def write_header(folder: Path, header: Header) -> None:
    """Write it whole; where it is there already it is the same."""
    partial = folder / f".{FILE}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(header), indent=1), encoding="utf-8")
    partial.replace(folder / FILE)


def headers_in(folder: Path) -> Iterator[tuple[Path, Header]]:
    """All caches in a folder of caches, by name."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and (header := read_header(path)) is not None:
                yield path, header


def find(folder: Path, wanted: Wanted) -> tuple[Path, Header] | None:
    """The cache that a run needs; None: there is none.

    Raises:
        DataError: there are several, of different teachers.
    """
    fitting = [(path, header) for path, header in headers_in(folder) if not header.differences(wanted)]
    if len({header.teacher for _, header in fitting}) > 1:
        names = " and ".join(sorted(f"{header.teacher_name} ({path.name})" for path, header in fitting))
        raise DataError(f"{folder} holds the knowledge of several teachers: {names}; set distill.teacher.pretrained")
    return min(fitting, key=lambda one: not (one[0] / COMPLETE).exists(), default=None)


def why_none(folder: Path, wanted: Wanted) -> str:
    """Why :func:`find` found none, in one sentence with what to do."""
    remedy = "write it by `trimtab teach` with this config"
    if wanted.split != "train":
        remedy += f" and --split {wanted.split}"
    near = [(len(found := header.differences(wanted)), path, found) for path, header in headers_in(folder)]
    if not near:
        return f"{folder} holds no knowledge of a teacher: {remedy}"
    _, path, found = min(near)
    return f"{folder} holds no knowledge for this run: {path.name} {' and '.join(found)}; {remedy}"


def require_complete(folder: Path) -> None:
    """
    Raises:
        DataError: blocks of this cache are missing, or it is not visible on this machine.
    """
    if not (folder / COMPLETE).exists():
        raise DataError(
            f"{folder} is not complete on this machine: `trimtab teach` with this config goes on with it, and mends "
            "what is damaged; several machines need it on a shared file system"
        )
