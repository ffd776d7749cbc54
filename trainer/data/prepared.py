"""A folder of prepared data, opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.data import tokenize
from trainer.data.build import FORMAT, KEPT
from trainer.data.labelled import LabelledSamples
from trainer.data.samples import Boundaries, Samples, SourceTokens
from trainer.data.tokenize import Frame, Vocabulary
from trainer.errors import DataError
from trainer.records import Classes, IntArray

Split = Literal["train", "held_out"]


class Prepared:
    """Tokens on disk, and what is known about them."""

    def __init__(self, path: Path, manifest: dict[str, Any], weights: Sequence[float] | None):
        self.path = path
        self._manifest = manifest
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(manifest["sources"])
        """Passes over each source in an epoch."""
        known = manifest["vocabulary"]
        self._vocabulary = Vocabulary(known["size"], known["eos_id"], known["mask_id"], tuple(known["special_ids"]))
        self._frame: Frame | None = None
        if (frame := manifest.get("frame")) is not None:
            self._frame = Frame(tuple(frame["prefix"]), tuple(frame["suffix"]), frame["pad_id"])

    @classmethod
    def open(cls, path: Path, weights: Sequence[float] | None = None) -> Prepared:
        """Open a folder that `prepare` has written.

        Args:
            weights: passes over each source in an epoch; by default 1.

        Raises:
            DataError: there is none, or a file of it is missing or has another size.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no prepared data: {error}") from error
        if manifest.get("format") != FORMAT:
            raise DataError(f"{path} was prepared by another version of Trimtab: delete it, and it is prepared again")
        prepared = cls(path, manifest, weights)
        tables = [(path / KEPT, prepared.vocabulary * 8)] if "kept" in manifest else []
        for sizes in (tables, *map(prepared._expected_sizes, manifest["arrays"])):
            for file, size in sizes:
                if not file.is_file() or file.stat().st_size < size:
                    raise DataError(f"{file} is missing or damaged: delete {path}, and it is prepared again")
        return prepared

    def _expected_sizes(self, entry: dict[str, Any]) -> list[tuple[Path, int]]:
        stem = self._stem(entry)
        sizes = [
            (stem.with_suffix(".tokens"), entry["tokens"] * np.dtype(self._manifest["dtype"]).itemsize),
            (stem.with_suffix(".offsets.npy"), (entry["documents"] + 1) * 8),
            (stem.with_suffix(".names"), entry["documents"]),
        ]
        return sizes + ([(stem.with_suffix(".labels.npy"), entry["documents"] * 8)] if self._frame else [])

    def _stem(self, entry: dict[str, Any]) -> Path:
        return self.path / str(entry["split"]) / f"{entry['source']:03d}"

    @property
    def fingerprint(self) -> str:
        """Hash over all tokens, document boundaries and the tokenizer."""
        return str(self._manifest["fingerprint"])

    @property
    def manifest(self) -> dict[str, Any]:
        """All that is known: per source the files with their hashes, repairs, removals; per array the counts."""
        return self._manifest

    @property
    def tokenizer_path(self) -> Path:
        """Folder that `AutoTokenizer.from_pretrained` loads."""
        return self.path / "tokenizer"

    @property
    def vocabulary(self) -> int:
        """Largest token id + 1."""
        return self._vocabulary.size

    @property
    def kept(self) -> IntArray | None:
        """The id that each token has in the whole tokenizer, ascending, [vocabulary]; None: this is the whole one."""
        return np.load(self.path / KEPT) if "kept" in self._manifest else None

    @property
    def eos_id(self) -> int:
        return self._vocabulary.eos_id

    @property
    def mask_id(self) -> int | None:
        return self._vocabulary.mask_id

    @property
    def classes(self) -> Classes | None:
        """Of labelled documents; None where they have none."""
        return Classes(tuple(self._manifest["classes"]), self._frame.pad_id) if self._frame else None

    @property
    def unigram_entropy(self) -> float | None:
        """Nats per held-out token under the train split's unigrams (add-one smoothing); None without tokens
        and for labelled documents."""
        value = self._manifest["unigram_entropy"]
        return None if value is None else float(value)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per token of the held-out split; bits per byte = nats per token / ln 2 / this."""
        return self._per_token("bytes")

    @property
    def characters_per_token(self) -> float | None:
        """Characters per token of the held-out split."""
        return self._per_token("characters")

    def total(self, what: str, split: Split) -> int:
        """Sum of `documents`, `characters`, `bytes` or `tokens` over the sources of a split."""
        return sum(entry[what] for entry in self._manifest["arrays"] if entry["split"] == split)

    def _per_token(self, what: str) -> float | None:
        tokens = self.total("tokens", "held_out")
        return self.total(what, "held_out") / tokens if tokens else None

    @property
    def report(self) -> dict[str, Any]:
        """What was read, repaired, removed and kept, for printing and for the run's records."""
        sources = []
        numbers = ["documents", "characters", "bytes", "tokens", "unknown_tokens"]
        numbers += ["classes"] if self._frame else []
        for index, source in enumerate(self._manifest["sources"]):
            kept = {entry["split"]: entry for entry in self._manifest["arrays"] if entry["source"] == index}
            sources.append(
                {name: source[name] for name in ("name", "documents", "characters", "repaired", "removed")}
                | {split: {name: entry[name] for name in numbers} for split, entry in kept.items()}
            )
        result = {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary,
            "unigram_entropy": self.unigram_entropy,
            "sources": sources,
        }
        if "kept" in self._manifest:
            result["vocabulary_before"] = self._manifest["kept"]["of"]
        if self._frame:
            result |= {name: self._manifest[name] for name in ("classes", "class_entropy")}
            result["padding"] = tokenize.decoder(self.tokenizer_path).id_to_token(self._frame.pad_id)
        return result

    def report_at(self, sequence_length: int) -> dict[str, Any]:
        """`report`, and of labelled documents how many are longer than a sample: `cut` by split."""
        if not self._frame:
            return self.report
        cut = {}
        splits: tuple[Split, ...] = ("train", "held_out")
        for split in splits:
            samples = self.samples(split, sequence_length, "join") if self.total("documents", split) else None
            cut[split] = samples.num_cut if isinstance(samples, LabelledSamples) else 0
        return self.report | {"sequence_length": sequence_length, "cut": cut}

    def samples(self, split: Split, sequence_length: int, boundaries: Boundaries) -> Samples:
        """The samples of a split; of labelled documents :class:`LabelledSamples`.

        Raises:
            DataError: the split has none.
        """
        sources, labels = [], []
        for entry in self._manifest["arrays"]:
            if entry["split"] == split:
                stem = self._stem(entry)
                tokens = (
                    # a plain array over the mapping: a memmap object makes indexing several times slower
                    np.asarray(np.memmap(stem.with_suffix(".tokens"), self._manifest["dtype"], "r"))
                    if entry["tokens"]
                    else np.empty(0, dtype=self._manifest["dtype"])
                )
                offsets = np.asarray(np.load(stem.with_suffix(".offsets.npy"), mmap_mode="r"))
                name = self._manifest["sources"][entry["source"]]["name"]
                weight = self.weights[entry["source"]]
                sources.append(SourceTokens(name, weight, tokens, offsets, stem.with_suffix(".names")))
                if self._frame:
                    labels.append(np.asarray(np.load(stem.with_suffix(".labels.npy"), mmap_mode="r")))
        common: dict[str, Any] = {
            "sequence_length": sequence_length,
            "boundaries": boundaries,
            "eos_id": self.eos_id,
            "mask_id": self.mask_id,
            "ordinary_ids": self._vocabulary.ordinary_ids,
            "decode": lambda ids: tokenize.decoder(self.tokenizer_path).decode(ids, skip_special_tokens=False),
            "split": split,
        }
        if self._frame:
            return LabelledSamples(sources, labels, classes=self._manifest["classes"], frame=self._frame, **common)
        return Samples(sources, **common)
