"""Writes a folder of prepared data: documents → clean text → tokens and a manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.config.objective import EACH_ALONE, Kind
from trainer.config.schema import DataConfig
from trainer.data import encode, parts, tokenize
from trainer.data.classes import OUTSIDE, Met, are_labelled, class_entropy, labels_entropy, settle
from trainer.data.corpus import Source
from trainer.data.encode import Encoded, ExtraTask, Marks
from trainer.data.parts import SPLITS, Part, Progress, Tally
from trainer.data.pool import Pool
from trainer.data.tokenize import Choice, EncodeTask, Vocabulary
from trainer.data.trim import require_word_pieces, trim
from trainer.errors import DataError
from trainer.records import IntArray

FORMAT = 1
"""Raise it when the same input gives other files."""
KEPT = "kept.npy"
OFFSETS = ("second",)
"""Files of tokens beside those of the texts, each with its offsets."""

_BYTES_WORTH_A_WORKER = 4_000_000
_WITH_CLASSES = {"classification", "multi_label", "token_classification"}


def task_of(sources: Sequence[Source], kind: Kind | None) -> Kind | None:
    """What the texts of the sources are for, where they are not packed as plain text: `causal` where it has answers.

    Raises:
        DataError: some sources have labels, or answers, and others do not.
    """
    if kind is None:
        kind = "classification" if are_labelled(sources) else "causal"
    if kind == "classification":
        if not are_labelled(sources):
            raise DataError("no source has a `label`, which objective.kind classification needs")
        return kind
    if kind == "causal":
        return kind if any(source.has_answers for source in sources) else None
    pairs = {source.config.pair is not None for source in sources}
    if len(pairs) > 1:
        raise DataError("some sources have a `pair` and others none: give all of them one, or none")
    return kind if kind in EACH_ALONE else None


def build(
    folder: Path,
    config: DataConfig,
    sources: Sequence[Source],
    choice: Choice,
    files: Sequence[Sequence[tuple[str, str]]],
    key: str,
    progress: Progress,
    task: Kind | None = None,
) -> None:
    """Fill the empty `folder`; the manifest is written last.

    Args:
        files: (name, hash) of the files of each source.
        task: as of :func:`task_of`.

    Raises:
        DataError: a document cannot be read, none is left, or the classes of the documents cannot be learned.
        ConfigError: `data.tokenizer.keep` does not fit the tokenizer.
    """
    labelled = task in EACH_ALONE
    pair = task == "question_answering" or (task != "seq2seq" and any(source.config.pair for source in sources))
    extras = pair or task in {"token_classification", "seq2seq", "causal"}
    with_classes = task in _WITH_CLASSES
    chat = tokenize.chat(choice) if task == "causal" else None
    for split in SPLITS:
        (folder / split).mkdir()
    workers = config.workers or len(os.sched_getaffinity(0))
    worthwhile = sum(source.num_bytes for source in sources) // _BYTES_WORTH_A_WORKER
    with Pool(max(1, min(workers, worthwhile))) as pool:
        known: dict[str, Any] = {}
        whole = folder / "whole" if config.tokenizer.keep == "used" else None
        if whole is not None:
            vocabulary = tokenize.save(choice, whole, iter(()), 0, labelled=labelled, pair=pair)
            require_word_pieces(whole)
        met = Met()
        found, tallies = parts.read_parts(folder, config, sources, met, pool, progress, chat=chat, extras=extras)
        _refuse_empty(found, tallies)
        least = 1 if task == "multi_label" else 2
        by_class = _by_class(found, len(met.names)) if with_classes else None
        classes, numbers = settle(met.names, *by_class, least=least) if by_class else ((), None)
        training = [part for part in found if part.split == "train"]
        progress("tokenizer", 0, None)
        if whole is None:
            vocabulary = tokenize.save(
                choice,
                folder / "tokenizer",
                (text for part in training for text in part.texts()),
                sum(part.characters for part in training),
                labelled=labelled,
                pair=pair,
            )
        else:
            counts = _count(training, whole, vocabulary, task, pool)
            kept = trim(whole, folder / "tokenizer", counts, vocabulary.special_ids)
            np.save(folder / KEPT, kept)
            shutil.rmtree(whole)
            known["kept"] = {"of": vocabulary.size, "digest": xxhash.xxh3_128_hexdigest(kept.tobytes())}
            vocabulary = tokenize.saved_vocabulary(choice, folder / "tokenizer", labelled=labelled, pair=pair)
        arrays, occurrences = _tokenise(folder, found, vocabulary, task, met, numbers, pool, progress)
    backend = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    content = [FORMAT, vocabulary.eos_id, xxhash.xxh3_128_hexdigest(backend)]
    content += [[entry["source"], entry["split"], entry["digest"]] for entry in arrays]
    if vocabulary.frame is not None:
        known |= {"classes": classes, "frame": asdict(vocabulary.frame)}
    if vocabulary.pair is not None:
        known["pair"] = asdict(vocabulary.pair)
    if task not in {None, "classification"}:
        known["kind"] = task
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
    if labelled:
        manifest["class_entropy"] = None
    if by_class is not None and numbers is not None:
        train, held_out = (_renumbered(counts, numbers) for counts in by_class)
        if task == "multi_label":
            documents = [sum(len(p.lengths) for p in found if p.split == split) for split in SPLITS]
            manifest["class_entropy"] = labels_entropy(train, held_out, *documents)
        elif task == "classification":
            manifest["class_entropy"] = class_entropy(train, held_out)
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


def _by_class(found: Sequence[Part], num_classes: int) -> tuple[IntArray, IntArray]:
    """Documents of each class as it was met, of the train and of the held-out split, each [num_classes]."""
    totals = {split: np.zeros(num_classes, dtype=np.int64) for split in SPLITS}
    for part in found:
        totals[part.split] += part.count(num_classes)
    return totals["train"], totals["held_out"]


def _renumbered(counts: IntArray, numbers: IntArray) -> IntArray:
    """Documents of each class in its final place, from those of each class as it was met."""
    stays = numbers >= 0
    result = np.zeros(int(stays.sum()), dtype=np.int64)
    result[numbers[stays]] = counts[stays]
    return result


def _refuse_empty(found: Sequence[Part], tallies: Sequence[Tally]) -> None:
    if any(part.lengths for part in found):
        return
    removed: Counter[str] = Counter()
    for tally in tallies:
        removed.update({rule: entry["documents"] for rule, entry in tally.removed.items()})
    reasons = ", ".join(f"{count} {rule}" for rule, count in removed.most_common()) or "the sources hold none"
    read = sum(tally.documents for tally in tallies)
    raise DataError(f"no text is left of {read} documents ({reasons}): add sources, or loosen data.clean")


def _tokenise(
    folder: Path,
    found: Sequence[Part],
    vocabulary: Vocabulary,
    task: Kind | None,
    met: Met,
    numbers: IntArray | None,
    pool: Pool,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, IntArray]]:
    """Token, offset and label files; returns the manifest's entry of each part, and each split's count of every token.

    Args:
        numbers: the number of each class as it was met, [met]; None where there are no classes.
    """
    counts = {split: np.zeros(vocabulary.size, dtype=np.int64) for split in SPLITS}
    total, done = sum(len(part.lengths) for part in found), 0
    arrays = []
    for part in found:
        digest, lengths = xxhash.xxh3_128(), [np.zeros(1, dtype=np.int64)]
        unknown = 0
        more: dict[str, list[Any]] = {}
        with part.stem.with_suffix(".tokens").open("wb") as file:
            for encoded in _encoded(part, folder / "tokenizer" / "tokenizer.json", vocabulary, task, met, pool):
                file.write(encoded.tokens.data)
                digest.update(encoded.tokens.data)
                occurrences = np.bincount(encoded.tokens, minlength=vocabulary.size)
                counts[part.split] += occurrences
                unknown += int(occurrences[vocabulary.unknown_id]) if vocabulary.unknown_id is not None else 0
                lengths.append(encoded.lengths)
                for name, array in encoded.arrays.items():
                    more.setdefault(name, []).append(array)
                done += len(encoded.lengths)
                progress("tokenising", done, total)
        offsets = np.cumsum(np.concatenate(lengths))
        digest.update(offsets.data)
        np.save(part.stem.with_suffix(".offsets.npy"), offsets)
        entry = {
            "source": part.source,
            "split": part.split,
            "documents": len(part.lengths),
            "characters": part.characters,
            "bytes": part.bytes,
            "tokens": int(offsets[-1]),
            "unknown_tokens": unknown,
        }
        files = {name: np.concatenate(pieces) for name, pieces in more.items()}
        if task == "token_classification" and numbers is not None and "marks" in files:
            marks = files["marks"]
            files["marks"] = np.where(marks >= 0, numbers[np.maximum(marks, 0)], marks).astype(np.int32)
        if task == "question_answering":
            _keep_text(part, entry)
        else:
            part.text.unlink()
        part.extra.unlink(missing_ok=True)
        files |= _labels(part, task, numbers)
        if numbers is not None:
            entry["classes"] = _renumbered(part.count(len(numbers)), numbers).tolist()
        if "second_lengths" in files:
            lengths = [np.zeros(1, dtype=np.int64), files.pop("second_lengths")]
            files["second_offsets"] = np.cumsum(np.concatenate(lengths))
        for name, array in sorted(files.items()):
            digest.update(np.ascontiguousarray(array).data)
            np.save(part.stem.with_suffix(f".{name}.npy"), array)
        if task not in {None, "classification"} or len(files) > 1:
            entry["files"] = {name: array.nbytes for name, array in sorted(files.items())}
        arrays.append({**entry, "digest": digest.hexdigest()})
    return arrays, counts


def _labels(part: Part, task: Kind | None, numbers: IntArray | None) -> dict[str, Any]:
    """What is to be predicted of each document, by the name of its file."""
    if task == "regression":
        return {"labels": np.frombuffer(part.numbers, dtype=np.float32)}
    if numbers is None or task == "token_classification":
        return {}
    labels = numbers[np.frombuffer(part.labels, dtype=np.int64)]
    if task == "classification":
        return {"labels": labels}
    table = np.zeros((len(part.lengths), int(numbers.max()) + 1), dtype=np.uint8)
    table[np.repeat(np.arange(len(table)), np.frombuffer(part.label_counts, dtype=np.int64)), labels] = 1
    return {"labels": table}


def _keep_text(part: Part, entry: dict[str, Any]) -> None:
    """Answers are passages of the text as it is written, which the tokens may not give back."""
    starts = part.starts()
    np.save(part.stem.with_suffix(".text_offsets.npy"), starts)
    part.text.rename(part.stem.with_suffix(".texts"))
    given = part.stem.with_suffix(".answers")
    with part.extra.open("rb") as file, given.open("w", encoding="utf-8") as answers:
        for length in part.extra_lengths:
            spans = [span[:2] for span in json.loads(file.read(length))["spans"]]
            answers.write(json.dumps(spans) + "\n")
    entry["answers"] = given.stat().st_size


def _encoded(
    part: Part, tokenizer: Path, vocabulary: Vocabulary, task: Kind | None, met: Met, pool: Pool
) -> Iterator[Encoded]:
    """The documents of a part as tokens, some at a time."""
    if part.extra_starts() is None:
        tasks = _tasks(part, tokenizer, vocabulary)
        yield from (Encoded(tokens, lengths, {}) for tokens, lengths in pool.map(tokenize.encode, tasks))
    else:
        yield from pool.map(encode.encode, _extra_tasks(part, tokenizer, vocabulary, task, met))


def _count(found: Sequence[Part], tokenizer: Path, vocabulary: Vocabulary, task: Kind | None, pool: Pool) -> IntArray:
    """How often each token occurs, [vocabulary]."""
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for part in found:
        for encoded in _encoded(part, tokenizer / "tokenizer.json", vocabulary, task, Met(), pool):
            for tokens in (encoded.tokens, encoded.arrays.get("second")):
                if tokens is not None:
                    counts += np.bincount(tokens, minlength=vocabulary.size)
    return counts


def _ranges(part: Part) -> Iterator[tuple[int, int]]:
    """Documents of each task for a worker: the first, and the one after the last."""
    starts = part.starts()
    begin = 0
    while begin < len(part.lengths):
        end = int(np.searchsorted(starts, starts[begin] + parts.CHUNK_CHARACTERS))
        end = min(max(end, begin + 1), begin + parts.CHUNK_DOCUMENTS, len(part.lengths))
        yield begin, end
        begin = end


def _tasks(part: Part, tokenizer: Path, vocabulary: Vocabulary) -> Iterator[EncodeTask]:
    starts = part.starts()
    for begin, end in _ranges(part):
        yield EncodeTask(tokenizer, part.text, starts[begin : end + 1], vocabulary, end=vocabulary.frame is None)


_MARKS: dict[Kind | None, Marks] = {
    "causal": "answers",
    "token_classification": "words",
    "question_answering": "question",
}


def _extra_tasks(
    part: Part, tokenizer: Path, vocabulary: Vocabulary, task: Kind | None, met: Met
) -> Iterator[ExtraTask]:
    starts, extra_starts = part.starts(), part.extra_starts()
    assert extra_starts is not None
    outside = met.names.index(OUTSIDE) if OUTSIDE in met.names else 0
    for begin, end in _ranges(part):
        places, extra_places = starts[begin : end + 1], extra_starts[begin : end + 1]
        marks = _MARKS.get(task, "none")
        yield ExtraTask(tokenizer, part.text, places, part.extra, extra_places, vocabulary, marks, outside)


def unigram_entropy(train: IntArray, held_out: IntArray) -> float | None:
    """Nats per held-out token under the train split's unigrams with add-one smoothing; None without tokens."""
    if not held_out.sum():
        return None
    log_probabilities = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(held_out * log_probabilities).sum() / held_out.sum())
