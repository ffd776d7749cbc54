"""Training texts changed where they are read: a pure function of (seed, sample, visit), the same on every rank.

The text that a sample holds is decoded, changed (`noise`), encoded again by the run's tokenizer, and put between the
special tokens that stood around it, cut where it became too long. Of a pair both texts are changed. A text that the
draws leave as it is keeps its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trainer.config.finetune import AugmentConfig
from trainer.data import keyed, tokenize
from trainer.data.lexicon import Lexicon
from trainer.data.noise import Noise
from trainer.data.prepared import Prepared
from trainer.errors import DataError
from trainer.records import IntArray

_AUGMENTING = 11
_NOISE, _MASK, _CHOICE = range(3)
_RARE = "\u16a0\u1681\U00010900\U00010330\U00012000\U000118a0"
"""One of these stands for the unknown token while a text is changed: characters that hardly any vocabulary has."""

Arrays = dict[str, NDArray[Any]]


@dataclass
class _Part:
    """Neighbouring tokens of a sample that are text, or special tokens."""

    is_text: bool
    ids: IntArray
    type_id: int


class Augmentation:
    """Changes samples of texts with one target each.

    Args:
        tokenizer: of the run.
        special_ids: tokens that stand around texts, [n]; the unknown token is none.
        pad_id: behind a text that is shorter than others.
        mask_id: what masked tokens become; None: nothing is masked.

    Raises:
        DataError: tokens are to be masked, and the tokenizer has neither a mask token nor an unknown one.
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        tokenizer: Tokenizer,
        special_ids: Sequence[int],
        pad_id: int,
        mask_id: int | None,
        lexicon: Lexicon | None,
        seed: int,
    ):
        self._config, self._tokenizer, self._pad_id = config, tokenizer, pad_id
        self.lexicon = lexicon
        self._noise = Noise(config.synonyms, config.delete, config.swap, config.typos, lexicon)
        self._changes_text = any((config.synonyms, config.delete, config.swap, config.typos))
        self._key = keyed.key(seed, _AUGMENTING)
        unknown = _unknown_id(tokenizer)
        self._fill = mask_id if mask_id is not None else unknown
        if config.mask and self._fill is None:
            raise DataError("data.augment.mask: the tokenizer has neither a mask nor an unknown token; leave it out")
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._names: list[str] = [tokenizer.id_to_token(token) or "" for token in range(size)]
        if unknown is not None:
            # a tokenizer spells it out in full, which encoded again is text
            self._names[unknown] = next((one for one in _RARE if unknown in self._encode([one])[0]), "")
        self._is_special = np.zeros(size, dtype=np.bool_)
        self._is_special[[token for token in special_ids if token != unknown]] = True

    @classmethod
    def open(cls, config: AugmentConfig, prepared: Prepared, seed: int) -> Augmentation:
        """That of a run's prepared data.

        Raises:
            DataError: a lexicon that cannot be used, or see above.
        """
        assert prepared.classes is not None
        return cls(
            config,
            tokenizer=tokenize.decoder(prepared.tokenizer_path),
            special_ids=prepared.manifest["vocabulary"]["special_ids"],
            pad_id=prepared.classes.pad_id,
            mask_id=prepared.mask_id,
            lexicon=Lexicon.read(Path(config.lexicon)) if config.synonyms and config.lexicon else None,
            seed=seed,
        )

    def __call__(self, arrays: Mapping[str, NDArray[Any]], ids: IntArray, visits: IntArray) -> Arrays:
        """The arrays of samples, changed; `labels` and whatever else there is stay as they are.

        Args:
            arrays: `input_ids` and `attention_mask`, each [n, L], `token_type_ids` too where there are pairs.
            ids: of the samples, [n].
            visits: [n]; another number gives the same sample another change.
        """
        keys = keyed.derive(keyed.derive(self._key, ids), visits)
        chosen = _fractions(keyed.derive(keys, np.full(len(ids), _CHOICE))) < self._config.fraction
        rows = {row: self._parts(arrays, row) for row in np.flatnonzero(chosen).tolist()}
        if self._changes_text:
            self._change(rows, keys)
        if self._config.mask:
            for row, parts in rows.items():
                self._mask(parts, keys[row])
        return self._filled(arrays, rows)

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        names = [self._names[token] for token in ids]
        decoder = self._tokenizer.decoder
        return str(decoder.decode(names)) if decoder is not None else " ".join(names)

    def text_of(self, arrays: Mapping[str, NDArray[Any]], row: int) -> str:
        """The text of a sample, of a pair one below the other; masked tokens are spelt out."""
        texts = (part.ids.tolist() for part in self._parts(arrays, row) if part.is_text)
        return "\n".join(map(self.decode, texts))

    def _parts(self, arrays: Mapping[str, NDArray[Any]], row: int) -> list[_Part]:
        length = int(arrays["attention_mask"][row].sum())
        tokens = arrays["input_ids"][row, :length]
        types = arrays["token_type_ids"][row, :length] if "token_type_ids" in arrays else np.zeros(length, np.int64)
        # what is masked stands within a text
        special = self._is_special[tokens] & (tokens != self._fill)
        # texts of a pair that nothing stands between differ in their type
        ends = np.flatnonzero((np.diff(special) != 0) | (np.diff(types) != 0)) + 1
        parts = np.split(np.arange(length), ends)
        return [_Part(not special[part[0]], tokens[part], int(types[part[0]])) for part in parts if len(part)]

    def _change(self, rows: Mapping[int, list[_Part]], keys: keyed.Words) -> None:
        """Replace the tokens of texts by those of the changed texts."""
        changed: list[_Part] = []
        texts: list[str] = []
        for row, parts in rows.items():
            own = keyed.derive(keyed.derive(keys[row], np.array([_NOISE])), np.arange(len(parts)))
            for part, key in zip(parts, own.tolist(), strict=True):
                if part.is_text:
                    text = self.decode(part.ids.tolist())
                    noisy = self._noise(text, key)
                    if noisy != text:
                        changed.append(part)
                        texts.append(noisy)
        for part, ids in zip(changed, self._encode(texts) if texts else [], strict=True):
            # a normaliser may leave nothing of what is left
            if ids:
                part.ids = np.array(ids, dtype=np.int64)

    def _mask(self, parts: Sequence[_Part], key: np.uint64) -> None:
        own = keyed.derive(keyed.derive(key, np.array([_MASK])), np.arange(len(parts)))
        for part, drawn in zip(parts, own, strict=True):
            if part.is_text:
                dice = _fractions(keyed.derive(drawn, np.arange(len(part.ids))))
                part.ids = np.where(dice < self._config.mask, np.int64(self._fill or 0), part.ids)

    def _filled(self, arrays: Mapping[str, NDArray[Any]], rows: Mapping[int, list[_Part]]) -> Arrays:
        result = dict(arrays)
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in arrays]
        result |= {name: arrays[name].copy() for name in names}
        room = result["input_ids"].shape[1]
        for row, parts in rows.items():
            _cut(parts, room)
            ids = np.concatenate([part.ids for part in parts])
            end = len(ids)
            result["input_ids"][row] = self._pad_id
            result["input_ids"][row, :end] = ids
            result["attention_mask"][row] = np.arange(room) < end
            if "token_type_ids" in result:
                result["token_type_ids"][row] = 0
                result["token_type_ids"][row, :end] = np.repeat(
                    [part.type_id for part in parts], [len(part.ids) for part in parts]
                )
        return result

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch_fast([*texts], add_special_tokens=False)]


def _cut(parts: Sequence[_Part], room: int) -> None:
    """Shorten the longest text, at its end, until all has room."""
    texts = [part for part in parts if part.is_text]
    excess = sum(len(part.ids) for part in parts) - room
    while excess > 0:
        longest = max(texts, key=lambda part: len(part.ids))
        others = max((len(part.ids) for part in texts if part is not longest), default=0)
        count = min(excess, max(1, len(longest.ids) - others))
        longest.ids = longest.ids[:-count]
        excess -= count


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Of the token for what the vocabulary cannot express; None: there is none."""
    model: Any = tokenizer.model
    name = getattr(model, "unk_token", None)
    if name is not None:
        found: int | None = tokenizer.token_to_id(name)
        return found
    # of Unigram only its file tells
    unknown: int | None = json.loads(tokenizer.to_str())["model"].get("unk_id")
    return unknown


def _fractions(numbers: keyed.Words) -> NDArray[np.float64]:
    """Of 64-bit words, in [0, 1)."""
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
