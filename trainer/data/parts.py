"""Documents read, cleaned, told apart and put into their splits: the first half of preparing data."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from trainer.config.objective import Kind
from trainer.config.schema import CleanConfig, DataConfig
from trainer.data.chat import Chat
from trainer.data.classes import OUTSIDE, Met, check_chosen
from trainer.data.clean import CONFLICT, EXACT, LEAKED, NEAR, Cleaned, clean
from trainer.data.corpus import Document, Source
from trainer.data.duplicates import NearDuplicates
from trainer.data.pool import Pool
from trainer.data.tasks import maker
from trainer.records import IntArray

SPLITS = ("train", "held_out")
CHUNK_CHARACTERS = 1_000_000
CHUNK_DOCUMENTS = 4096
Progress = Callable[[str, int, int | None], None]
"""(stage, documents done, documents in all where that is known)"""

_EXAMPLES = 3


@dataclass
class Tally:
    """What happened to the documents of one source."""

    documents: int = 0
    characters: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    removed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def remove(self, rule: str, document: Cleaned, other: str | None) -> None:
        """
        Args:
            other: the document that it is equal to, where that is worth telling.
        """
        entry = self.removed.setdefault(rule, {"documents": 0, "characters": 0, "examples": []})
        entry["documents"] += 1
        entry["characters"] += document.num_characters
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(document.name)
            if other is not None:
                entry.setdefault("pairs", []).append([_shown(document.document), other])


@dataclass
class Part:
    """The clean documents of one source in one split."""

    source: int
    split: str
    stem: Path
    kind: Kind | None = None
    characters: int = 0
    bytes: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """UTF-8 bytes of each document."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """Of each document: the number of its class in the order in which classes were met; −1: none. Of several labels:
    those of all documents, one after the other."""
    label_counts: array[int] = field(default_factory=lambda: array("q"))
    """Of several labels: how many each document has."""
    numbers: array[float] = field(default_factory=lambda: array("f"))
    """Of a regression: what is to be predicted of each document."""
    of_words: Counter[int] = field(default_factory=Counter)
    """Of token classification: words, or entities, of each class as it was met."""
    extra_lengths: array[int] = field(default_factory=lambda: array("q"))
    """Bytes of what belongs to each document beside its text; empty where nothing does."""

    @property
    def text(self) -> Path:
        """All documents, one after the other; gone when the build is done."""
        return self.stem.with_suffix(".text")

    @property
    def extra(self) -> Path:
        """JSON of what belongs to each document: its second text, its spans. Gone when the build is done."""
        return self.stem.with_suffix(".extra")

    def count(self, num_classes: int) -> IntArray:
        """Documents (or words) of each class as it was met, [num_classes]."""
        if self.kind == "token_classification":
            return np.array([self.of_words[number] for number in range(num_classes)], dtype=np.int64)
        return np.bincount(np.frombuffer(self.labels, dtype=np.int64), minlength=num_classes)

    def starts(self) -> IntArray:
        return _starts(self.lengths)

    def extra_starts(self) -> IntArray | None:
        return _starts(self.extra_lengths) if self.extra_lengths else None

    def texts(self) -> Iterator[str]:
        """Every text: of documents that have a second one, both."""
        with self.text.open("rb") as file:
            for length in self.lengths:
                yield file.read(length).decode()
        if self.extra_lengths:
            with self.extra.open("rb") as file:
                for length in self.extra_lengths:
                    yield json.loads(file.read(length))["second"] or ""

    def add(self, cleaned: Cleaned, met: Met, files: Mapping[str, BinaryIO]) -> None:
        """Take a document in.

        Args:
            files: open for writing: `text`, `names`, `extra`.
        """
        document = cleaned.document
        files["text"].write(cleaned.text)
        name = document.name.replace("\n", " ").replace("\r", " ")
        files["names"].write(name.encode("utf-8", "backslashreplace") + b"\n")
        self.lengths.append(len(cleaned.text))
        self.characters += cleaned.num_characters
        self.bytes += len(cleaned.text)
        if document.labels is not None:
            self.labels.extend(met.number(label) for label in document.labels)
            self.label_counts.append(len(document.labels))
        elif document.number is not None:
            self.numbers.append(document.number)
        else:
            self.labels.append(met.number(document.label))
        if "extra" in files:
            extra = {"second": document.second, "spans": self._spans(document, met), "words": document.is_words}
            data = json.dumps(extra).encode()
            files["extra"].write(data)
            self.extra_lengths.append(len(data))

    def _spans(self, document: Document, met: Met) -> list[list[int]] | None:
        """[first character, the one after the last, number of the label of the first word, of others]."""
        if document.spans is None:
            return None
        result = []
        for begin, end, label in document.spans:
            # answers have no label
            numbers = []
            if label:
                names = [label] if document.is_words else [f"B-{label}", f"I-{label}"]
                numbers = [met.number(name) for name in names]
                self.of_words.update(numbers)
            result.append([begin, end, *numbers])
        if self.kind == "token_classification" and not document.is_words:
            # words outside of entities are tagged once there are tokens
            self.of_words[met.number(OUTSIDE)] += 1
        return result


def _starts(lengths: array[int]) -> IntArray:
    return np.cumsum(np.concatenate([[0], np.frombuffer(lengths, dtype=np.int64)]), dtype=np.int64)


def _shown(document: Document) -> str:
    if document.labels is not None:
        return f"{document.name} ({', '.join(document.labels) or 'none'})"
    label = document.number if document.number is not None else document.label
    return f"{document.name} ({label})" if label is not None else document.name


def _target(document: Document) -> int:
    """Digest of what is to be predicted of a document: what differs though the text is the same."""
    known = (document.label, document.labels, document.number, document.spans)
    return (
        xxhash.xxh3_64_intdigest(repr(known).encode("utf-8", "backslashreplace"))
        if any(each is not None for each in known)
        else 0
    )


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class Register:
    """What was read already: finds equal and nearly equal documents."""

    def __init__(self, config: CleanConfig, *, names: bool):
        """
        Args:
            names: remember what documents are called, so that pairs can be shown.
        """
        self._exact: dict[int, int] | None = {} if config.exact_duplicates else None
        """Digest of a document → of what is to be predicted of it."""
        self._near = NearDuplicates(config.near_duplicates) if config.near_duplicates is not None else None
        self._names: dict[int, str] | None = {} if names else None
        self._near_names: list[str] = []
        self._guarded: set[int] = set()
        self._guarded_near = 0

    def guard(self) -> None:
        """What was read so far is held out for good: equal documents that follow are leaks."""
        self._guarded = set(self._exact or ())
        self._guarded_near = len(self._near_names)

    def judge(self, document: Cleaned, signature: Any) -> tuple[str | None, str | None]:
        """The rule that leaves a document out, and the one it is equal to where that is worth telling.

        One that stays is remembered.
        """
        name = _shown(document.document) if self._names is not None else ""
        if self._exact is not None:
            target, whole = _target(document.document), document.whole
            if whole in self._exact:
                leaked, same = whole in self._guarded, self._exact[whole] == target
                rule = LEAKED if leaked else EXACT if same else CONFLICT
                return rule, self._names[whole] if self._names is not None and rule != EXACT else None
            self._exact[whole] = target
            if self._names is not None:
                self._names[whole] = name
        if self._near is not None and signature is not None:
            found = self._near.find(signature)
            if found is not None:
                leaked = found < self._guarded_near
                return (LEAKED, self._near_names[found]) if leaked else (NEAR, None)
            self._near.add(signature)
            if self._names is not None:
                self._near_names.append(name)
        return None, None


def read_parts(
    folder: Path,
    config: DataConfig,
    sources: Sequence[Source],
    met: Met,
    pool: Pool,
    progress: Progress,
    *,
    chat: Chat | None,
    extras: bool,
) -> tuple[list[Part], list[Tally]]:
    """The clean documents of every source by split, in files under `folder`, and what happened to the others.

    Args:
        met: filled with the classes of the documents.
        chat: renders conversations; None: there are none.
        extras: documents have spans, or second texts.
    """
    known = [source.num_documents for source in sources]
    total = None if None in known else sum(filter(None, known))
    parts: list[Part] = []
    tallies = [Tally() for _ in sources]
    guards = guards_held_out(sources)
    register = Register(config.clean, names=any(source.is_labelled for source in sources) or guards)
    order = sorted(range(len(sources)), key=lambda index: not (guards and sources[index].config.use == "held_out"))
    for index in order:
        source, tally = sources[index], tallies[index]
        if guards and source.config.use != "held_out":
            register.guard()
            guards = False
        own = {split: Part(index, split, folder / split / f"{index:03d}", source.kind) for split in SPLITS}
        parts += own.values()
        wash = partial(clean, config=_rules(config.clean, source), classes=source.config.classes)
        with ExitStack() as stack:
            suffixes = ("text", "names", *(["extra"] if extras else []))
            files = {
                split: {s: stack.enter_context(part.stem.with_suffix(f".{s}").open("wb")) for s in suffixes}
                for split, part in own.items()
            }
            seen: set[str] = set()
            for documents, signatures in pool.map(wash, _chunks(source.documents(maker(source, chat)))):
                row = -1
                for document in documents:
                    tally.documents += 1
                    tally.characters += document.num_characters
                    tally.repaired.update(document.repairs)
                    rule, other = document.rule, None
                    row += rule is None
                    if document.document.label is not None:
                        seen.add(document.document.label)
                        met.number(document.document.label)
                    if rule is None:
                        rule, other = register.judge(document, None if signatures is None else signatures[row])
                    if rule is not None:
                        tally.remove(rule, document, other)
                        continue
                    # by the text alone: a document stays in its split when others come and go
                    hashed = "held_out" if document.digest < config.held_out * 2**128 else "train"
                    split = hashed if source.config.use == "both" else source.config.use
                    own[split].add(document, met, files[split])
                progress("cleaning", sum(each.documents for each in tallies), total)
            check_chosen(source, seen)
    return sorted(parts, key=lambda part: part.source), tallies


def guards_held_out(sources: Sequence[Source]) -> bool:
    """Whether texts that a source holds out are taken out of the training split: labels are learned, and sources are
    one or the other by `use`."""
    is_task = any(source.is_labelled or source.has_answers for source in sources)
    uses = {source.config.use for source in sources}
    return is_task and "held_out" in uses and len(uses) > 1


def _rules(config: CleanConfig, source: Source) -> CleanConfig:
    """Of texts that are asked about more than once, one that is nearly another says nothing."""
    repeats = source.kind == "question_answering" or source.config.pair is not None
    return config.model_copy(update={"near_duplicates": None}) if repeats else config
