"""Any model directory that transformers loads: what it predicts, and how it is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.objective import Kind, ObjectiveConfig
from trainer.errors import ConfigError, DataError
from trainer.records import IntArray
from trainer.scores.answers import Window, best_span
from trainer.stages.examples import Examples
from trainer.stages.scoring import EMPTY, Predictions, predictions

_HEADS: dict[str, Kind] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForConditionalGeneration": "seq2seq",
    "ForSeq2SeqLM": "seq2seq",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "MTModel": "seq2seq",
    "MarianMTModel": "seq2seq",
}
_CLASSES: dict[Kind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "multi_label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "several": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
}
_HUGE = 1_000_000
"""`model_max_length` of a tokenizer that knows of no limit."""
_DEFAULT_LENGTH = 1024
_OVERLAP = 128
"""Most tokens that neighbouring windows of a text share."""


@dataclass
class AnyModel:
    """A model with its tokenizer, ready to predict.

    Attributes:
        names: of its classes.
        length: tokens of a text that it takes.
        counts: of what was met and dealt with, by what was done.
    """

    path: Path
    kind: Kind
    names: tuple[str, ...]
    length: int
    model: Any
    tokenizer: Any
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def load(cls, path: Path, kind: Kind | None, length: int | None, device: str) -> AnyModel:
        """
        Args:
            kind: what it is for; None: what its configuration says.
            length: tokens of a text; None: as many as the model takes.

        Raises:
            ConfigError: no model, of no kind that is known here, or with other classes than its head.
        """
        import transformers

        config = read_model_config(path)
        kind = kind or kind_of(config, path)
        try:
            model = getattr(transformers, _CLASSES[kind]).from_pretrained(path, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError([("", f"transformers cannot load {path}: {str(error).splitlines()[0]}")]) from error
        labels = model.config.id2label
        names = tuple(str(labels[number]) for number in range(len(labels)))
        limits = [limit for limit in (_positions(model.config), tokenizer.model_max_length) if limit and limit < _HUGE]
        longest = min(limits, default=_DEFAULT_LENGTH)
        return cls(path, kind, names, min(length or longest, longest), model.to(device).eval(), tokenizer)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def micro(self, wanted: int) -> int:
        """Texts at a time: one where the model has no padding token."""
        if self.tokenizer.pad_token_id is not None:
            if self.model.config.get_text_config().pad_token_id is None:
                self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
            return wanted
        self.counts["no padding token: texts are evaluated one at a time"] = 1
        return 1

    def predict(
        self,
        examples: Examples,
        batches: Iterator[IntArray],
        change: Callable[[str, int], str] | None = None,
    ) -> Predictions:
        """Of this process's batches of ids."""
        if self.kind == "question_answering":
            return self._answer(examples, batches)
        if self.kind == "seq2seq":
            return self._likelihood(examples, batches)
        objective = ObjectiveConfig(kind=self.kind)
        return predictions(self.model, objective, examples.batches(batches, self.tokenizer, self.length, change))

    def generate(
        self,
        examples: Examples,
        batches: Iterator[IntArray],
        tokens: int,
        change: Callable[[str, int], str] | None = None,
    ) -> tuple[IntArray, list[str]]:
        """Ids and what the model writes for them, greedily, at most `tokens` tokens."""
        if self.kind == "causal":
            self.tokenizer.padding_side = "left"
        ids: list[int] = []
        written: list[str] = []
        for group in batches:
            chosen = [number for number in group.tolist() if number != EMPTY]
            if not chosen:
                continue
            texts = [examples.asked(number) for number in chosen]
            if change is not None:
                texts = [change(text, number) for text, number in zip(texts, chosen, strict=True)]
            room = self.length - tokens if self.kind == "causal" else self.length
            inputs = self.tokenizer(
                texts,
                padding=len(texts) > 1,
                truncation=True,
                max_length=max(8, room),
                # a conversation spells them itself
                add_special_tokens=examples.chat is None,
                return_tensors="pt",
            ).to(self.device)
            inputs.pop("token_type_ids", None)
            ids += chosen
            written += self.write(inputs, tokens)
        return np.array(ids, dtype=np.int64), written

    @torch.no_grad()
    def write(self, inputs: Mapping[str, Tensor], tokens: int) -> list[str]:
        """What it writes for each row of tokens, greedily, at most `tokens` tokens."""
        out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
        if self.kind == "causal":
            out = out[:, inputs["input_ids"].shape[1] :]
        return self.spelled(out)

    def spelled(self, rows: Any) -> list[str]:
        """Rows of tokens as texts."""
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def _likelihood(self, examples: Examples, batches: Iterator[IntArray]) -> Predictions:
        def arrays() -> Iterator[tuple[IntArray, dict[str, NDArray[Any]]]]:
            for ids in batches:
                rows = [examples.examples[number if number != EMPTY else -1] for number in ids.tolist()]
                options = {"truncation": True, "max_length": self.length, "padding": True, "return_tensors": "np"}
                inputs = self.tokenizer([one.text for one in rows], **options)
                labels = self._targets([one.truth for one in rows])
                shifted = self.model.prepare_decoder_input_ids_from_labels(torch.from_numpy(labels).to(self.device))
                yield (
                    ids,
                    {
                        "input_ids": inputs["input_ids"].astype(np.int64),
                        "attention_mask": inputs["attention_mask"].astype(np.int64),
                        "decoder_input_ids": shifted.cpu().numpy(),
                        "labels": labels,
                    },
                )

        return predictions(self.model, ObjectiveConfig(kind="seq2seq"), arrays())

    def _targets(self, texts: Sequence[str]) -> NDArray[Any]:
        """Tokens of texts that are to be written, and that they end, [n, L]; −100 behind them."""
        end = self.tokenizer.eos_token_id
        rows = []
        for ids in self.tokenizer(text_target=list(texts), truncation=True, max_length=self.length)["input_ids"]:
            # who writes must be able to end, whether or not the tokenizer says so
            missing = end is not None and ids[-1:] != [end]
            rows.append([*ids[: self.length - missing], end] if missing else ids)
        labels = np.full((len(rows), max(map(len, rows))), -100, dtype=np.int64)
        for row, ids in enumerate(rows):
            labels[row, : len(ids)] = ids
        return labels

    @torch.no_grad()
    def _answer(self, examples: Examples, batches: Iterator[IntArray]) -> Predictions:
        """The best span over all windows of each text."""
        ids: list[int] = []
        answers: list[str] = []
        for group in batches:
            for number in [number for number in group.tolist() if number != EMPTY]:
                one = examples.examples[number]
                text = str(one.text)
                found = self.tokenizer(
                    one.second,
                    text,
                    truncation="only_second",
                    max_length=self.length,
                    stride=min(_OVERLAP, self.length // 4),
                    return_overflowing_tokens=True,
                    return_offsets_mapping=True,
                )
                windows = []
                if len(found["input_ids"]) > 1:
                    self.counts["longer than the model takes, and read in windows"] += 1
                for window in range(len(found["input_ids"])):
                    inputs = {
                        name: torch.tensor([found[name][window]], device=self.device)
                        for name in ("input_ids", "attention_mask", "token_type_ids")
                        if name in found
                    }
                    outputs = self.model(**inputs)
                    places = [
                        tuple(place) if which == 1 else None
                        for place, which in zip(
                            found["offset_mapping"][window], found.sequence_ids(window), strict=True
                        )
                    ]
                    logits = (outputs.start_logits[0].cpu().numpy(), outputs.end_logits[0].cpu().numpy())
                    windows.append(Window(*logits, places))
                begin, end = best_span(windows)
                ids.append(number)
                answers.append(text[begin:end])
        truths = [examples.examples[number].truth for number in ids]
        return Predictions("question_answering", np.array(ids, dtype=np.int64), answers, truths)


def read_model_config(path: Path) -> dict[str, Any]:
    """The model's configuration.

    Raises:
        DataError: there is none.
    """
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{path} is neither a run nor a model: it has no config.json that can be read") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}/config.json is no configuration of a model")
    return found


def kind_of(config: dict[str, Any], path: Path) -> Kind:
    """What a model is for, from its configuration.

    Raises:
        ConfigError: it has no head, or one that is not known here.
    """
    architecture = str((config.get("architectures") or [""])[0])
    kind = next((kind for ending, kind in _HEADS.items() if architecture.endswith(ending)), None)
    if kind is None:
        heads = ", ".join(_HEADS)
        raise ConfigError([("", f"{path} is a {architecture or 'model without a head'}, and not one of …{heads}")])
    if kind == "causal" and config.get("is_encoder_decoder"):
        return "seq2seq"
    if kind != "classification":
        return kind
    num_labels = len(config.get("id2label") or {0: "", 1: ""})
    match config.get("problem_type"):
        case "multi_label_classification":
            return "multi_label"
        case "regression":
            return "regression"
        case None if num_labels == 1:
            return "regression"
    return "classification"


def _positions(config: Any) -> int | None:
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if limit is None or getattr(text, "position_embedding_type", "absolute") == "relative":
        return None
    # RoBERTa and its kin count positions from behind the padding token
    offset = text.pad_token_id + 1 if text.model_type in ("roberta", "xlm-roberta", "camembert", "longformer") else 0
    return int(limit) - offset
