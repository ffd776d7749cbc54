"""Several tasks at once: the data of each prepared as it is by itself, and read together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.config.objective import NUMBER, Outputs, TaskConfig, output_name, outputs_of
from trainer.config.schema import DataConfig
from trainer.data.labelled import LabelledSamples, Place
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared, Split
from trainer.data.samples import Boundaries, Samples
from trainer.data.windows import Reading
from trainer.errors import DataError
from trainer.records import Classes, IntArray


class SeveralSamples(LabelledSamples):
    """The texts of several tasks, numbered through the tasks in their order.

    Args:
        tasks: outputs and samples of each; not of each of them need there be samples.
        names: of all outputs.
        temperature: a task fills a part of an epoch in proportion to (its samples)^(1/temperature), as in mT5
            (Xue et al. 2021, https://arxiv.org/abs/2010.11934, with α = 1/temperature); the epoch stays as long.
    """

    def __init__(
        self, tasks: Sequence[tuple[Outputs, LabelledSamples]], *, names: Sequence[str], temperature: float = 1.0
    ):
        self._tasks = tuple(tasks)
        first = self._tasks[0][1]
        self.kind = "several"
        self.classes = tuple(names)
        self.reading = first.reading
        self.sequence_length, self.boundaries = first.sequence_length, first.boundaries
        self.eos_id, self.mask_id, self.ordinary_ids = first.eos_id, first.mask_id, first.ordinary_ids
        parts = [samples for _, samples in self._tasks]
        self.sources = tuple(source for samples in parts for source in samples.sources)
        self.sizes = tuple(size for samples in parts for size in samples.sizes)
        self._weights = _weights(parts, temperature)
        self._has_types = any(samples._types is not None for samples in parts)
        self._sizes_of = np.array([len(samples) for samples in parts])
        self._sources_before = np.cumsum([0, *(len(samples.sources) for samples in parts)])

    def _parts(self, ids: IntArray) -> Iterator[tuple[int, IntArray, IntArray]]:
        """(index of a task, rows of `ids` that are its samples, number of each within the task)."""
        ends = np.cumsum(self._sizes_of)
        which = np.searchsorted(ends, ids, side="right")
        for index in np.unique(which).tolist():
            rows = np.flatnonzero(which == index)
            yield index, rows, ids[rows] - (ends[index] - self._sizes_of[index])

    def document_of(self, ids: IntArray) -> IntArray:
        counts = [sum(len(source.offsets) - 1 for source in samples.sources) for _, samples in self._tasks]
        before = np.cumsum([0, *counts])
        result = np.empty(len(ids), dtype=np.int64)
        for index, rows, local in self._parts(ids):
            result[rows] = before[index] + self._tasks[index][1].document_of(local)
        return result

    @property
    def num_cut(self) -> int:
        return sum(samples.num_cut for _, samples in self._tasks)

    def places(self, ids: IntArray) -> list[Place]:
        result: list[Any] = [None] * len(ids)
        for index, rows, local in self._parts(ids):
            before = int(self._sources_before[index])
            for row, place in zip(rows.tolist(), self._tasks[index][1].places(local), strict=True):
                result[row] = place._replace(source=place.source + before)
        return result

    def fetch(self, ids: IntArray) -> dict[str, NDArray[Any]]:
        """As of one task; `labels` float32 [n, outputs]: in the columns of a text's own task 0 and 1, or the number,
        NaN in the others. Where some tasks have pairs, single texts have one type."""
        result: dict[str, NDArray[Any]] = {}
        labels = np.full((len(ids), len(self.classes)), np.nan, dtype=np.float32)
        for index, rows, local in self._parts(ids):
            outputs, samples = self._tasks[index]
            arrays = samples.fetch(local)
            own = arrays.pop("labels")
            if outputs.kind == "classification":
                own = np.arange(len(outputs.classes)) == own[:, None]
            labels[rows, outputs.columns] = own if own.ndim > 1 else own[:, None]
            for name, array in arrays.items():
                whole = result.setdefault(name, np.zeros((len(ids), *array.shape[1:]), dtype=array.dtype))
                whole[rows] = array
        if self._has_types:
            # whatever texts there are: a sample and its partner of another task have the same arrays
            result.setdefault("token_type_ids", np.zeros_like(result["input_ids"]))
        return {**result, "labels": labels}

    def describe(self, sample: int) -> list[tuple[str, str, str]]:
        ((index, _, local),) = self._parts(np.array([sample]))
        return self._tasks[index][1].describe(int(local[0]))

    def class_counts(self) -> IntArray:
        raise DataError("several tasks have no classes of one kind to be counted")


def _weights(parts: Sequence[LabelledSamples], temperature: float) -> tuple[float, ...]:
    """Passes over each source of each task in an epoch."""
    if temperature == 1:
        # to the last digit as they are: half a pass over an odd number of texts is rounded
        return tuple(weight for part in parts for weight in part.weights)
    masses = [sum(size * weight for size, weight in zip(part.sizes, part.weights, strict=True)) for part in parts]
    shares = np.array([mass ** (1 / temperature) for mass in masses])
    factors = shares / shares.sum() * sum(masses) / np.array(masses)
    return tuple(float(weight * factor) for part, factor in zip(parts, factors, strict=True) for weight in part.weights)


class SeveralPrepared(Prepared):
    """Prepared data of several tasks, in tokens of one tokenizer."""

    def __init__(self, parts: Mapping[str, Prepared], tasks: Sequence[TaskConfig], temperature: float):
        """
        Args:
            parts: of each task by its name.
        """
        self.parts = {task.name: parts[task.name] for task in tasks}
        self._temperature = temperature
        first = parts[tasks[0].name]
        manifest = first.manifest | {
            "fingerprint": xxhash.xxh3_128_hexdigest(
                "\n".join(f"{name} {part.fingerprint}" for name, part in self.parts.items()).encode()
            ),
            "sources": [source for part in self.parts.values() for source in part.manifest["sources"]],
            "classes": [name for task in tasks for name in _names(task, self.parts[task.name])],
            "kind": "several",
            "class_entropy": _entropy(tasks, self.parts),
        }
        self.outputs = outputs_of(tasks, manifest["classes"])
        weights = [weight for part in self.parts.values() for weight in part.weights]
        super().__init__(first.path, manifest, weights, first.reading)

    @property
    def classes(self) -> Classes | None:
        assert self._frame is not None
        # an output that is no yes or no begins at 0, which is a rate of one half
        rates = [0.5] * len(self._manifest["classes"])
        for outputs in self.outputs:
            own = self.parts[outputs.name].classes
            if own is not None and own.rates:
                rates[outputs.columns] = own.rates
        return Classes(tuple(self._manifest["classes"]), self._frame.pad_id, tuple(rates))

    def total(self, what: str, split: Split) -> int:
        return sum(part.total(what, split) for part in self.parts.values())

    @property
    def report(self) -> dict[str, Any]:
        sources: list[dict[str, Any]] = []
        width = len(self._manifest["classes"])
        for outputs in self.outputs:
            for source in self.parts[outputs.name].report["sources"]:
                counted = {"task": outputs.name}
                for split in ("train", "held_out"):
                    counts = [0] * width
                    counts[outputs.columns] = source[split].get("classes") or [source[split]["documents"]]
                    counted[split] = source[split] | {"classes": counts}
                sources.append(source | counted)
        first = next(iter(self.parts.values())).report
        return first | {
            "fingerprint": self.fingerprint,
            "kind": "several",
            "sources": sources,
            "classes": self._manifest["classes"],
            "class_entropy": self._manifest["class_entropy"],
        }

    def report_at(self, sequence_length: int) -> dict[str, Any]:
        each = [part.report_at(sequence_length) for part in self.parts.values()]
        added = {
            what: {split: sum(found[what][split] for found in each) for split in ("train", "held_out")}
            for what in ("cut", "samples")
        }
        return {**each[0], **added, **self.report}

    def samples(
        self,
        split: Split,
        sequence_length: int,
        boundaries: Boundaries,
        *,
        decoder_start: int | None = None,  # noqa: ARG002
    ) -> Samples:
        """:class:`SeveralSamples`; of the held-out split of those tasks that have held-out texts.

        Raises:
            DataError: a task has no training texts, or none has held-out ones.
        """
        tasks = []
        for outputs in self.outputs:
            part = self.parts[outputs.name]
            if split == "train" or part.total("documents", split) or not self.total("documents", split):
                try:
                    samples = part.samples(split, sequence_length, boundaries)
                except DataError as error:
                    raise DataError(f"task {outputs.name}: {error}") from None
                assert isinstance(samples, LabelledSamples)
                tasks.append((outputs, samples))
        temperature = self._temperature if split == "train" else 1.0
        return SeveralSamples(tasks, names=self._manifest["classes"], temperature=temperature)


def prepare_several(config: DataConfig, tasks: Sequence[TaskConfig], **options: Any) -> SeveralPrepared:
    """The prepared data of each task. Arguments and errors as of :func:`trainer.data.prepare.prepare`.

    Raises:
        DataError: names the task.
    """
    parts = {}
    for task in tasks:
        try:
            parts[task.name] = prepare(_of(config, task.name), kind=task.kind, **options)
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from None
    return SeveralPrepared(parts, tasks, config.temperature)


def open_several(config: DataConfig, tasks: Sequence[TaskConfig], paths: Mapping[str, str]) -> SeveralPrepared:
    """What :func:`prepare_several` has written, without looking at the sources.

    Args:
        paths: folder of each task.

    Raises:
        DataError: one is gone or damaged.
    """
    parts = {}
    for task in tasks:
        own = _of(config, task.name)
        weights = [source.weight for source in own.sources]
        parts[task.name] = Prepared.open(Path(paths[task.name]), weights, Reading.of(own))
    return SeveralPrepared(parts, tasks, config.temperature)


def _of(config: DataConfig, task: str) -> DataConfig:
    """The sources of one task."""
    return config.model_copy(update={"sources": tuple(source for source in config.sources if source.task == task)})


def _names(task: TaskConfig, prepared: Prepared) -> list[str]:
    names = prepared.classes.names if prepared.classes else ()
    return [output_name(task.name, name) for name in names or (NUMBER,)]


def _entropy(tasks: Sequence[TaskConfig], parts: Mapping[str, Prepared]) -> float | None:
    """Weighted nats per held-out text of who knows nothing but frequencies; None: a task has no such number."""
    known = [(parts[task.name].total("documents", "held_out"), task, parts[task.name].manifest) for task in tasks]
    held_out = [(count, task.weight, manifest["class_entropy"]) for count, task, manifest in known if count]
    if not held_out or any(entropy is None for _, _, entropy in held_out):
        return None
    return float(
        sum(count * weight * entropy for count, weight, entropy in held_out) / sum(count for count, *_ in held_out)
    )
