"""Conversations: what is learned is what the assistant says, by characters; packed as any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.config.objective import ObjectiveConfig
from trainer.config.schema import DataConfig, SourceConfig, TokenizerConfig, TrainTokenizerConfig
from trainer.data.answers import AnswerSamples
from trainer.data.order import Order
from trainer.data.prepare import prepare
from trainer.data.samples import IGNORED
from trainer.data.stream import Stream
from trainer.data.tokenize import END_OF_TEXT
from trainer.errors import DataError

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the film keeps a river; naïve stone falls, 7 houses wait"
WORDS = TEXT.split()


def words(seed: int, count: int) -> str:
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, count))


def conversation(number: int) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
    for turn in range(1 + number % 3):
        turns.append({"role": "user", "content": f"{number} {words(number * 7 + turn, 3 + number % 5)}"})
        turns.append({"role": "assistant", "content": words(number * 11 + turn, 2 + number % 6)})
    return turns


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A byte-level tokenizer with a template as ChatML."""
    (tmp_path / "corpus.txt").write_text("\n".join(words(seed, 30) for seed in range(40)))
    config = DataConfig(
        sources=(SourceConfig(files=("corpus.txt",)),), held_out=0.0, prepared=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(train=TrainTokenizerConfig(vocabulary=330)),
    )  # fmt: skip
    prepared = prepare(config, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def reference(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Tokens of the whole text, and whether each stands for a character that the assistant says, the end included."""
    text, learned = "", ""
    for message in messages:
        head, body = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>"
        text += head + body + "\n"
        learned += "0" * len(head) + ("1" if message["role"] == "assistant" else "0") * len(body) + "0"
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], ["1" in learned[begin:end] for begin, end in encoding["offset_mapping"]]


def test_answers_are_learned_and_nothing_else(prepare_rows: Any, chat: Path) -> None:
    rows = [{"messages": conversation(n)} for n in range(40)]
    prepared = prepare_rows("causal", chat, rows, messages="messages")
    assert (prepared.kind, prepared.classes, prepared.pad_id) == ("causal", None, None)
    tokenizer: Any = AutoTokenizer.from_pretrained(chat)
    seen = 0
    for split in ("train", "held_out"):
        samples = prepared.samples(split, 16, "positions")
        assert isinstance(samples, AnswerSamples)
        (source,) = samples.sources
        ids, learned = [], []
        for document in range(len(source.offsets) - 1):
            row = int(source.document_name(document).split(":")[1]) - 1
            own, marks = reference(tokenizer, rows[row]["messages"])
            assert tokenizer.apply_chat_template(rows[row]["messages"])["input_ids"] == own
            assert source.offsets[document] == len(ids)
            ids, learned, seen = ids + own, learned + marks, seen + 1
        arrays = samples.fetch(np.arange(len(samples)))
        length = len(ids)
        assert arrays["input_ids"].ravel()[:length].tolist() == ids
        expected = [token if mark else IGNORED for token, mark in zip(ids, learned, strict=True)][1:]
        labels = arrays["labels"].ravel()
        assert labels[: length - 1].tolist() == expected
        assert (labels[length - 1 :] == IGNORED).all()
        for boundaries in ("join", "positions", "block"):
            other = prepared.samples(split, 16, boundaries)
            for sample in range(len(other)):
                one = np.array([sample])
                assert other.num_targets(one) == (other.fetch(one)["labels"] != IGNORED).sum()
            assert other.num_targets(np.arange(len(other))) == sum(learned)
    assert seen == 40


def test_one_turn_is_a_conversation(prepare_rows: Any, chat: Path) -> None:
    turns = [{"ask": words(n, 4) + str(n), "say": words(n + 99, 5)} for n in range(20)]
    as_messages = [
        {"m": [{"role": "user", "content": row["ask"]}, {"role": "assistant", "content": row["say"]}]} for row in turns
    ]
    one = prepare_rows("causal", chat, turns, prompt="ask", answer="say")
    other = prepare_rows("causal", chat, as_messages, messages="m")
    for split in ("train", "held_out"):
        mine, its = (each.samples(split, 16, "join").fetch(np.arange(3)) for each in (one, other))
        assert all(np.array_equal(mine[name], its[name]) for name in mine)


def test_without_a_template_the_answer_follows_in_a_line_of_its_own(prepare_rows: Any, chat: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(chat.parent / "bare")
    (chat.parent / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    rows = [{"ask": words(n, 4), "say": f"{n} {words(n + 99, 5)}"} for n in range(20)]
    prepared = prepare_rows("causal", chat.parent / "bare", rows, prompt="ask", answer="say")
    samples = prepared.samples("train", 16, "join")
    (source,) = samples.sources
    labels = samples.fetch(np.arange(len(samples)))["labels"].ravel()
    for document, (begin, end) in enumerate(zip(source.offsets[:-1], source.offsets[1:], strict=True)):
        row = rows[int(source.document_name(document).split(":")[1]) - 1]
        assert tokenizer.decode(source.tokens[begin:end]) == f"{row['ask']}\n{row['say']}<|im_end|>"
        own = labels[begin : end - 1] if begin == 0 else labels[begin - 1 : end - 1]
        assert tokenizer.decode(own[own != IGNORED]).strip() == f"{row['say']}<|im_end|>"


def test_a_tokenizer_that_is_trained_here_ends_answers_too(prepare_rows: Any, tmp_path: Path) -> None:
    rows = [{"ask": words(n, 4), "say": f"{n} {words(n + 99, 5)}"} for n in range(20)]
    tokenizer = TokenizerConfig(train=TrainTokenizerConfig(vocabulary=300))
    prepared = prepare_rows("causal", tokenizer, rows, prompt="ask", answer="say")
    samples = prepared.samples("train", 16, "block")
    labels = samples.fetch(np.arange(len(samples)))["labels"]
    assert (labels == prepared.eos_id).sum() == len(samples.sources[0].offsets) - 1
    assert AutoTokenizer.from_pretrained(prepared.tokenizer_path).eos_token == END_OF_TEXT


def test_plain_text_beside_conversations_is_learned_whole(prepare_rows: Any, chat: Path) -> None:
    text = [{"text": f"{words(n, 9)} <|im_end|>"} for n in range(20)]
    sources = [([{"m": conversation(n)} for n in range(20)], {"messages": "m"}), (text, {})]
    prepared = prepare_rows("causal", chat, sources)
    source = prepared.samples("train", 16, "join").sources[1]
    assert (source.tokens[source.offsets[1:] - 1] == prepared.eos_id).all()
    # what plain text spells is text
    assert (source.tokens == prepared.eos_id).sum() == len(source.offsets) - 1
    samples = prepared.samples("train", 16, "join")
    of_text = np.arange(samples.sizes[0], len(samples))
    assert samples.num_targets(of_text) == len(source.tokens) - (len(source.offsets) - 1)


def test_ranks_and_places_do_not_change_the_samples(prepare_rows: Any, chat: Path) -> None:
    prepared = prepare_rows("causal", chat, [{"m": conversation(n)} for n in range(40)], messages="m")
    samples = prepared.samples("train", 16, "positions")
    order = Order(1, samples.sizes, samples.weights)

    def labels(ranks: int, micro: int, start: int) -> list[Any]:
        streams = [Stream(samples, order, batch=8, micro=micro, rank=rank, ranks=ranks, objective=ObjectiveConfig(),
                          seed=1, prefetch=0, next_batch=start) for rank in range(ranks)]  # fmt: skip
        result = []
        for _ in range(start, 6):
            batches = [next(stream) for stream in streams]
            together = np.concatenate([a["labels"] for step in zip(*(b.micro_batches for b in batches), strict=True)
                                       for a in step])  # fmt: skip
            assert batches[0].num_targets == (together != IGNORED).sum()
            result.append(together.tolist())
        return result

    whole = labels(1, 8, 0)
    assert labels(2, 2, 0) == whole
    assert labels(4, 1, 3) == whole[3:]


def test_repairs_keep_answers_in_their_place(prepare_rows: Any, chat: Path) -> None:
    rows = [
        {
            "m": [
                {"role": "user", "content": f"cafe\u0301 {n}\r\n"},
                {"role": "assistant", "content": f"nai\u0308ve\x07 {n}"},
            ]
        }
        for n in range(10)
    ]
    samples = prepare_rows("causal", chat, rows, messages="m", held_out=0.0).samples("train", 16, "join")
    tokenizer: Any = AutoTokenizer.from_pretrained(chat)
    labels = samples.fetch(np.arange(len(samples)))["labels"]
    assert tokenizer.decode(labels[labels != IGNORED]) == "".join(f"naïve {n}<|im_end|>" for n in range(10))


WRONG: dict[str, tuple[Any, str]] = {
    "text": ("hello", r"rows-0\.jsonl:1: the conversation is not a list of messages, each with a role and a content"),
    "no content": ([{"role": "user"}], "is not a list of messages"),
    "no answer": ([{"role": "user", "content": "why?"}], "has no message of the role 'assistant' to learn from"),
}


@pytest.mark.parametrize(("messages", "problem"), WRONG.values(), ids=WRONG)
def test_wrong_conversations_are_one_sentence(prepare_rows: Any, chat: Path, messages: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as raised:
        prepare_rows("causal", chat, [{"m": messages}], messages="m")
    assert "\n" not in str(raised.value)


def test_a_template_that_refuses_or_rewrites_is_named(prepare_rows: Any, chat: Path) -> None:
    rows = [{"m": conversation(2)}]
    for template, problem in (
        ("{{ raise_exception('only two turns') }}", "chat template refuses the conversation: only two turns"),
        ("{% for m in messages[-2:] %}{{ m['content'] }}<|im_end|>{% endfor %}", "renders message 2 otherwise"),
    ):
        tokenizer: Any = AutoTokenizer.from_pretrained(chat)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(chat)
        with pytest.raises(DataError, match=problem):
            prepare_rows("causal", chat, rows, messages="m")


def test_an_empty_answer_is_refused(prepare_rows: Any, chat: Path) -> None:
    with pytest.raises(DataError, match="column 'say' is empty, and holds the answer to learn"):
        prepare_rows("causal", chat, [{"ask": "why?", "say": None}], prompt="ask", answer="say")
