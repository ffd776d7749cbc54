"""Tags of words, questions about texts, texts that become others: where spans are in tokens, windows, targets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from trainer.config.objective import ObjectiveConfig
from trainer.data.encode import answer_tokens, entity_marks, touched, word_marks
from trainer.data.order import Order
from trainer.data.questions import QuestionSamples
from trainer.data.report import table
from trainer.data.samples import IGNORED
from trainer.data.sequences import SequenceSamples
from trainer.data.stream import Stream, evaluation_batches
from trainer.data.tagged import TaggedSamples
from trainer.errors import DataError

TEXT = "the film is a very good long bad dull story of two rivers and one house né, x1"
WORDS = TEXT.split()
TAGS = ("O", "B-A", "I-A")


def some(seed: int, count: int) -> list[str]:
    return [str(word) for word in np.random.default_rng(seed).choice(WORDS, count)]


def tagged_rows(count: int) -> list[dict[str, Any]]:
    result = []
    for n in range(count):
        words = [*some(n, 1 + n % 17), str(n)]
        result.append({"words": words, "tags": [TAGS[(n + place) % 3] for place in range(len(words))]})
    return result


# ------------------------------------------------------------------------------------- spans, against brute force


@st.composite
def tokenised(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[int]]:
    """(length of a text, places of its tokens in ascending order, word of each token)."""
    places, words, at, word = [], [], 0, 0
    for _ in range(draw(st.integers(0, 12))):
        gap = draw(st.integers(0, 2))
        word += gap > 0 or draw(st.booleans())
        begin = at + gap
        at = begin + draw(st.integers(1, 3))
        places.append((begin, at))
        words.append(word)
    return at + draw(st.integers(0, 2)), places, words


@given(tokenised(), st.integers(0, 30), st.integers(1, 8))
def test_tokens_of_a_span(found: tuple[int, list[tuple[int, int]], list[int]], begin: int, length: int) -> None:
    _, places, _ = found
    characters = set(range(begin, begin + length))
    expected = [bool(characters & set(range(a, b))) for a, b in places]
    assert touched(places, begin, begin + length).tolist() == expected
    tokens = [token for token, inside in enumerate(expected) if inside]
    assert answer_tokens(places, begin, begin + length) == ((tokens[0], tokens[-1]) if tokens else (-1, -1))


@given(tokenised(), st.data())
def test_tags_of_words_stand_at_their_first_tokens(
    found: tuple[int, list[tuple[int, int]], list[int]], data: st.DataObject
) -> None:
    length, places, _ = found
    cuts = sorted(data.draw(st.sets(st.integers(0, length), max_size=8)))
    spans = [(a, b, n) for n, (a, b) in enumerate(zip(cuts[::2], cuts[1::2], strict=False))]
    expected = [IGNORED] * len(places)
    for begin, end, number in spans:
        first = next((t for t, (a, b) in enumerate(places) if set(range(a, b)) & set(range(begin, end))), None)
        if first is not None and expected[first] == IGNORED:
            expected[first] = number
    assert word_marks(places, spans).tolist() == expected


@given(tokenised(), st.data())
def test_tags_of_entities(found: tuple[int, list[tuple[int, int]], list[int]], data: st.DataObject) -> None:
    length, places, words = found
    cuts = sorted(data.draw(st.sets(st.integers(0, length), max_size=8)))
    spans = [(a, b, 10 * n + 1, 10 * n + 2) for n, (a, b) in enumerate(zip(cuts[::2], cuts[1::2], strict=False))]
    expected, begun = [IGNORED] * len(places), set()
    for word in sorted(set(words)):
        own = [token for token, number in enumerate(words) if number == word]
        characters = set(range(places[own[0]][0], places[own[-1]][1]))
        hit = next((s for s in spans if characters & set(range(s[0], s[1]))), None)
        expected[own[0]] = 0 if hit is None else hit[3] if hit in begun else hit[2]
        begun.add(hit)
    assert entity_marks(places, words, spans, 0).tolist() == expected


# ------------------------------------------------------------------------------------------------- classes of words


def tagged(prepared: Any, split: Any = "train", length: int = 16) -> TaggedSamples:
    samples = prepared.samples(split, length, "positions")
    assert isinstance(samples, TaggedSamples)
    return samples


def test_tags_stand_at_the_first_token_of_each_word(prepare_rows: Any, word_pieces: Path) -> None:
    rows = tagged_rows(60)
    prepared = prepare_rows("token_classification", word_pieces, rows, column="words", label="tags")
    assert prepared.classes.names == ("B-A", "I-A", "O")
    reference: Any = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    seen = 0
    for split in ("train", "held_out"):
        samples = tagged(prepared, split, 64)
        arrays = samples.fetch(np.arange(len(samples)))
        for sample in range(len(samples)):
            name = samples.describe(sample)[0][1]
            row = rows[int(name.split(":")[1].split(" ")[0]) - 1]
            expected = reference(row["words"], is_split_into_words=True, padding="max_length", max_length=64)
            assert arrays["input_ids"][sample].tolist() == expected["input_ids"]
            words, labels = expected.word_ids(), []
            for place, word in enumerate(words):
                is_first = word is not None and word != words[place - 1]
                labels.append(prepared.classes.names.index(row["tags"][word]) if is_first else IGNORED)
            assert arrays["labels"][sample].tolist() == labels
            assert samples.num_targets(np.array([sample])) == len(row["words"])
            shown = [each.rsplit("/", 1)[1] for each in name.split(" (", 1)[1].removesuffix(")").split(" ")]
            assert shown == row["tags"]
            seen += 1
    assert seen == 60
    total = tagged(prepared, "train", 64).class_counts() + tagged(prepared, "held_out", 64).class_counts()
    assert total.sum() == sum(len(row["words"]) for row in rows)
    report = prepared.report_at(64)
    counts = np.array([report["sources"][0][split]["classes"] for split in ("train", "held_out")])
    assert counts.sum(axis=0).tolist() == total.tolist()


def test_spans_of_characters_become_tags(prepare_rows: Any, word_pieces: Path) -> None:
    rows = []
    for n in range(30):
        text = f"{n} the film of one house, xy is good"
        begin = text.index("one")
        rows.append({"text": text, "spans": [{"start": begin, "end": begin + 9, "label": "PLACE"}] if n % 2 else []})
    prepared = prepare_rows("token_classification", word_pieces, rows, label="spans")
    assert prepared.classes.names == ("B-PLACE", "I-PLACE", "O")
    samples = tagged(prepared, length=32)
    tokenizer: Any = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    arrays = samples.fetch(np.arange(len(samples)))
    for sample in range(len(samples)):
        row = rows[int(samples.describe(sample)[0][1].split(":")[1].split(" ")[0]) - 1]
        named = [(tokenizer.convert_ids_to_tokens(int(token)), prepared.classes.names[label])
                 for token, label in zip(arrays["input_ids"][sample], arrays["labels"][sample], strict=True)
                 if label != IGNORED]  # fmt: skip
        entity = [(word, tag) for word, tag in named if tag != "O"]
        assert entity == ([("one", "B-PLACE"), ("house", "I-PLACE")] if row["spans"] else [])
        assert [word for word, _ in named][1:] == ["the", "film", "of", "one", "house", ",", "x", "is", "good"]


def test_windows_of_tagged_texts(prepare_rows: Any, word_pieces: Path) -> None:
    rows = tagged_rows(40)
    prepared = prepare_rows(
        "token_classification", word_pieces, rows, column="words", label="tags", too_long="window", stride=2
    )
    samples, whole = tagged(prepared, length=8), tagged(prepared, length=100)
    assert len(samples) > len(whole)
    labels = samples.fetch(np.arange(len(samples)))["labels"]
    every = whole.fetch(np.arange(len(whole)))["labels"]
    joined: dict[int, list[int]] = {}
    for sample, document in enumerate(samples.document_of(np.arange(len(samples))).tolist()):
        own = labels[sample, 1:7].tolist()
        if document not in joined:
            joined[document] = own
        else:
            # of the tokens that both hold, the former has labels at one half and the latter at the other
            shared = list(zip(joined[document][-2:], own[:2], strict=True))
            assert shared[0][1] == shared[1][0] == IGNORED
            joined[document] = [*joined[document][:-2], *map(max, shared), *own[2:]]
    for document in range(len(whole)):
        expected = every[document, 1:].tolist()
        assert joined[document] == expected[: len(joined[document])]
        assert set(expected[len(joined[document]) :]) <= {IGNORED}
    assert samples.num_targets(np.arange(len(samples))) == whole.class_counts().sum()
    order = Order(3, samples.sizes, samples.weights)
    objective = ObjectiveConfig(kind="token_classification")
    for ranks, micro in ((1, 4), (2, 2)):
        stream = Stream(samples, order, batch=4, micro=micro, rank=0, ranks=ranks, objective=objective, seed=3,
                        prefetch=0)  # fmt: skip
        batch = stream.read(2)
        assert batch.num_targets == (samples.fetch(order.batch(2, 4))["labels"] >= 0).sum()
        assert all(arrays["labels"].shape == arrays["input_ids"].shape for arrays in batch.micro_batches)


WRONG_TAGS: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"text": ["a", "b"], "t": ["O"]}, r"column 'text' holds 2 words, and column 't' 1 tags"),
    "no tags": ({"text": ["a", "b"], "t": None}, r"holds 2 words, and column 't' NoneType, no list of tags"),
    "no word": ({"text": ["a", ""], "t": ["O", "O"]}, r"column 'text' holds '' among its words"),
    "no tag": ({"text": ["a"], "t": [None]}, r"column 't' holds None among its tags"),
    "beyond": ({"text": "one", "t": [{"start": 1, "end": 9, "label": "A"}]}, r"span 1…9 of a text of 3 characters"),
    "overlap": (
        {"text": "one two", "t": [{"start": 0, "end": 5, "label": "A"}, {"start": 4, "end": 7, "label": "B"}]},
        r"the spans 0…5 and 4…7, which overlap",
    ),
    "neither": ({"text": "one", "t": ["O"]}, r"neither a list of tags beside a list of words nor one of spans"),
}


@pytest.mark.parametrize(("row", "problem"), WRONG_TAGS.values(), ids=WRONG_TAGS)
def test_wrong_tags_are_one_sentence(prepare_rows: Any, word_pieces: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as raised:
        prepare_rows("token_classification", word_pieces, [row], label="t")
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("rows-0.jsonl:1: ")


# ------------------------------------------------------------------------------------------------------- questions


def question_rows(count: int) -> list[dict[str, Any]]:
    result = []
    for n in range(count):
        words = [*some(n, 2 + n % 40), str(n)]
        at = n % len(words)
        begin = len(" ".join([*words[:at], ""]))
        answer = " ".join(words[at : at + 2])
        answers = {"text": [answer, words[at]], "answer_start": [begin, begin]}
        if n % 5 == 0:
            answers = {"text": [], "answer_start": []}
        result.append({"context": " ".join(words), "question": "Where is " + " ".join(some(n, n % 4)), "a": answers})
    return result


def questions(prepared: Any, split: Any = "train", length: int = 24) -> QuestionSamples:
    samples = prepared.samples(split, length, "positions")
    assert isinstance(samples, QuestionSamples)
    return samples


def squad(prepare_rows: Any, tokenizer: Path, rows: Any, **options: Any) -> Any:
    return prepare_rows(
        "question_answering", tokenizer, rows, column="context", prompt="question", answer="a", **options
    )


def test_windows_of_questions_are_what_transformers_makes(prepare_rows: Any, word_pieces: Path) -> None:
    rows = question_rows(40)
    prepared = squad(prepare_rows, word_pieces, rows, too_long="window", stride=4)
    assert prepared.classes.names == ()
    reference: Any = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    samples = questions(prepared)
    arrays = samples.fetch(np.arange(len(samples)))
    columns = samples.columns(np.arange(len(samples)))
    documents = samples.document_of(np.arange(len(samples)))
    names = samples.sources[0]
    reached, sample = 0, 0
    for document in range(len(names.offsets) - 1):
        row = rows[int(names.document_name(document).split(":")[1]) - 1]
        expected = reference(
            row["question"], row["context"], truncation="only_second", max_length=24, stride=4, padding="max_length",
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        hit = False
        for window in range(len(expected["input_ids"])):
            assert documents[sample] == document
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                assert arrays[name][sample].tolist() == expected[name][window]
            sequence, places = expected.sequence_ids(window), expected["offset_mapping"][window]
            context = [column for column, number in enumerate(sequence) if number == 1]
            assert columns[sample].tolist() == [context[0], context[-1] + 1]
            label = [0, 0]
            if row["a"]["text"]:
                begin, text = row["a"]["answer_start"][0], row["a"]["text"][0]
                starts = [c for c in context if places[c][0] == begin]
                ends = [c for c in context if places[c][1] == begin + len(text)]
                if starts and ends:
                    label, hit = [starts[0], ends[0]], True
                    assert samples.passage(sample, *label) == text
            assert arrays["labels"][sample].tolist() == label
            assert samples.answers_of(sample) == tuple(row["a"]["text"])
            sample += 1
        reached += bool(row["a"]["text"]) and not hit
    assert sample == len(samples)
    assert samples.num_unreached == reached
    assert samples.passage(0, 0, 1) == ""
    assert samples.num_targets(np.arange(3)) == 3
    cut = questions(squad(prepare_rows, word_pieces, rows))
    report = squad(prepare_rows, word_pieces, rows).report_at(24)
    assert report["unreached"]["train"] == cut.num_unreached > reached
    shown = io.StringIO()
    Console(file=shown, width=150).print(table(report))
    assert "answers that no sample holds" in shown.getvalue()


def test_an_answer_may_be_a_passage_or_nothing(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [
        {"context": f"{n} The Film is né", "question": "what is good?", "a": "né" if n % 2 else ""} for n in range(20)
    ]
    samples = questions(squad(prepare_rows, word_pieces, rows))
    labels = samples.fetch(np.arange(len(samples)))["labels"]
    for sample, (first, last) in enumerate(labels.tolist()):
        row = rows[int(samples.describe(sample)[0][1].split(":")[1].split(" ")[0]) - 1]
        # as it is written, though the tokenizer lowers it
        assert samples.passage(sample, first, last) == row["a"]
        begin, end = samples.columns(np.array([sample]))[0].tolist()
        assert samples.passage(sample, begin, end - 1) == row["context"]
        assert samples.answers_of(sample) == ((row["a"],) if row["a"] else ())
    held_out = questions(squad(prepare_rows, word_pieces, rows), "held_out")
    objective = ObjectiveConfig(kind="question_answering")
    found = np.concatenate([arrays["labels"] for rank in range(2)
                            for arrays in evaluation_batches(held_out, micro=2, rank=rank, ranks=2, max_samples=None,
                                                             objective=objective, seed=0)])  # fmt: skip
    assert (found[:, 0] != IGNORED).sum() == len(held_out)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("long", r"rows-0\.jsonl:1: the answer 'long' does not stand in the text"),
        ({"text": ["film"], "answer_start": [1]}, "the answer 'film' does not stand in the text where it is said to"),
        ({"text": ["film"], "answer_start": []}, "column 'a' holds 1 answers and 0 places"),
        (3, r"column 'a' holds neither \{text, answer_start\} nor a passage"),
    ],
)
def test_wrong_answers_are_one_sentence(prepare_rows: Any, word_pieces: Path, answer: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as raised:
        squad(prepare_rows, word_pieces, [{"context": "the film is good", "question": "what?", "a": answer}])
    assert "\n" not in str(raised.value)


# ----------------------------------------------------------------------------------------- texts that become others


def test_sources_and_targets(prepare_rows: Any, word_pieces: Path) -> None:
    rows = [
        {"en": " ".join([str(n), *some(n, 1 + n % 20)]), "it": " ".join(some(n + 50, 1 + n % 13))} for n in range(40)
    ]
    prepared = prepare_rows("seq2seq", word_pieces, rows, prompt="en", answer="it")
    assert prepared.classes is None
    assert prepared.pad_id == 0
    reference: Any = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    for start in (None, 4):
        samples = prepared.samples("train", 16, "positions", decoder_start=start)
        assert isinstance(samples, SequenceSamples)
        arrays = samples.fetch(np.arange(len(samples)))
        for sample in range(len(samples)):
            row = rows[int(samples.describe(sample)[0][1].split(":")[1].split(" ")[0]) - 1]
            own = reference(row["en"], truncation=True, max_length=16, padding="max_length")
            assert arrays["input_ids"][sample].tolist() == own["input_ids"]
            target = reference(row["it"], truncation=True, max_length=16)["input_ids"]
            assert arrays["labels"][sample].tolist() == target + [IGNORED] * (16 - len(target))
            inputs = [start or 0, *target[:-1]]
            assert arrays["decoder_input_ids"][sample].tolist()[: len(target)] == inputs
            assert (arrays["decoder_input_ids"][sample][len(target) + 1 :] == 0).all()
            assert samples.num_targets(np.array([sample])) == len(target)
    order = Order(1, samples.sizes, samples.weights)
    objective = ObjectiveConfig(kind="seq2seq")
    options = {"batch": 4, "micro": 2, "rank": 0, "ranks": 1, "prefetch": 0, "alike": False}
    batch = Stream(samples, order, objective=objective, seed=1, **options).read(1)
    whole = samples.fetch(order.batch(1, 4))
    assert batch.num_targets == (whole["labels"] >= 0).sum()
    for number, arrays in enumerate(batch.micro_batches):
        longest = (whole["labels"][2 * number : 2 * number + 2] >= 0).sum(axis=1).max()
        columns = -(-longest // 8) * 8
        assert arrays["labels"].shape == arrays["decoder_input_ids"].shape == (2, columns)
        assert np.array_equal(arrays["labels"], whole["labels"][2 * number : 2 * number + 2, :columns])
    long = sum(len(reference(row[side]).input_ids) > 16 for row in rows for side in ("en",))
    report = prepared.report_at(16)
    assert 0 < report["cut"]["train"] + report["cut"]["held_out"] <= long + 13
    left = prepare_rows("seq2seq", word_pieces, rows, prompt="en", answer="it", too_long="leave_out")
    assert len(left.samples("train", 16, "join")) == report["sources"][0]["train"]["documents"] - report["cut"]["train"]
    windows = prepare_rows("seq2seq", word_pieces, rows, prompt="en", answer="it", too_long="window")
    with pytest.raises(DataError, match=r"windows are not for objective\.kind seq2seq; use cut or leave_out"):
        windows.samples("train", 16, "join")


def test_targets_end_where_the_tokenizer_does_not_end_texts(
    prepare_rows: Any, word_pieces: Path, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(word_pieces)
    backend = Tokenizer.from_file(str(word_pieces / "tokenizer.json"))
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    backend.save(str(word_pieces / "tokenizer.json"))
    del tokenizer
    rows = [{"en": f"{n} one", "it": " ".join(some(n, 3 + n))} for n in range(30)]
    samples = prepare_rows("seq2seq", word_pieces, rows, prompt="en", answer="it").samples("train", 16, "join")
    labels = samples.fetch(np.arange(len(samples)))["labels"]
    last = (labels >= 0).sum(axis=1) - 1
    assert (labels[np.arange(len(labels)), last] == 3).all()
    assert (labels[:, 0] == 2).all()
    assert samples.num_targets(np.arange(len(samples))) == (labels >= 0).sum()
