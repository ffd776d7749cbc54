"""Samples changed where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from trainer.config.finetune import AugmentConfig
from trainer.data.augment import Augmentation
from trainer.data.lexicon import Lexicon
from trainer.errors import DataError

PAD, UNK, CLS, SEP, MASK = range(5)
TEXT = "the film is a very good long bad dull story of two rivers and one house"
WORDS = TEXT.split()
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    names += [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##") if letter != "a" or mark]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(names[:5])
    backend.encode_special_tokens = True
    return backend


def opened(tokenizer: Tokenizer, lexicon: Lexicon | None = None, mask_id: int | None = MASK, **options: Any) -> Any:
    return Augmentation(
        AugmentConfig(**options),
        tokenizer=tokenizer,
        special_ids=[PAD, UNK, CLS, SEP, MASK],
        pad_id=PAD,
        mask_id=mask_id,
        lexicon=lexicon,
        seed=7,
    )


def texts(count: int, longest: int = LENGTH - 2) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(5, 5 + len(WORDS), generator.integers(1, longest + 1)).tolist() for _ in range(count)]


def framed(*rows: list[list[int]] | list[int], length: int = LENGTH) -> dict[str, np.ndarray]:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP] with types."""
    arrays = {name: np.zeros((len(rows), length), dtype=np.int64) for name in ("input_ids", "attention_mask")}
    pairs = bool(rows[0]) and isinstance(rows[0][0], list)
    if pairs:
        arrays["token_type_ids"] = np.zeros((len(rows), length), dtype=np.int64)
    for row, texts in enumerate(rows):
        first, *rest = texts if pairs else [texts]
        ids = [CLS, *first, SEP]
        if rest:
            arrays["token_type_ids"][row, len(ids) : len(ids) + len(rest[0]) + 1] = 1
            ids += [*rest[0], SEP]
        assert len(ids) <= length
        arrays["input_ids"][row, : len(ids)] = ids
        arrays["attention_mask"][row, : len(ids)] = 1
    return arrays | {"labels": np.arange(len(rows))}


def applied(augmentation: Augmentation, arrays: dict[str, np.ndarray], visit: int = 0) -> dict[str, np.ndarray]:
    count = len(arrays["labels"])
    return augmentation(arrays, np.arange(count), np.full(count, visit))


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def body(arrays: dict[str, np.ndarray], row: int) -> list[int]:
    ids = arrays["input_ids"][row, : arrays["attention_mask"][row].sum()].tolist()
    assert (ids[0], ids[-1]) == (CLS, SEP)
    return ids[1:-1]


ALL = {"delete": 0.2, "swap": 0.2, "typos": 0.1, "mask": 0.1}


def test_rows_do_not_depend_on_what_is_read_with_them(tokenizer: Tokenizer) -> None:
    augmentation, arrays = opened(tokenizer, **ALL), framed(*texts(40))
    whole = applied(augmentation, arrays)
    assert not np.array_equal(whole["input_ids"], arrays["input_ids"])
    before = {name: array.copy() for name, array in arrays.items()}
    for rows in (slice(0, 1), slice(7, 19), slice(39, 40)):
        ids = np.arange(40)[rows]
        part = opened(tokenizer, **ALL)({n: a[rows] for n, a in arrays.items()}, ids, np.zeros(len(ids), np.int64))
        assert equal(part, {name: array[rows] for name, array in whole.items()})
    assert equal(arrays, before)
    assert np.array_equal(whole["labels"], arrays["labels"])
    assert not equal(applied(augmentation, arrays, visit=1), whole)


@pytest.mark.parametrize("kind", ["delete", "swap", "typos", "mask", "synonyms"])
def test_each_kind_of_change(tokenizer: Tokenizer, kind: str) -> None:
    lexicon = Lexicon([["good", "bad", "dull"], ["rivers", "house"]]) if kind == "synonyms" else None
    arrays = framed(*texts(60))
    after = applied(opened(tokenizer, lexicon, **{kind: 0.3}), arrays)
    changed = 0
    for row in range(60):
        old, new = body(arrays, row), body(after, row)
        assert new
        assert (after["input_ids"][row, len(new) + 2 :] == PAD).all()
        changed += new != old
        if kind == "delete":
            remaining = iter(old)
            assert all(token in remaining for token in new)
        elif kind == "swap":
            assert sorted(new) == sorted(old)
        elif kind == "mask":
            assert [b for a, b in zip(old, new, strict=True) if a != b] == [MASK] * (new.count(MASK))
        elif kind == "synonyms":
            names = [tokenizer.id_to_token(b) for a, b in zip(old, new, strict=True) if a != b]
            assert set(names) <= {"good", "bad", "dull", "rivers", "house"}
        else:
            assert MASK not in new
    assert changed > 20


def test_the_fraction_of_samples_and_of_tokens(tokenizer: Tokenizer) -> None:
    count = 3000
    arrays = framed(*([[5 + n % 16 for n in range(20)]] * count))
    after = applied(opened(tokenizer, mask=0.25, fraction=0.4), arrays)
    masked = (after["input_ids"] == MASK).sum(axis=1)
    touched = (masked > 0).mean()
    assert touched == pytest.approx(0.4 * (1 - 0.75**20), abs=4 * np.sqrt(0.24 / count))
    assert masked[masked > 0].mean() / 20 == pytest.approx(0.25, abs=0.01)
    untouched = masked == 0
    assert np.array_equal(after["input_ids"][untouched], arrays["input_ids"][untouched])


def test_what_the_draws_spare_keeps_its_tokens(tokenizer: Tokenizer) -> None:
    """Encoded again, letters of a word would be the word."""
    letters = [tokenizer.token_to_id(name) for name in ("t", "##h", "##e")]
    arrays = framed(*([[*letters, 6]] * 50))
    after = applied(opened(tokenizer, delete=0.01), arrays)
    assert sum(body(after, row) == [*letters, 6] for row in range(50)) > 40


def test_unknown_words_stay_unknown(tokenizer: Tokenizer) -> None:
    arrays = framed(*([[5, UNK, 6, 7, UNK, 8, 9]] * 30))
    after = applied(opened(tokenizer, swap=0.5), arrays)
    assert all(sorted(body(after, row)) == [UNK, UNK, 5, 6, 7, 8, 9] for row in range(30))


def test_text_that_grows_is_cut_as_samples_are(tokenizer: Tokenizer) -> None:
    arrays = framed(*([[5] * (LENGTH - 2)] * 30))
    after = applied(opened(tokenizer, typos=0.5), arrays)
    assert all(len(body(after, row)) == LENGTH - 2 for row in range(30))


def test_both_texts_of_a_pair_are_changed(tokenizer: Tokenizer) -> None:
    one, other = texts(40, 6), texts(40, 12)
    arrays = framed(*map(list, zip(one, other, strict=True)))
    after = applied(opened(tokenizer, typos=0.3, delete=0.2), arrays)
    changed = [0, 0]
    for row in range(40):
        length = int(after["attention_mask"][row].sum())
        ids, types = after["input_ids"][row, :length].tolist(), after["token_type_ids"][row, :length].tolist()
        middle = ids.index(SEP)
        assert (ids[0], ids[-1], ids.count(SEP)) == (CLS, SEP, 2)
        assert types == [0] * (middle + 1) + [1] * (length - middle - 1)
        assert min(middle - 1, length - middle - 2) > 0
        changed[0] += ids[1:middle] != one[row]
        changed[1] += ids[middle + 1 : -1] != other[row]
    assert min(changed) > 10


def test_a_pair_that_grows_loses_of_its_longer_text(tokenizer: Tokenizer) -> None:
    arrays = framed(*([[[5] * 3, [6] * (LENGTH - 6)]] * 30))
    after = applied(opened(tokenizer, typos=0.4), arrays)
    grown = 0
    for row in range(30):
        ids = after["input_ids"][row].tolist()
        assert ids.count(SEP) == 2
        assert after["attention_mask"][row].sum() <= LENGTH
        grown += ids.index(SEP) > 4 and after["attention_mask"][row].sum() == LENGTH
    assert grown > 5


def test_a_text_without_tokens_stays_one(tokenizer: Tokenizer) -> None:
    arrays = {"input_ids": np.zeros((1, 8), np.int64), "attention_mask": np.eye(1, 8, dtype=np.int64)}
    assert equal(applied(opened(tokenizer, **ALL), arrays | {"labels": np.zeros(1)}), arrays | {"labels": np.zeros(1)})
    empty = framed([])
    assert equal(applied(opened(tokenizer, **ALL), empty), empty)


def test_tokens_that_can_be_masked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    arrays = framed([5, 6, 7])
    after = applied(opened(tokenizer, mask_id=None, mask=0.999), arrays)
    assert body(after, 0) == [UNK] * 3
    bare = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    with pytest.raises(DataError, match="neither a mask nor an unknown token"):
        Augmentation(
            AugmentConfig(mask=0.1), tokenizer=bare, special_ids=[], pad_id=0, mask_id=None, lexicon=None, seed=1
        )


def test_bytes_come_back_as_they_were() -> None:
    """Byte-level BPE, with text of several bytes a character."""
    from tokenizers import trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["这部电影很好"], trainers.BpeTrainer(special_tokens=["<end>", "<mask>"], initial_alphabet=alphabet)
    )
    augmentation = Augmentation(
        AugmentConfig(swap=0.3), tokenizer=backend, special_ids=[0, 1], pad_id=0, mask_id=1, lexicon=None, seed=1
    )
    ids = backend.encode("这部电影很好").ids
    arrays = {"input_ids": np.array([ids] * 8), "attention_mask": np.ones((8, len(ids)), np.int64)}
    arrays = {name: np.pad(array, ((0, 0), (0, 40))) for name, array in arrays.items()} | {"labels": np.arange(8)}
    after = applied(augmentation, arrays)
    found = {augmentation.text_of(after, row) for row in range(8)}
    assert {"".join(sorted(text)) for text in found} == {"".join(sorted("这部电影很好"))}
    assert len(found) > 3
