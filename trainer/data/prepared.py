"""A folder of prepared data, opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.config.objective import Kind
from trainer.data import tokenize
from trainer.data.answers import AnswerSamples
from trainer.data.build import FORMAT, KEPT
from trainer.data.labelled import LabelledSamples, Labels
from trainer.data.questions import QuestionSamples, Written
from trainer.data.samples import Boundaries, Samples, SourceTokens
from trainer.data.sequences import SequenceSamples
from trainer.data.tagged import TaggedSamples
from trainer.data.tokenize import Frame, PairFrame, Vocabulary
from trainer.data.windows import Reading
from trainer.errors import DataError
from trainer.records import Classes, IntArray

Split = Literal["train", "held_out"]


class Prepared:
    """Tokens on disk, and what is known about them."""

    def __init__(
        self, path: Path, manifest: dict[str, Any], weights: Sequence[float] | None, reading: Reading | None = None
    ):
        self.path = path
        self.reading = reading or Reading()
        """How labelled texts become samples."""
        self._manifest = manifest
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(manifest["sources"])
        """Passes over each source in an epoch."""
        known = manifest["vocabulary"]
        self._vocabulary = Vocabulary(known["size"], known["eos_id"], known["mask_id"], tuple(known["special_ids"]))
        self._frame: Frame | None = None
        if (frame := manifest.get("frame")) is not None:
            self._frame = Frame(tuple(frame["prefix"]), tuple(frame["suffix"]), frame["pad_id"])
        self._pair: PairFrame | None = None
        if (pair := manifest.get("pair")) is not None:
            types = tuple(pair["types"]) if pair["types"] is not None else None
            self._pair = PairFrame(tuple(pair["prefix"]), tuple(pair["middle"]), tuple(pair["suffix"]), types)
        self.kind: Kind | None = manifest.get("kind", "classification" if self._frame else None)
        """What the texts are for; `causal` where only answers are learned, None: packed, all of it is predicted."""

    @classmethod
    def open(cls, path: Path, weights: Sequence[float] | None = None, reading: Reading | None = None) -> Prepared:
        """Open a folder that `prepare` has written.

        Args:
            weights: passes over each source in an epoch; by default 1.
            reading: how labelled texts become samples; by default one each, cut where it is too long.

        Raises:
            DataError: there is none, or a file of it is missing or has another size.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no prepared data: {error}") from error
        if manifest.get("format") != FORMAT:
            raise DataError(f"{path} was prepared by another version of Trimtab: delete it, and it is prepared again")
        prepared = cls(path, manifest, weights, reading)
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
        if self.kind == "classification" and "files" not in entry:
            sizes.append((stem.with_suffix(".labels.npy"), entry["documents"] * 8))
        sizes += [(stem.with_suffix(f".{name}.npy"), size) for name, size in entry.get("files", {}).items()]
        if "answers" in entry:
            sizes += [(stem.with_suffix(".texts"), entry["bytes"]), (stem.with_suffix(".answers"), entry["answers"])]
        return sizes

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
        """Of labelled documents, without names where there are none to tell apart; None: packed, or seq2seq."""
        if self._frame is None or self.kind == "seq2seq":
            return None
        names = tuple(self._manifest["classes"])
        return Classes(names, self._frame.pad_id, self._rates() if self.kind == "multi_label" else ())

    def _rates(self) -> tuple[float, ...]:
        counts = [entry["classes"] for entry in self._manifest["arrays"] if entry["split"] == "train"]
        texts = self.total("documents", "train")
        return tuple((sum(of_class) + 1) / (texts + 2) for of_class in zip(*counts, strict=True))

    @property
    def pad_id(self) -> int | None:
        """What fills up texts that are samples of their own; None: they are packed."""
        return self._frame.pad_id if self._frame else None

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
        numbers += ["classes"] if self._manifest.get("classes") else []
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
            if self.kind != "classification":
                result["kind"] = self.kind
            result |= {name: self._manifest[name] for name in ("classes", "class_entropy")}
            result["padding"] = tokenize.decoder(self.tokenizer_path).id_to_token(self._frame.pad_id)
        return result

    def report_at(self, sequence_length: int) -> dict[str, Any]:
        """`report`, and of labelled documents how many are longer than a sample (`cut`), how many samples there are
        (`samples`), and of questions how many have an answer that no sample holds (`unreached`), each by split."""
        if not self._frame:
            return self.report
        cut, numbers, unreached = {}, {}, {}
        splits: tuple[Split, ...] = ("train", "held_out")
        for split in splits:
            samples = self.samples(split, sequence_length, "join") if self.total("documents", split) else None
            cut[split] = samples.num_cut if isinstance(samples, LabelledSamples) else 0
            numbers[split] = len(samples) if samples else 0
            if isinstance(samples, QuestionSamples):
                unreached[split] = samples.num_unreached
        found = {"sequence_length": sequence_length, "cut": cut, "samples": numbers}
        found |= {"too_long": self.reading.too_long}
        return self.report | found | ({"unreached": unreached} if unreached else {})

    def samples(
        self, split: Split, sequence_length: int, boundaries: Boundaries, *, decoder_start: int | None = None
    ) -> Samples:
        """The samples of a split; of labelled documents :class:`LabelledSamples`.

        Args:
            decoder_start: of seq2seq, the token that the model's decoder begins with; None: padding, as T5.

        Raises:
            DataError: the split has none, or they cannot be read as the config asks.
        """
        entries = [entry for entry in self._manifest["arrays"] if entry["split"] == split]
        sources = [self._source(entry) for entry in entries]
        common: dict[str, Any] = {
            "sequence_length": sequence_length,
            "boundaries": boundaries,
            "eos_id": self.eos_id,
            "mask_id": self.mask_id,
            "ordinary_ids": self._vocabulary.ordinary_ids,
            "decode": lambda ids: tokenize.decoder(self.tokenizer_path).decode(ids, skip_special_tokens=False),
            "split": split,
        }
        if self.kind is None:
            return Samples(sources, **common)
        labels = [self._labels(entry) for entry in entries]
        if self._frame is None:
            empty = np.empty(0, dtype=np.uint8)
            return AnswerSamples(sources, [empty if own.marks is None else own.marks for own in labels], **common)
        common |= {"kind": self.kind, "classes": self._manifest["classes"], "frame": self._frame, "pair": self._pair}
        common["reading"] = self.reading
        match self.kind:
            case "token_classification":
                return TaggedSamples(sources, labels, **common)
            case "question_answering":
                return QuestionSamples(sources, labels, written=[self._written(entry) for entry in entries], **common)
            case "seq2seq":
                return SequenceSamples(sources, labels, decoder_start=decoder_start, **common)
            case _:
                return LabelledSamples(sources, labels, **common)

    def _source(self, entry: dict[str, Any]) -> SourceTokens:
        stem = self._stem(entry)
        tokens = (
            # a plain array over the mapping: a memmap object makes indexing several times slower
            np.asarray(np.memmap(stem.with_suffix(".tokens"), self._manifest["dtype"], "r"))
            if entry["tokens"]
            else np.empty(0, dtype=self._manifest["dtype"])
        )
        name = self._manifest["sources"][entry["source"]]["name"]
        weight = self.weights[entry["source"]]
        return SourceTokens(name, weight, tokens, _mapped(stem, "offsets"), stem.with_suffix(".names"))

    def _labels(self, entry: dict[str, Any]) -> Labels:
        stem, files = self._stem(entry), entry.get("files", ("labels",))
        return Labels(**{name: _mapped(stem, name) for name in files})

    def _written(self, entry: dict[str, Any]) -> Written:
        stem = self._stem(entry)
        return Written(stem.with_suffix(".texts"), _mapped(stem, "text_offsets"), stem.with_suffix(".answers"))


def _mapped(stem: Path, name: str) -> Any:
    return np.asarray(np.load(stem.with_suffix(f".{name}.npy"), mmap_mode="r"))
