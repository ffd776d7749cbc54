"""Writes a folder of prepared data: documents → clean text → tokens and a manifest."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.config.schema import DataConfig
from trainer.data import tokenize
from trainer.data.classes import Met, are_labelled, check_chosen, class_entropy, settle
from trainer.data.clean import CONFLICT, EXACT, NEAR, Cleaned, clean
from trainer.data.corpus import Document, Source
from trainer.data.duplicates import NearDuplicates
from trainer.data.pool import Pool
from trainer.data.tokenize import Choice, EncodeTask, Vocabulary
from trainer.data.trim import require_word_pieces, trim
from trainer.errors import DataError
from trainer.records import IntArray

FORMAT = 1
"""Raise it when the same input gives other files."""
SPLITS = ("train", "held_out")
KEPT = "kept.npy"
Progress = Callable[[str, int, int | None], None]
"""(stage, documents done, documents in all where that is known)"""

_CHUNK_CHARACTERS = 1_000_000
_CHUNK_DOCUMENTS = 4096
_BYTES_WORTH_A_WORKER = 4_000_000
_EXAMPLES = 3


@dataclass
class Tally:
    """What happened to the documents of one source."""

    documents: int = 0
    characters: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    removed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def remove(self, rule: str, document: Cleaned) -> None:
        entry = self.removed.setdefault(rule, {"documents": 0, "characters": 0, "examples": []})
        entry["documents"] += 1
        entry["characters"] += document.num_characters
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(document.name)


@dataclass
class Part:
    """The clean documents of one source in one split."""

    source: int
    split: str
    stem: Path
    characters: int = 0
    bytes: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """UTF-8 bytes of each document."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """Of each document: the number of its class in the order in which classes were met; −1: none."""

    @property
    def text(self) -> Path:
        """All documents, one after the other; gone when the build is done."""
        return self.stem.with_suffix(".text")

    def count(self, num_classes: int) -> IntArray:
        """Documents of each class as it was met, [num_classes]."""
        return np.bincount(np.frombuffer(self.labels, dtype=np.int64), minlength=num_classes)

    def starts(self) -> IntArray:
        return np.cumsum(np.concatenate([[0], np.frombuffer(self.lengths, dtype=np.int64)]), dtype=np.int64)

    def texts(self) -> Iterator[str]:
        with self.text.open("rb") as file:
            for length in self.lengths:
                yield file.read(length).decode()


def build(
    folder: Path,
    config: DataConfig,
    sources: Sequence[Source],
    choice: Choice,
    files: Sequence[Sequence[tuple[str, str]]],
    key: str,
    progress: Progress,
) -> None:
    """Fill the empty `folder`; the manifest is written last.

    Args:
        files: (name, hash) of the files of each source.

    Raises:
        DataError: a document cannot be read, none is left, or the classes of the documents cannot be learned.
        ConfigError: `data.tokenizer.keep` does not fit the tokenizer.
    """
    labelled = are_labelled(sources)
    for split in SPLITS:
        (folder / split).mkdir()
    workers = config.workers or len(os.sched_getaffinity(0))
    worthwhile = sum(source.num_bytes for source in sources) // _BYTES_WORTH_A_WORKER
    with Pool(max(1, min(workers, worthwhile))) as pool:
        known: dict[str, Any] = {}
        whole = folder / "whole" if config.tokenizer.keep == "used" else None
        if whole is not None:
            vocabulary = tokenize.save(choice, whole, iter(()), 0, labelled=labelled)
            require_word_pieces(whole)
        met = Met()
        parts, tallies = _clean(folder, config, sources, met, pool, progress)
        _refuse_empty(parts, tallies)
        classes, numbers = settle(met.names, *_by_class(parts, len(met.names))) if labelled else ((), None)
        training = [part for part in parts if part.split == "train"]
        progress("tokenizer", 0, None)
        if whole is None:
            vocabulary = tokenize.save(
                choice,
                folder / "tokenizer",
                (text for part in training for text in part.texts()),
                sum(part.characters for part in training),
                labelled=labelled,
            )
        else:
            counts = _count(training, whole, vocabulary, pool)
            kept = trim(whole, folder / "tokenizer", counts, vocabulary.special_ids)
            np.save(folder / KEPT, kept)
            shutil.rmtree(whole)
            known["kept"] = {"of": vocabulary.size, "digest": xxhash.xxh3_128_hexdigest(kept.tobytes())}
            vocabulary = tokenize.saved_vocabulary(choice, folder / "tokenizer", labelled=labelled)
        arrays, occurrences = _tokenise(folder, parts, vocabulary, numbers, pool, progress)
    backend = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    content = [FORMAT, vocabulary.eos_id, xxhash.xxh3_128_hexdigest(backend)]
    content += [[entry["source"], entry["split"], entry["digest"]] for entry in arrays]
    if vocabulary.frame is not None:
        known |= {"classes": classes, "frame": asdict(vocabulary.frame)}
    if known:
        content.append(known)
    manifest = {
        "format": FORMAT,
        "key": key,
        "fingerprint": xxhash.xxh3_128_hexdigest(json.dumps(content).encode()),
        "sources": [
            {
                "name": source.name,
                "documents": tally.documents,
                "characters": tally.characters,
                "repaired": dict(tally.repaired),
                "removed": tally.removed,
                "files": [list(pair) for pair in own_files],
            }
            for source, tally, own_files in zip(sources, tallies, files, strict=True)
        ],
        "clean": config.clean.model_dump(),
        "held_out": config.held_out,
        "tokenizer": choice.identity,
        "vocabulary": {
            "size": vocabulary.size,
            "eos_id": vocabulary.eos_id,
            "mask_id": vocabulary.mask_id,
            "special_ids": list(vocabulary.special_ids),
        },
        "dtype": vocabulary.dtype.name,
        "arrays": arrays,
        "unigram_entropy": None if labelled else unigram_entropy(occurrences["train"], occurrences["held_out"]),
        **known,
    }
    if numbers is not None:
        manifest["class_entropy"] = class_entropy(*(_renumbered(n, numbers) for n in _by_class(parts, len(numbers))))
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _clean(
    folder: Path, config: DataConfig, sources: Sequence[Source], met: Met, pool: Pool, progress: Progress
) -> tuple[list[Part], list[Tally]]:
    known = [source.num_documents for source in sources]
    total = None if None in known else sum(filter(None, known))
    parts: list[Part] = []
    tallies: list[Tally] = []
    exact: dict[int, int] = {}
    """Digest of a text → number of its class."""
    near = NearDuplicates(config.clean.near_duplicates) if config.clean.near_duplicates is not None else None
    for index, source in enumerate(sources):
        tally = Tally()
        tallies.append(tally)
        own = {split: Part(index, split, folder / split / f"{index:03d}") for split in SPLITS}
        parts += own.values()
        with ExitStack() as stack:
            texts = {split: stack.enter_context(part.text.open("wb")) for split, part in own.items()}
            names = {
                split: stack.enter_context(part.stem.with_suffix(".names").open("wb")) for split, part in own.items()
            }
            wash = partial(clean, config=config.clean, classes=source.config.classes)
            seen: set[str] = set()
            for documents, signatures in pool.map(wash, _chunks(source.documents())):
                row = -1
                for document in documents:
                    tally.documents += 1
                    tally.characters += document.num_characters
                    tally.repaired.update(document.repairs)
                    rule = document.rule
                    row += rule is None
                    if document.label is not None:
                        seen.add(document.label)
                    number = met.number(document.label)
                    if rule is None and config.clean.exact_duplicates:
                        if document.digest in exact:
                            rule = EXACT if exact[document.digest] == number else CONFLICT
                        else:
                            exact[document.digest] = number
                    if rule is None and near is not None and signatures is not None:
                        if near.find(signatures[row]) is None:
                            near.add(signatures[row])
                        else:
                            rule = NEAR
                    if rule is not None:
                        tally.remove(rule, document)
                        continue
                    # by the text alone: a document stays in its split when others come and go
                    hashed = "held_out" if document.digest < config.held_out * 2**128 else "train"
                    part = own[hashed if source.config.use == "both" else source.config.use]
                    split = part.split
                    texts[split].write(document.text)
                    name = document.name.replace("\n", " ").replace("\r", " ")
                    names[split].write(name.encode("utf-8", "backslashreplace") + b"\n")
                    part.lengths.append(len(document.text))
                    part.labels.append(number)
                    part.characters += document.num_characters
                    part.bytes += len(document.text)
                progress("cleaning", sum(each.documents for each in tallies), total)
            check_chosen(source, seen)
    return parts, tallies


def _by_class(parts: Sequence[Part], num_classes: int) -> tuple[IntArray, IntArray]:
    """Documents of each class as it was met, of the train and of the held-out split, each [num_classes]."""
    totals = {split: np.zeros(num_classes, dtype=np.int64) for split in SPLITS}
    for part in parts:
        totals[part.split] += part.count(num_classes)
    return totals["train"], totals["held_out"]


def _renumbered(counts: IntArray, numbers: IntArray) -> IntArray:
    """Documents of each class in its final place, from those of each class as it was met."""
    stays = numbers >= 0
    result = np.zeros(int(stays.sum()), dtype=np.int64)
    result[numbers[stays]] = counts[stays]
    return result


def _refuse_empty(parts: Sequence[Part], tallies: Sequence[Tally]) -> None:
    if any(part.lengths for part in parts):
        return
    removed: Counter[str] = Counter()
    for tally in tallies:
        removed.update({rule: entry["documents"] for rule, entry in tally.removed.items()})
    reasons = ", ".join(f"{count} {rule}" for rule, count in removed.most_common()) or "the sources hold none"
    read = sum(tally.documents for tally in tallies)
    raise DataError(f"no text is left of {read} documents ({reasons}): add sources, or loosen data.clean")


def _tokenise(
    folder: Path,
    parts: Sequence[Part],
    vocabulary: Vocabulary,
    numbers: IntArray | None,
    pool: Pool,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, IntArray]]:
    """Token, offset and label files; returns the manifest's entry of each part, and each split's count of every token.

    Args:
        numbers: the number of each class as it was met, [met]; None where there are no classes.
    """
    counts = {split: np.zeros(vocabulary.size, dtype=np.int64) for split in SPLITS}
    total, done = sum(len(part.lengths) for part in parts), 0
    arrays = []
    for part in parts:
        digest, lengths = xxhash.xxh3_128(), [np.zeros(1, dtype=np.int64)]
        unknown = 0
        tasks = _tasks(part, folder / "tokenizer" / "tokenizer.json", vocabulary)
        with part.stem.with_suffix(".tokens").open("wb") as file:
            for tokens, own_lengths in pool.map(tokenize.encode, tasks):
                file.write(tokens.data)
                digest.update(tokens.data)
                occurrences = np.bincount(tokens, minlength=vocabulary.size)
                counts[part.split] += occurrences
                unknown += int(occurrences[vocabulary.unknown_id]) if vocabulary.unknown_id is not None else 0
                lengths.append(own_lengths)
                done += len(own_lengths)
                progress("tokenising", done, total)
        offsets = np.cumsum(np.concatenate(lengths))
        digest.update(offsets.data)
        np.save(part.stem.with_suffix(".offsets.npy"), offsets)
        part.text.unlink()
        entry = {
            "source": part.source,
            "split": part.split,
            "documents": len(part.lengths),
            "characters": part.characters,
            "bytes": part.bytes,
            "tokens": int(offsets[-1]),
            "unknown_tokens": unknown,
        }
        if numbers is not None:
            labels = numbers[np.frombuffer(part.labels, dtype=np.int64)]
            np.save(part.stem.with_suffix(".labels.npy"), labels)
            digest.update(labels.data)
            entry["classes"] = _renumbered(part.count(len(numbers)), numbers).tolist()
        arrays.append({**entry, "digest": digest.hexdigest()})
    return arrays, counts


def _count(parts: Sequence[Part], tokenizer: Path, vocabulary: Vocabulary, pool: Pool) -> IntArray:
    """How often each token occurs, [vocabulary]."""
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for part in parts:
        for tokens, _ in pool.map(tokenize.encode, _tasks(part, tokenizer / "tokenizer.json", vocabulary)):
            counts += np.bincount(tokens, minlength=vocabulary.size)
    return counts


def _tasks(part: Part, tokenizer: Path, vocabulary: Vocabulary) -> Iterator[EncodeTask]:
    starts = part.starts()
    begin = 0
    while begin < len(part.lengths):
        end = int(np.searchsorted(starts, starts[begin] + _CHUNK_CHARACTERS))
        end = min(max(end, begin + 1), begin + _CHUNK_DOCUMENTS, len(part.lengths))
        yield EncodeTask(tokenizer, part.text, starts[begin : end + 1], vocabulary, end=vocabulary.frame is None)
        begin = end


def unigram_entropy(train: IntArray, held_out: IntArray) -> float | None:
    """Nats per held-out token under the train split's unigrams with add-one smoothing; None without tokens."""
    if not held_out.sum():
        return None
    log_probabilities = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(held_out * log_probabilities).sum() / held_out.sum())
