"""One text in two tokenizers: where the teacher is compared, it has read exactly what the student has read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.errors import ConfigError
from trainer.teacher.align import gather_places
from trainer.teacher.pieces import NotPiecesError, pieces_of
from trainer.teacher.prompts import IGNORED
from trainer.teacher.retokenise import (
    TEACHER_ATTENTION_MASK,
    TEACHER_INPUT_IDS,
    TEACHER_PLACE,
    TEACHER_POSITION_IDS,
    Retokeniser,
)

END = "<|endoftext|>"
TEXTS = [
    "the people walked on the moon, and returned to the people",
    "thé höhle kostet 5 € – 日本語 🙂",
    "a  b\n\n\tc",
] * 5


@cache
def byte_level(vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def sentencepiece() -> Tokenizer:
    """As Llama's: a space before each text, letters that are not known as bytes, a token at the beginning."""
    words = ["▁the", "▁people", "▁moon", "▁wal", "ked"]
    merges: list[tuple[str, str]] = []
    for word in words:
        merges.extend((word[:size], word[size]) for size in range(1, len(word)))
    specials = ["<unk>", "<s>", "</s>"]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz, "))
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE({token: index for index, token in enumerate(dict.fromkeys(tokens))}, list(dict.fromkeys(merges)),
            unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@dataclass(frozen=True)
class Pair:
    name: str
    student: Tokenizer
    teacher: Tokenizer
    teacher_end: str = END
    student_end: str = END


PAIRS = [
    Pair("coarser", byte_level(280), byte_level(340)),
    Pair("finer", byte_level(340), byte_level(280)),
    Pair("equal", byte_level(320), byte_level(320)),
    Pair("to-sentencepiece", byte_level(320), sentencepiece(), teacher_end="</s>"),
    Pair("from-sentencepiece", sentencepiece(), byte_level(320), student_end="</s>"),
    Pair("both-sentencepiece", sentencepiece(), sentencepiece(), "</s>", "</s>"),
]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: pair.name)
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.param
    return found


def save(tokenizer: Tokenizer, end: str, folder: Path) -> Path:
    names = {"eos_token": end} | ({"bos_token": "<s>"} if end == "</s>" else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizers")

    @cache
    def make(name: str, boundaries: str, longest: int | None = None) -> Retokeniser:
        pair = next(pair for pair in PAIRS if pair.name == name)
        student = save(pair.student, pair.student_end, folder / f"{name}-student")
        teacher = save(pair.teacher, pair.teacher_end, folder / f"{name}-teacher")
        eos_id = pair.student.token_to_id(pair.student_end)
        return Retokeniser(student, str(teacher), boundaries=boundaries, eos_id=eos_id, longest=longest)  # type: ignore[arg-type]

    return make


def tokens_of(pair: Pair, texts: list[str]) -> list[int]:
    end = pair.student.token_to_id(pair.student_end)
    return [
        id_ for text in texts for id_ in [*pair.student.encode(text, add_special_tokens=False).ids, end]
    ]  # fmt: skip


def documents(tokenizer: Tokenizer, ids: list[int], end: str) -> list[bytes]:
    """What has been read, by document."""
    pieces = pieces_of(tokenizer)
    result = [b""]
    for id_ in ids:
        if id_ == tokenizer.token_to_id(end):
            result.append(b"")
        else:
            result[-1] += pieces.spelled.get(id_, b"")
    return result


def texts_of(student: list[bytes], teacher: list[bytes], pair: Pair, alone: bool) -> tuple[list[bytes], list[bytes]]:
    """Without the spaces that the tokenizers put first, and without the rest of a letter that the sample cut."""
    prefixes = [pieces_of(tokenizer).prefix for tokenizer in (pair.student, pair.teacher)]
    cut = student[0]
    while cut and cut[0] & 0xC0 == 0x80:
        cut = cut[1:]
    # a space of the text is the one that the teacher's tokenizer puts first, if more text follows
    first = teacher[0] if cut.startswith(b" ") and not alone else teacher[0].removeprefix(prefixes[1])
    return (
        [cut, *(text.removeprefix(prefixes[0]) for text in student[1:])],
        [first, *(text.removeprefix(prefixes[1]) for text in teacher[1:])],
    )


text = st.text(st.sampled_from("the people walked é€日🙂\n ,0"), max_size=30)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_where_they_are_compared_both_have_read_the_same(pair: Pair, made, data: st.DataObject) -> None:
    whole = tokens_of(pair, data.draw(st.lists(text, min_size=1, max_size=4)))
    begin = data.draw(st.integers(0, len(whole) - 1))
    window = whole[begin : data.draw(st.integers(begin + 1, len(whole)))]
    found = made(pair.name, "join").annotate(np.zeros(1), {"input_ids": np.array([window])})
    ids, places = found[TEACHER_INPUT_IDS][0].tolist(), found[TEACHER_PLACE][0].tolist()
    assert len(ids) % 64 == 0
    alone = documents(pair.student, window, pair.student_end)[0].decode(errors="ignore") == " "
    for place in range(len(window)):
        if places[place] < 0:
            continue
        student = documents(pair.student, window[: place + 1], pair.student_end)
        teacher = documents(pair.teacher, ids[: places[place] + 1], pair.teacher_end)
        read, understood = texts_of(student, teacher, pair, alone)
        assert read == understood
    # every end of a document is a place where both have read the same
    end = pair.student.token_to_id(pair.student_end)
    assert all(place >= 0 for id_, place in zip(window, places, strict=True) if id_ == end)
    assert sorted(place for place in places if place >= 0) == [place for place in places if place >= 0]
    count = int(found[TEACHER_ATTENTION_MASK].sum())
    assert max(places, default=-1) < max(count, 1)


@pytest.mark.parametrize("boundaries", ["join", "positions", "block"])
def test_equal_tokenizers_give_what_was_there(made, boundaries: str) -> None:
    pair = next(pair for pair in PAIRS if pair.name == "equal")
    texts = ["the people walked", "5 € – 🙂", "", " the moon\n"]
    window = tokens_of(pair, texts)
    length = len(window)
    found = made("equal", boundaries).annotate(np.zeros(1), {"input_ids": np.array([window])})
    assert found[TEACHER_INPUT_IDS][0, :length].tolist() == window
    assert found[TEACHER_PLACE][0].tolist() == list(range(length))
    assert (TEACHER_ATTENTION_MASK in found) == (boundaries != "block")
    assert (TEACHER_POSITION_IDS in found) == (boundaries != "join")
    if boundaries != "block":
        assert found[TEACHER_ATTENTION_MASK][0].tolist() == [1] * length + [0] * (64 - length)
    if boundaries != "join":
        sizes = [len(tokens_of(pair, [text])) for text in texts] + [64 - length]
        assert found[TEACHER_POSITION_IDS][0].tolist() == [place for size in sizes for place in range(size)]


def test_an_example_by_hand(made) -> None:
    """Llama's tokenizer puts <s> and a space before each document, and bytes for letters that it does not know."""
    pair = next(pair for pair in PAIRS if pair.name == "to-sentencepiece")
    window = tokens_of(pair, ["the é", "b"])
    assert [pair.student.id_to_token(id_) for id_ in window] == ["the", "Ġ", "Ã©", END, "b", END]
    found = made("to-sentencepiece", "join").annotate(np.zeros(1), {"input_ids": np.array([window])})
    ids = found[TEACHER_INPUT_IDS][0][found[TEACHER_ATTENTION_MASK][0] == 1]
    read = [pair.teacher.id_to_token(id_) for id_ in ids.tolist()]
    assert read == ["<s>", "▁the", "▁", "<0xC3>", "<0xA9>", "</s>", "<s>", "▁", "b", "</s>", "<s>"]
    assert found[TEACHER_PLACE][0].tolist() == [1, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("name", "read", "places"),
    [
        ("both-sentencepiece", ["<s>", "▁", "a", "</s>", "<s>", "▁", "b", "</s>", "<s>"], [1, 2, 4, 5, 6, 8]),
        # what a space before a document stands for in the student, the end of the one before does in the teacher
        ("from-sentencepiece", ["Ġ", "a", END, "b", END], [0, 1, 2, 2, 3, 4]),
    ],
)
def test_a_space_before_each_document_is_no_text(made, name: str, read: list[str], places: list[int]) -> None:
    pair = next(pair for pair in PAIRS if pair.name == name)
    window = tokens_of(pair, ["a", "b"])
    assert [pair.student.id_to_token(id_) for id_ in window] == ["▁", "a", "</s>", "▁", "b", "</s>"]
    found = made(name, "join").annotate(np.zeros(1), {"input_ids": np.array([window])})
    ids = found[TEACHER_INPUT_IDS][0][found[TEACHER_ATTENTION_MASK][0] == 1]
    assert [pair.teacher.id_to_token(id_) for id_ in ids.tolist()] == read
    assert found[TEACHER_PLACE][0].tolist() == places


def test_a_letter_that_the_sample_cuts(made) -> None:
    """Its bytes are not shown to the teacher, and nothing is compared within it."""
    pair = next(pair for pair in PAIRS if pair.name == "coarser")
    euro = [pair.student.token_to_id(letter) for letter in ("ä", "Ĥ", "¬")]  # E4 82 AC
    the = pair.student.encode("the").ids
    window = [*euro[1:], *the, *euro[:2]]
    found = made("coarser", "join").annotate(np.zeros(1), {"input_ids": np.array([window])})
    count = int(found[TEACHER_ATTENTION_MASK].sum())
    assert found[TEACHER_INPUT_IDS][0, :count].tolist() == pair.teacher.encode("the").ids
    assert found[TEACHER_PLACE][0].tolist()[:2] == [-1, -1]
    assert found[TEACHER_PLACE][0].tolist()[-3:] == [count - 1, -1, -1]


def test_what_is_not_predicted_has_no_place(made) -> None:
    pair = next(pair for pair in PAIRS if pair.name == "coarser")
    window = np.array([tokens_of(pair, ["the people", "walked on"])] * 3)
    labels = window.copy()
    labels[0, 2] = IGNORED
    labels[1, 4:] = IGNORED
    labels[2] = IGNORED
    retokeniser = made("coarser", "block")
    all_of_it = retokeniser.annotate(np.zeros(3), {"input_ids": window})
    found = retokeniser.annotate(np.zeros(3), {"input_ids": window, "labels": labels})
    assert found[TEACHER_PLACE][0, 2] == -1
    assert np.delete(found[TEACHER_PLACE][0], 2).tolist() == np.delete(all_of_it[TEACHER_PLACE][0], 2).tolist()
    assert (found[TEACHER_PLACE][1, 4:] == -1).all()
    assert (found[TEACHER_PLACE][2] == -1).all()
    assert 0 < retokeniser.compared < 1


def test_no_further_than_the_teachers_positions(tmp_path: Path) -> None:
    pair = next(pair for pair in PAIRS if pair.name == "finer")
    student, teacher = save(pair.student, END, tmp_path / "student"), save(pair.teacher, END, tmp_path / "teacher")
    retokeniser = Retokeniser(student, teacher, boundaries="join", eos_id=0, longest=5)
    window = np.array([tokens_of(pair, ["the people walked on the moon"])])
    found = retokeniser.annotate(np.zeros(1), {"input_ids": window})
    assert found[TEACHER_INPUT_IDS].shape == (1, 5)
    assert 0 <= found[TEACHER_PLACE].max() < 5
    assert found[TEACHER_PLACE][0, -1] == -1


def test_tokenizers_that_are_no_pieces_of_text_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(NotPiecesError):
        pieces_of(words)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]").save_pretrained(str(tmp_path / "words"))
    student = save(byte_level(280), END, tmp_path / "student")
    with pytest.raises(ConfigError, match=r"distill.vocabulary: uld cannot compare with the tokenizer of .*words"):
        Retokeniser(student, tmp_path / "words", boundaries="join", eos_id=0)
    with pytest.raises(ConfigError, match=r"distill.teacher.pretrained: .*cannot be loaded"):
        Retokeniser(student, tmp_path / "nothing", boundaries="join", eos_id=0)


def test_states_are_gathered_where_they_are_compared() -> None:
    hidden = torch.arange(2 * 4 * 3, dtype=torch.bfloat16).view(2, 4, 3)
    place = torch.tensor([[0, -1, 3], [-1, 2, 2]])
    found = gather_places(hidden, place)
    assert found.dtype == torch.bfloat16
    assert found.shape == (2, 3, 3)
    for row in range(2):
        for column in range(3):
            index = int(place[row, column])
            expected = torch.zeros(3, dtype=hidden.dtype) if index < 0 else hidden[row, index]
            assert torch.equal(found[row, column], expected)
