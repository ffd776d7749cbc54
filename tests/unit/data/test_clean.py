import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.schema import CleanConfig
from trainer.data import clean as rules
from trainer.data.clean import clean, fraction_of_letters, fraction_of_repeats, judge, repair
from trainer.data.corpus import Document
from trainer.data.duplicates import NearDuplicates, signatures

DEFAULT = CleanConfig()


@pytest.mark.parametrize(
    ("raw", "expected", "repairs"),
    [
        ("plain ASCII\twith\nlines", "plain ASCII\twith\nlines", ()),
        ("a\x00b\x0cc\x7fd", "abcd", (rules.UNICODE,)),
        ("one\r\ntwo\r\n", "one\ntwo\n", ()),
        ("l’été est là\nlâ€™Ã©tÃ©", "l’été est là\nl’été", (rules.UNICODE,)),
        ("e\u0301te\u0301", "été", (rules.UNICODE,)),
        ("\ufeffnaïve\x81", "naïve", (rules.UNICODE,)),
        ("caf\udce9", "caf\ufffd", (rules.UNDECODABLE,)),
        ("\ud83d\ude00 smile", "😀 smile", (rules.UNDECODABLE,)),
        ("你好，世界", "你好，世界", ()),
    ],
)
def test_repair(raw, expected, repairs):
    assert repair(raw, DEFAULT) == (expected, repairs)


def test_without_unicode_repair_only_what_cannot_be_encoded_changes():
    off = CleanConfig(unicode=False)
    assert repair("a\x00\r\ne\u0301 lâ€™", off) == ("a\x00\r\ne\u0301 lâ€™", ())
    assert repair("caf\udce9", off) == ("caf\ufffd", (rules.UNDECODABLE,))


@given(st.text(st.characters(codec=None)))
def test_whatever_comes_in_can_be_encoded_and_has_no_controls(raw):
    text, _ = repair(raw, DEFAULT)
    assert not set(text.encode().decode()) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
    assert unicodedata.is_normalized("NFC", text)


@given(st.text())
def test_letters_agree_with_a_plain_count(text):
    text = repair(text, DEFAULT)[0]
    visible = [c for c in text if c not in " \t\n"]
    expected = sum(c.isalpha() for c in visible) / len(visible) if visible else 0.0
    assert fraction_of_letters(text.encode()) == pytest.approx(expected)


def test_repeats():
    lines = [f"line {n}" for n in range(5)]
    assert fraction_of_repeats("\n\n".join(lines * 2)) == pytest.approx(0.5)
    assert fraction_of_repeats("\n".join(["same"] * 9)) == 0.0
    assert fraction_of_repeats("\n".join(["same"] * 20)) == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x" * 31, rules.TOO_SHORT),
        ("word " * 20, None),
        ("word " * 21, rules.TOO_LONG),
        ("0123 + 4567 = 89 " * 5, rules.FEW_LETTERS),
        ("same\n" * 20, rules.REPETITION),
        ("мама мыла раму каждый день, " * 2, None),
        ("人人生而自由，在尊严和权利上一律平等。" * 2, None),
    ],
)
def test_rules(text, rule):
    config = CleanConfig(max_characters=100)
    assert judge(text, text.encode(), config) == rule
    nothing = CleanConfig(min_characters=0, min_letters=0.0, max_repetition=1.0)
    assert judge(text, text.encode(), nothing) is None


def words(count, seed):
    generator = random.Random(seed)
    return [f"w{generator.randrange(10**9)}" for _ in range(count)]


@pytest.mark.parametrize("join", [" ".join, lambda ws: "".join(chr(0x4E00 + int(w[1:]) % 20000) for w in ws)])
@pytest.mark.parametrize("edits", [0, 4, 20, 60])
def test_signatures_estimate_the_similarity(join, edits):
    """Of 600 words some are replaced far apart: each breaks five 5-grams."""
    original = words(600, 1)
    changed = list(original)
    for place in range(edits):
        changed[5 + place * 9] = f"x{place}{place}"[:3].replace("x", "w7")
    first, second = signatures([join(original), join(changed)])
    shared = 596 - 5 * edits
    true_similarity = shared / (2 * 596 - shared)
    assert (first == second).mean() == pytest.approx(true_similarity, abs=0.14)


def test_near_duplicates_are_found_in_order():
    near = NearDuplicates(0.85)
    base = [" ".join(words(400, seed)) for seed in range(2000)]
    matrix = signatures(base)
    for row in matrix:
        assert near.find(row) is None
        near.add(row)
    copies = signatures([text + " and one more sentence at the end" for text in base])
    found = [near.find(row) for row in copies]
    assert np.mean([number == index for index, number in enumerate(found)]) > 0.99
    assert signatures([]).shape == (0, 128)


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.7, 0.95, 1.0])
def test_any_threshold_finds_what_is_equal(threshold):
    near = NearDuplicates(threshold)
    (row,) = signatures(["some few words here"])
    near.add(row)
    assert near.find(row) == 0


def test_short_and_odd_texts_have_signatures():
    texts = ["", "one", "one two three four", "one two three four five", "a" * 50, "語" * 50]
    assert signatures(texts).shape == (6, 128)
    assert len({row.tobytes() for row in signatures(texts)}) == 6


def test_clean_returns_a_signature_for_each_that_stays():
    documents = [Document("a", "x"), Document("b", "good text " * 9), Document("c", "other words " * 9)]
    results, matrix = clean(documents, DEFAULT)
    assert [(r.name, r.rule) for r in results] == [("a", rules.TOO_SHORT), ("b", None), ("c", None)]
    assert results[0].text == b""
    assert matrix.shape == (2, 128)
    assert clean([Document("b", "good text " * 9)], CleanConfig(near_duplicates=None))[1] is None
