"""`trimtab evaluate`: what models make of one set of texts, clean and noisy, and whether they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config.finetune import AugmentConfig
from trainer.config.objective import EACH_ALONE, TEXTS, Kind
from trainer.config.schema import RunConfig
from trainer.data.augment import Augmentation
from trainer.data.labelled import LabelledSamples, trimmed
from trainer.data.noise import Noise
from trainer.data.prepared import Prepared
from trainer.data.questions import QuestionSamples
from trainer.data.stream import Reader
from trainer.errors import ConfigError, DataError
from trainer.model.build import position_offset, takes_positions
from trainer.model.configuration import decoder_start
from trainer.records import IntArray
from trainer.scores.resampling import Comparison, Interval, compare, flips, intervals
from trainer.scores.score import score
from trainer.scores.scores import Scores
from trainer.stages.any_model import AnyModel
from trainer.stages.examples import Examples
from trainer.stages.held_out import documents, shown
from trainer.stages.scoring import EMPTY, Predictions, gathered, held_out_ids, of_texts, predictions


@dataclass(frozen=True, slots=True)
class Options:
    """How it is evaluated."""

    seed: int = 0
    resamples: int = 1000
    micro: int = 16
    max_samples: int | None = None
    noise: dict[str, float] = field(default_factory=dict)
    """Rates by name (`typos`, `delete`, `swap`); empty: none."""
    tokens: int = 64
    """At most, of a generated text."""
    rank: int = 0
    ranks: int = 1


class Material(Protocol):
    """Texts with their truths."""

    kind: Kind
    names: tuple[str, ...]
    counts: Counter[str]

    def __len__(self) -> int: ...

    def text(self, number: int) -> str:
        """What a person reads."""
        ...

    def where(self, ids: IntArray) -> list[str]:
        """Document, or file and record."""
        ...

    def predict(self, model: AnyModel, ids: Iterator[IntArray], noise: dict[str, float], seed: int) -> Predictions:
        """What a model predicts for this process's batches, its classes in its own order."""
        ...

    def of_texts(self, found: Predictions) -> Predictions:
        """One prediction a text, of all samples in the order of their ids."""
        ...

    def generate(self, model: AnyModel, ids: Iterator[IntArray], tokens: int) -> Generated | None:
        """What a model writes for this process's batches; None: it is not asked to."""
        ...


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote."""

    ids: IntArray
    texts: list[str]
    truths: list[str]
    """Empty where nothing is known."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one model makes of the texts."""

    title: str
    predicted: Predictions
    scores: Scores
    intervals: dict[str, Interval]
    generated: Generated | None = None
    written: Scores | None = None
    """Of what it wrote."""
    noisy: Scores | None = None
    flips: float | None = None
    """Fraction of texts whose prediction is another one with noise."""
    counts: dict[str, int] = field(default_factory=dict)


class FileMaterial:
    """Records of a file."""

    def __init__(self, examples: Examples):
        self.examples, self.kind, self.names, self.counts = examples, examples.kind, examples.names, examples.counts

    def __len__(self) -> int:
        return len(self.examples)

    def text(self, number: int) -> str:
        return self.examples.text(number)

    def where(self, ids: IntArray) -> list[str]:
        return self.examples.where(ids)

    def predict(self, model: AnyModel, ids: Iterator[IntArray], noise: dict[str, float], seed: int) -> Predictions:
        if not noise:
            return model.predict(self.examples, ids)
        change = Noise(delete=noise.get("delete", 0), swap=noise.get("swap", 0), typos=noise.get("typos", 0))
        return model.predict(self.examples, ids, lambda text, number: change(text, seed * 2**32 + max(number, 0)))

    def of_texts(self, found: Predictions) -> Predictions:
        return found

    def generate(self, model: AnyModel, ids: Iterator[IntArray], tokens: int) -> Generated | None:
        if self.kind not in ("seq2seq", "causal"):
            return None
        own, texts = model.generate(self.examples, ids, tokens)
        return Generated(own, texts, [self.examples.examples[number].truth or "" for number in own.tolist()])


class HeldOutMaterial:
    """The held-out split of prepared data, in the tokens in which the run reads it."""

    def __init__(self, config: RunConfig, prepared: Prepared):
        data = config.data
        self.kind = config.objective.kind
        self.counts: Counter[str] = Counter()
        self._config, self._prepared = config, prepared
        start = decoder_start(config)
        self.samples = prepared.samples("held_out", data.sequence_length, data.boundaries, decoder_start=start)
        self.names = prepared.classes.names if prepared.classes else ()
        if isinstance(self.samples, LabelledSamples):
            self.counts["longer than a sample (data.too_long)"] = self.samples.num_cut

    def __len__(self) -> int:
        return len(self.samples)

    def text(self, number: int) -> str:
        return " ‖ ".join(text for _, _, text in self.samples.describe(number))

    def where(self, ids: IntArray) -> list[str]:
        if isinstance(self.samples, LabelledSamples):
            return documents(self.samples, ids)
        return [f"sample {number}" for number in ids.tolist()]

    def predict(self, model: AnyModel, ids: Iterator[IntArray], noise: dict[str, float], seed: int) -> Predictions:
        require_tokenizer(self._prepared, model)
        augmentation = Augmentation.open(AugmentConfig.model_validate(noise), self._prepared, seed) if noise else None
        columns = self.samples.columns if isinstance(self.samples, QuestionSamples) else None
        batches = self._batches(ids, augmentation, model)
        return predictions(model.model, self._config.objective, batches, columns, names=self.names)

    def of_texts(self, found: Predictions) -> Predictions:
        return of_texts(found, self.samples) if isinstance(self.samples, LabelledSamples) else found

    def generate(self, model: AnyModel, ids: Iterator[IntArray], tokens: int) -> Generated | None:
        # the samples of a causal model are packed: where one is asked and where it answers, a file says
        if self.kind != "seq2seq":
            return None
        chosen: list[int] = []
        texts: list[str] = []
        truths: list[str] = []
        for batch in ids:
            rows = batch[batch != EMPTY]
            if not len(rows):
                continue
            arrays = trimmed(self.samples.fetch(rows), self.kind)
            inputs = {name: torch.from_numpy(arrays[name]).to(model.device) for name in ("input_ids", "attention_mask")}
            chosen += rows.tolist()
            texts += model.write(inputs, tokens)
            truths += model.spelled([labels[labels >= 0] for labels in arrays["labels"]])
        return Generated(np.array(chosen, dtype=np.int64), texts, truths)

    def _batches(
        self, batches: Iterator[IntArray], augmentation: Augmentation | None, model: AnyModel
    ) -> Iterator[tuple[IntArray, dict[str, NDArray[Any]]]]:
        for ids in batches:
            rows = np.where(ids == EMPTY, len(self.samples) - 1, ids)
            if self.kind in EACH_ALONE:
                arrays = self.samples.fetch(rows)
                if augmentation is not None:
                    arrays = augmentation(arrays, rows, np.zeros(len(rows), dtype=np.int64))
                yield ids, trimmed(arrays, self.kind)
            else:
                yield ids, self._packed(rows, model.model)

    def _packed(self, rows: IntArray, model: Any) -> dict[str, NDArray[Any]]:
        """One by one, so that a masked sample has the masks that the run's evaluations give it."""
        reader = Reader(self.samples, self._config.objective, self._config.seed)
        arrays: dict[str, NDArray[Any]] = reader.micro_batch(
            reader.fetch(rows, np.zeros(len(rows), dtype=np.int64)), slice(None)
        )
        if "position_ids" in arrays:
            if takes_positions(model):
                arrays["position_ids"] = arrays["position_ids"] + position_offset(model)
            else:
                del arrays["position_ids"]
        return arrays


def require_tokenizer(prepared: Prepared, model: AnyModel) -> None:
    """
    Raises:
        DataError: the data is in tokens of another tokenizer than the model's.
    """
    from trainer.data.tokenize import decoder

    if decoder(prepared.tokenizer_path).get_vocab() != model.tokenizer.get_vocab():
        raise DataError(
            f"{model.path} has another tokenizer than the data, which is prepared as tokens: give the texts as a file "
            "(--data FILE.jsonl)"
        )


def evaluate(material: Material, model: AnyModel, title: str, options: Options) -> Result | None:
    """What a model makes of the texts; None on all ranks but the first. A collective.

    Raises:
        ConfigError: its classes are not those of the data, or noise for a kind whose truth is part of the text.
    """
    require_fit(material, model)
    if options.noise and material.kind not in TEXTS:
        kinds = ", ".join(TEXTS)
        raise ConfigError([("", f"--noise is for {kinds}: of {material.kind} it would change what is true")])
    micro = model.micro(options.micro)

    def ids() -> Iterator[IntArray]:
        return held_out_ids(
            len(material), micro=micro, rank=options.rank, ranks=options.ranks, max_samples=options.max_samples
        )

    clean = gathered(material.predict(model, ids(), {}, options.seed))
    noisy = gathered(material.predict(model, ids(), options.noise, options.seed)) if options.noise else None
    generated = _gathered(material.kind, material.generate(model, ids(), options.tokens))
    if clean is None:
        return None
    clean = aligned(material.of_texts(clean), model.names, material.names)
    if not clean.finite:
        raise ConfigError([("", f"{model.path} predicts numbers that are not finite: its weights are broken")])
    scores = clean.scores(material.names)
    written = score("generation", generated.texts, generated.truths) if generated and all(generated.truths) else None
    bounds = intervals(scores, seed=options.seed, resamples=options.resamples)
    if written is not None:
        bounds |= intervals(written, seed=options.seed, resamples=options.resamples)
    result = Result(title, clean, scores, bounds, generated, written, counts=dict(+(material.counts + model.counts)))
    if noisy is None:
        return result
    noisy = aligned(material.of_texts(noisy), model.names, material.names)
    changed = flips(shown(clean, material.names)[1], shown(noisy, material.names)[1])
    noisy_scores = noisy.scores(material.names)
    return Result(title, clean, scores, bounds, generated, written, noisy_scores, changed, result.counts)


def _gathered(kind: Kind, own: Generated | None) -> Generated | None:
    """What all ranks' models wrote, on rank 0. A collective."""
    if own is None:
        return None
    found = gathered(Predictions(kind, own.ids, own.texts, own.truths))
    return None if found is None else Generated(found.ids, list(found.predictions), list(found.truths))


def require_fit(material: Material, model: AnyModel) -> None:
    """
    Raises:
        ConfigError: the model is of another kind than the data, or lacks one of its classes.
    """
    if model.kind != material.kind:
        raise ConfigError([("", f"{model.path} is a {model.kind} model, and the data is for {material.kind}")])
    if material.kind == "several" and tuple(material.names) != tuple(model.names):
        # where a task's outputs stand is part of what they mean
        raise ConfigError(
            [("", f"{model.path} has other tasks or classes than the data, or has them in another order")]
        )
    if not material.names or set(material.names) == set(model.names):
        return
    unknown = sorted(set(material.names) - set(model.names)) or sorted(set(model.names) - set(material.names))
    first = ", ".join(unknown[:5])
    whose = "the data has" if set(material.names) - set(model.names) else "the data lacks"
    raise ConfigError([("", f"{whose} the label {first}; {model.path} knows {', '.join(model.names[:8])}")])


def aligned(found: Predictions, own: Sequence[str], names: Sequence[str]) -> Predictions:
    """Predictions of a model with its classes in the order of `names`; truths are in it already."""
    if not names or tuple(own) == tuple(names):
        return found
    place = [list(own).index(name) for name in names]
    predicted: Any = found.predictions
    if found.kind in ("classification", "multi_label"):
        predicted = predicted[:, place]
    elif found.kind == "token_classification":
        number = {old: new for new, old in enumerate(place)}
        predicted = [[number[one] for one in text] for text in predicted]
    return replace(found, predictions=predicted)


def compared(first: Result, second: Result, names: Sequence[str], options: Options) -> dict[str, Comparison]:
    """Two models over the same texts, by score.

    Raises:
        ConfigError: they are not the same texts.
    """
    one, other = first.predicted, second.predicted
    if not np.array_equal(one.ids, other.ids):
        raise ConfigError([("", f"{first.title} and {second.title} were not given the same texts")])
    common: dict[str, Any] = {"seed": options.seed, "resamples": options.resamples}
    found = compare(
        lambda predicted, true: replace(one, predictions=predicted, truths=true).scores(names),
        one.predictions,
        other.predictions,
        one.truths,
        **common,
    )
    if first.written and second.written and first.generated and second.generated:
        texts = first.generated.texts, second.generated.texts, first.generated.truths
        found |= compare(lambda predicted, true: score("generation", predicted, true), *texts, **common)
    return found
