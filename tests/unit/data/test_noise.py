"""Changes of a text: how much is changed, and what never is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.lexicon import Lexicon
from trainer.data.noise import Noise, characters, delete_words, mistype, pieces, replace_words, swap_words
from trainer.errors import DataError

LATIN = "The long film is, in the end, a good story of 2 rivers and one house at https://example.org/x?y=1 .\n"
CHINESE = "这部电影的故事很好，演员的表演也不错。"
THAI = "ภาพยนตร์เรื่องนี้ดีมาก"
FAMILY = "a \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301t\u00e9"
WORDS = " ".join(f"w{n}" for n in range(400))
TEXTS = st.text(max_size=60) | st.sampled_from([LATIN, CHINESE, THAI, FAMILY])
KEYS = st.integers(0, 2**64 - 1)
RATES = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5])


def keys(count: int) -> list[np.uint64]:
    return list(np.random.default_rng(1).integers(0, 2**64, count, dtype=np.uint64))


def words(text: str) -> list[str]:
    return [piece.word for piece in pieces(text)[0]]


def within(found: float, expected: float, draws: int) -> bool:
    """Four standard errors of a binomial fraction."""
    return abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / draws)


@given(TEXTS)
def test_words_and_characters_make_up_the_text(text: str) -> None:
    found, tail = pieces(text)
    assert "".join(gap + word for gap, word in found) + tail == text
    assert all(word and not any(character.isspace() for character in word) for _, word in found)
    assert all(gap == "" or gap.isspace() for gap, _ in found)
    assert "".join(characters(text)) == text


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words("我爱 NLP课") == ["我", "爱", "NLP", "课"]
    assert words("ตัวดี") == ["ตั", "ว", "ดี"]
    assert words("한국어 문장") == ["한국어", "문장"]
    assert characters(FAMILY) == ["a", " ", "\U0001f468\u200d\U0001f469\u200d\U0001f467", " ", "e\u0301", "t", "\u00e9"]


@given(TEXTS, KEYS, RATES, RATES, RATES, RATES)
def test_a_change_is_a_function_of_text_and_key_and_never_empty(
    text: str, key: int, delete: float, swap: float, typos: float, synonyms: float
) -> None:
    noise = Noise(synonyms, delete, swap, typos, Lexicon([["film", "movie"], ["很好", "优秀"]]))
    changed = noise(text, key)
    assert noise(text, key) == changed
    assert bool(changed.strip()) == bool(text.strip())
    if not (delete or swap or typos or synonyms):
        assert changed == text


@pytest.mark.parametrize("text", [LATIN, CHINESE, THAI, FAMILY])
def test_one_word_is_left_of_all_that_were_to_go(text: str) -> None:
    for key in keys(20):
        left = words(delete_words(text, 1.0, key))
        assert len(left) == 1
        assert left[0] in words(text)
        assert mistype(text, 1.0, key).strip()
    assert len({delete_words(text, 1.0, key) for key in keys(20)}) > 1


@pytest.mark.parametrize("rate", [0.02, 0.15, 0.5])
def test_as_many_words_go_as_was_asked(rate: float) -> None:
    left = sum(len(words(delete_words(WORDS, rate, key))) for key in keys(50))
    assert within(1 - left / 20_000, rate, 20_000)


@pytest.mark.parametrize("rate", [0.02, 0.15, 0.5])
def test_as_many_words_are_swapped_as_was_asked(rate: float) -> None:
    before, first = words(WORDS), Counter()
    total = 0
    for key in keys(200):
        after = words(swap_words(WORDS, rate, key))
        assert sorted(after) == sorted(before)
        begins = [place for place in range(399) if after[place] == before[place + 1]]
        assert all(after[place + 1] == before[place] for place in begins)
        assert sum(a != b for a, b in zip(after, before, strict=True)) == 2 * len(begins)
        total += len(begins)
        first.update(begins)
    # pairs exclude each other, which makes their number vary less than independent draws
    assert within(total / (200 * 399), rate, 200 * 399)
    assert within(first[0] / 200, rate, 200)


def test_swaps_leave_white_space_where_it_is() -> None:
    for key in keys(10):
        after = swap_words("one  two\tthree\n", 0.5, key)
        assert [gap for gap, _ in pieces(after)[0]] == ["", "  ", "\t"]
        assert after.endswith("\n")


@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_as_many_characters_are_mistyped_as_was_asked(rate: float) -> None:
    """Letters that are all different, far apart from each other: what became of each is seen."""
    alphabet = [chr(0x4E00 + 7 * n) for n in range(500)]
    text = " ".join("".join(alphabet[n : n + 5]) for n in range(0, 500, 5))
    counts: Counter[str] = Counter()
    for key in keys(40):
        after = mistype(text, rate, key)
        assert after.count(" ") == text.count(" ")
        for before, now in zip(text.split(), after.split(" "), strict=True):
            counts["same" if before == now else "changed"] += 1
    assert within(counts["changed"] / 4000, 1 - (1 - rate) ** 5, 4000)


def test_all_four_ways_of_mistyping_occur() -> None:
    found: Counter[str] = Counter()
    for key in keys(2000):
        after = mistype("abcdefgh", 0.05, key)
        if len(after) == 7:
            found["dropped"] += 1
        elif len(after) == 9:
            found["doubled"] += 1
        elif sorted(after) == list("abcdefgh") and after != "abcdefgh":
            found["swapped"] += 1
        elif after != "abcdefgh":
            found["replaced"] += 1
    assert min(found[kind] for kind in ("dropped", "doubled", "swapped", "replaced")) > 60
    assert mistype("TypE", 1.0, keys(1)[0]).isascii()


def test_numbers_and_addresses_are_words_like_others() -> None:
    changed = [mistype("call 1234 http://a.org", 0.3, key) for key in keys(50)]
    assert any("1234" not in text for text in changed)
    assert any("http://a.org" not in text for text in changed)


def test_synonyms_keep_case_and_punctuation() -> None:
    lexicon = Lexicon([["film", "movie", "motion picture"], ["很好", "优秀"], ["好", "佳"]])
    seen = set()
    for key in keys(60):
        after = replace_words('(Film), FILM and "film" films.', 1.0, lexicon, key)
        one, two, rest = after.split(", ")[0], after.split(", ")[1].split(" and ")[0], after.split(" and ")[1]
        assert one in ("(Movie)", "(Motion picture)")
        assert two in ("MOVIE", "MOTION PICTURE")
        assert rest in ('"movie" films.', '"motion picture" films.')
        seen.add((one, two))
    assert len(seen) == 4
    # the longest entry is the word
    assert replace_words("这很好。好人", 1.0, lexicon, keys(1)[0]) == "这优秀。佳人"


def test_as_many_words_become_synonyms_as_was_asked() -> None:
    lexicon = Lexicon([["river", "stream"]])
    text = "the river is " * 300
    after = "".join(replace_words(text, 0.2, lexicon, key) for key in keys(20))
    assert within(after.count("stream") / 6000, 0.2, 6000)
    assert after.count("stream") + after.count("river") == 6000


def test_other_keys_give_other_changes() -> None:
    noise = Noise(delete=0.2, typos=0.1)
    assert len({noise(LATIN, key) for key in range(20)}) == 20


def test_a_lexicon_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# films\nfilm\tmovie\n\nGood, fine ,  great\nfine, thin\n")
    lexicon = Lexicon.read(path)
    assert lexicon.synonyms("FILM") == ("movie",)
    assert lexicon.synonyms("fine") == ("Good", "great", "thin")
    assert lexicon.synonyms("unknown") == ()
    assert (len(lexicon), lexicon.num_groups, lexicon.longest) == (6, 3, 5)
    path.write_text("film\tmovie\n")
    assert Lexicon.read(path).digest != lexicon.digest


def test_a_lexicon_from_wordnet(tmp_path: Path) -> None:
    licence = "  1 This software and database is being provided to you\n"
    noun = "06613686 10 n 03 movie 0 film 0 motion_picture 0 002 @ 06619428 n 0000 ~ 06612678 n 0000 | a form of art\n"
    adjective = "00217728 00 a 02 fond(p) 0 0warm 0 001 & 00217728 a 0000 | liking\n"
    (tmp_path / "data.noun").write_text(licence + noun)
    (tmp_path / "data.adj").write_text(licence + adjective)
    lexicon = Lexicon.read(tmp_path)
    assert lexicon.synonyms("film") == ("movie", "motion picture")
    assert lexicon.synonyms("0warm") == ("fond",)
    (tmp_path / "data.adj").write_text("no such line\n")
    with pytest.raises(DataError, match=r"data\.adj:1 is no line of a WordNet data file"):
        Lexicon.read(tmp_path)


def test_lexicons_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Lexicon.read(tmp_path / "missing")
    with pytest.raises(DataError, match=r"none of WordNet's files \(data\.noun"):
        Lexicon.read(tmp_path)
    (tmp_path / "one").write_text("alone\n")
    with pytest.raises(DataError, match="no group of two words"):
        Lexicon.read(tmp_path / "one")
