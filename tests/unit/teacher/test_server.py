"""The teacher behind HTTP, against a real server that serves a small model: what it says, and what becomes of a server
that misbehaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Serving
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config.distill import ServerConfig
from trainer.errors import ConfigError, ExitCode
from trainer.knowledge import TEACHER_IDS, TEACHER_LOG_PROBABILITIES, SparseTargets
from trainer.teacher.http import ServerFailedError, ServerRefusedError, _retry_after
from trainer.teacher.prompts import IGNORED, Prompt, prompts_of
from trainer.teacher.server import ServerTeacher

SERVING = Path(__file__).parents[2] / "serving.py"
VOCABULARY, TOP, LENGTH = 300, 5, 24
KEY = "sk-a-key-that-nobody-may-see"
DIALECTS = ("vllm", "openai", "openai-text")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 20,  # padded beyond the tokenizer, as many are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the people walked on the moon and the return of the people"] * 20, trainer)
    assert tokenizer.get_vocab_size() <= VOCABULARY
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


Open = Callable[..., ServerTeacher]


@pytest.fixture
def teacher_of(tokenizer_folder: Path, tokenizer: Tokenizer) -> Iterator[Open]:
    """A teacher at a server; waits between tries are noted in `teacher.waits` and not waited for."""
    opened = []

    def make(server: Serving | str, dialect: str = "vllm", **options: Any) -> ServerTeacher:
        waits: list[float] = []
        arguments = {name: options.pop(name) for name in ("boundaries", "environment") if name in options}
        settings = {"top": TOP, "timeout_seconds": 10.0, "retries": 2, "model": "teacher", **options}
        url = server if isinstance(server, str) else server.url
        config = ServerConfig(url=url, dialect=dialect.removesuffix("-text"), **settings)
        teacher = ServerTeacher(
            config,
            tokenizer=tokenizer_folder,
            vocabulary=tokenizer.get_vocab_size(),
            **{"boundaries": "join", "environment": {}, "pause": waits.append, **arguments},
        )
        teacher.waits = waits  # type: ignore[attr-defined]
        opened.append(teacher)
        return teacher

    yield make
    for teacher in opened:
        teacher.close()


def arrays_of(num_samples: int = 2, seed: int = 0, highest: int = 256) -> dict[str, np.ndarray]:
    input_ids = np.random.default_rng(seed).integers(1, highest, (num_samples, LENGTH))
    return {"input_ids": input_ids, "labels": np.roll(input_ids, -1, axis=1)}


NO_IDS = np.empty(0, dtype=np.int64)


def truth(model: LlamaForCausalLM, tokens: np.ndarray) -> torch.Tensor:
    """Log-probabilities at every position of one text, [L, V]."""
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens)[None]).logits[0].double().log_softmax(-1)


def served(model: LlamaForCausalLM, tokenizer: Tokenizer, dialect: str = "vllm", **options: Any) -> Serving:
    return Serving(model, tokenizer, tokens_as_ids=dialect != "openai-text", **options)


def assert_top(
    found: dict[str, np.ndarray], row: int, places: slice, expected: torch.Tensor, known: set[int], top: int = TOP
) -> None:
    """The `top` most probable tokens at each position, but for those that are not in `known`."""
    for place, (values, ids) in enumerate(zip(*expected.topk(top), strict=True), start=places.start):
        pairs = [(id_, value) for id_, value in zip(ids.tolist(), values.tolist(), strict=True) if id_ in known]
        missing = top - len(pairs)
        assert found[TEACHER_IDS][row, place].tolist() == [id_ for id_, _ in pairs] + [-1] * missing
        log_probabilities = [value for _, value in pairs] + [-np.inf] * missing
        assert found[TEACHER_LOG_PROBABILITIES][row, place] == pytest.approx(log_probabilities, abs=1e-5)


def everything(tokenizer: Tokenizer) -> set[int]:
    return set(range(tokenizer.get_vocab_size()))


def distinct(tokenizer: Tokenizer) -> set[int]:
    """Tokens that have a text of their own; bytes that are no letter alone have not."""
    texts = [tokenizer.decode([id_], skip_special_tokens=False) for id_ in range(tokenizer.get_vocab_size())]
    return {id_ for id_, text in enumerate(texts) if texts.count(text) == 1}


@pytest.mark.parametrize("dialect", DIALECTS[:2])
def test_targets_are_the_models_own_last_position_included(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, dialect: str
) -> None:
    arrays = arrays_of()
    with served(model, tokenizer, dialect) as server:
        found = teacher_of(server, dialect).annotate(NO_IDS, arrays)
    assert found[TEACHER_IDS].dtype == np.int64
    assert found[TEACHER_LOG_PROBABILITIES].dtype == np.float32
    assert found[TEACHER_IDS].shape == found[TEACHER_LOG_PROBABILITIES].shape == (2, LENGTH, TOP)
    for row in range(2):
        assert_top(found, row, slice(0, LENGTH), truth(model, arrays["input_ids"][row]), everything(tokenizer))
    # what the model says of the rows that only pad its head is left out
    assert (found[TEACHER_IDS] == -1).any()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_documents_of_a_block_are_texts_of_their_own(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, dialect: str
) -> None:
    arrays = arrays_of()
    begins = [[0, 7, 8], [0]]
    arrays["position_ids"] = np.stack(
        [np.arange(LENGTH) - np.repeat(row, np.diff([*row, LENGTH])) for row in begins]
    ).astype(np.int64)
    with served(model, tokenizer, dialect) as server:
        found = teacher_of(server, dialect, boundaries="block").annotate(NO_IDS, arrays)
        texts = [body["prompt"] for body in server.bodies if len(body["prompt"]) != 32]
    assert sorted(map(len, texts)) == [1, 7, 16, 24]
    for row, starts in enumerate(begins):
        for begin, end in zip(starts, [*starts[1:], LENGTH], strict=True):
            expected = truth(model, arrays["input_ids"][row, begin:end])
            if dialect != "openai-text":
                assert_top(found, row, slice(begin, end), expected, everything(tokenizer))
                continue
            known = distinct(tokenizer)
            for place in range(begin, end):
                ids, values = found[TEACHER_IDS][row, place], found[TEACHER_LOG_PROBABILITIES][row, place]
                ids, values = ids[ids >= 0], values[ids >= 0]
                # tokens with one text come as one, and the prompt's own token takes the place that this leaves
                assert set(expected[place - begin].topk(TOP).indices.tolist()) & known <= set(ids.tolist()) <= known
                assert values == pytest.approx(expected[place - begin, torch.from_numpy(ids)].numpy(), abs=1e-5)


def test_only_what_is_predicted_is_asked_for(model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open) -> None:
    arrays = arrays_of(3)
    arrays["labels"][0, 10:] = IGNORED
    arrays["labels"][1] = IGNORED
    with served(model, tokenizer) as server:
        found = teacher_of(server).annotate(NO_IDS, arrays)
        assert sorted(len(body["prompt"]) for body in server.bodies) == [10, LENGTH]
    assert (found[TEACHER_IDS][0, :10, 0] >= 0).all()
    assert (found[TEACHER_IDS][0, 10:] == -1).all()
    assert (found[TEACHER_IDS][1] == -1).all()
    assert (found[TEACHER_LOG_PROBABILITIES][1] == -np.inf).all()


def test_prompts() -> None:
    ids = np.zeros((2, 6), dtype=np.int64)
    positions = np.array([[3, 4, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]])
    labels = np.array([[1, IGNORED, 1, 1, IGNORED, IGNORED], [1, 1, 1, 1, IGNORED, 1]])
    assert prompts_of(ids, None, None) == [Prompt(0, 0, 6), Prompt(1, 0, 6)]
    assert prompts_of(ids, positions, None)[:4] == [Prompt(0, 0, 2), Prompt(0, 2, 4), Prompt(0, 4, 5), Prompt(0, 5, 6)]
    assert prompts_of(ids, positions, labels) == [Prompt(0, 0, 1), Prompt(0, 2, 4), Prompt(1, 0, 6)]


def test_answers_are_put_where_they_belong_though_asked_for_at_once(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open
) -> None:
    """The server answers nobody before four have asked, so they are asked for side by side."""
    arrays = arrays_of(8)
    with served(model, tokenizer, together=4) as server:
        teacher = teacher_of(server, requests=4)
        at_once = teacher.annotate(NO_IDS, arrays)
    with served(model, tokenizer) as server:
        one_by_one = teacher_of(server, requests=1).annotate(NO_IDS, arrays)
    for name, array in one_by_one.items():
        assert np.array_equal(array, at_once[name])
    assert len({array.tobytes() for array in at_once[TEACHER_IDS]}) == 8


def test_a_vocabulary_without_anything_left_out(tokenizer: Tokenizer, teacher_of: Open) -> None:
    torch.manual_seed(1)
    size = tokenizer.get_vocab_size()
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    small = LlamaForCausalLM(config).eval()
    arrays = arrays_of(1)
    with Serving(small, tokenizer, max_logprobs=10_000) as server:
        found = teacher_of(server, top=10_000).annotate(NO_IDS, arrays)
    assert found[TEACHER_IDS].shape == (1, LENGTH, size)
    assert_top(found, 0, slice(0, LENGTH), truth(small, arrays["input_ids"][0]), everything(tokenizer), size)
    mass = np.exp(found[TEACHER_LOG_PROBABILITIES].astype(np.float64)).sum(-1)
    assert mass == pytest.approx(np.ones_like(mass), abs=1e-5)


def test_knowledge_is_what_was_annotated_or_is_asked_for(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open
) -> None:
    arrays = arrays_of()
    with served(model, tokenizer) as server:
        teacher = teacher_of(server)
        found = {name: torch.from_numpy(array) for name, array in teacher.annotate(NO_IDS, arrays).items()}
        asked = len(server.bodies)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        brought = teacher.knowledge({**tensors, **found}).targets
        assert len(server.bodies) == asked
        written = teacher.knowledge(tensors).targets
        assert len(server.bodies) == 2 * asked
    assert isinstance(brought, SparseTargets)
    assert isinstance(written, SparseTargets)
    assert brought.kind == written.kind == "top"
    assert brought.ids is found[TEACHER_IDS]
    assert torch.equal(brought.ids, written.ids)
    assert torch.equal(brought.log_probabilities, written.log_probabilities)
    assert teacher.mend() is None


# ---- what a server must be for a run to begin


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_fit_server_is_accepted(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    with served(model, tokenizer, dialect) as server:
        teacher_of(server, dialect).check(LENGTH)
    assert caplog.records == []


def refusal(teacher: ServerTeacher, length: int = LENGTH) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        teacher.check(length)
    (problem,) = caught.value.problems
    assert "\n" not in problem[1]
    assert "\x1b" not in problem[1]
    return problem


@pytest.mark.parametrize(
    ("misbehave", "dialect", "path", "words"),
    [
        ("fewer", "vllm", "distill.teacher.server.top", ["5 tokens", "--max-logprobs"]),
        ("fewer", "openai", "distill.teacher.server.top", ["5 tokens", "gives 4"]),
        ("other-tokenizer", "vllm", "distill.teacher.server.model", ["another tokenizer", "data.tokenizer.path"]),
        ("other-tokenizer", "openai", "distill.teacher.server.model", ["another tokenizer"]),
        ("other-tokenizer", "openai-text", "distill.teacher.server.model", ["another tokenizer"]),
        ("short", "vllm", "distill.teacher.server.dialect", ["changed or cut the prompt"]),
        ("shifted", "vllm", "distill.teacher.server.dialect", ["is not what the server read"]),
        ("shifted", "openai", "distill.teacher.server.dialect", ["is not what the server read"]),
        ("silent", "vllm", "distill.teacher.server.dialect", ["prompt_logprobs"]),
        ("silent", "openai", "distill.teacher.server.dialect", ["no log-probabilities"]),
        ("nan", "vllm", "distill.teacher.server.dialect", ["NaN"]),
        ("logits", "openai", "distill.teacher.server.dialect", ["add up to"]),
        ("failing", "vllm", "distill.teacher.server", ["3 tries", "500 CUDA error: [31man illegal memory access"]),
        ("truncated", "vllm", "distill.teacher.server", ["3 tries", "not JSON"]),
        ("page", "vllm", "distill.teacher.server", ["not JSON"]),
        ("moved", "vllm", "distill.teacher.server", ["redirects to http://elsewhere.invalid/v1/completions"]),
    ],
)
def test_an_unfit_server_is_refused(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    teacher_of: Open,
    misbehave: str,
    dialect: str,
    path: str,
    words: list[str],
) -> None:
    with served(model, tokenizer, dialect, misbehave=misbehave) as server:
        problem = refusal(teacher_of(server, dialect))
    assert problem[0] == path
    for word in words:
        assert word in problem[1]


def test_what_does_not_fit_is_refused(model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open) -> None:
    with served(model, tokenizer, max_model_len=LENGTH + 1) as server:
        teacher_of(server).check(LENGTH)
        assert refusal(teacher_of(server), LENGTH + 1)[0] == "data.sequence_length"
        assert refusal(teacher_of(server, model="another")) == (
            "distill.teacher.server.model",
            f"{server.url} has no model 'another'; there: teacher",
        )
    with served(model, tokenizer, max_logprobs=3) as server:
        # in the server's own words
        assert "greater than max allowed: 3" in refusal(teacher_of(server))[1]
    with served(model, tokenizer, echoes=False) as server:
        assert "does not `echo`" in refusal(teacher_of(server, "openai"))[1]
    with pytest.raises(ConfigError, match=r"data.boundaries: .*use `join` or"):
        teacher_of("http://node/v1", boundaries="positions")
    # the server is gone
    assert "3 tries" in refusal(teacher_of(server))[1]


def test_a_tokenizer_that_cannot_be_compared_is_said(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with Serving(model, None) as server:
        teacher_of(server).check(LENGTH)
    assert "was not checked" in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://node/v1",
        "node7:8000/v1",
        "http://",
        "http://u:secret@node/v1",
        "http://n/v1?a=b",
        "",
    ],
)
def test_only_addresses_of_servers(teacher_of: Open, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        teacher_of(url)
    assert caught.value.problems[0][0] == "distill.teacher.server.url"
    assert "secret" not in str(caught.value)


# ---- what becomes of a run when the server fails it


def test_a_busy_server_is_waited_for_as_long_as_it_asks(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = arrays_of(1)
    with served(model, tokenizer, misbehave="busy") as server:
        teacher = teacher_of(server)
        found = teacher.annotate(NO_IDS, arrays)
        assert server.num_requests == 3
    assert (found[TEACHER_IDS][..., 0] >= 0).all()
    waits = teacher.waits  # type: ignore[attr-defined]
    assert len(waits) == 2
    assert all(7 <= wait <= 7 * 1.25 for wait in waits)
    assert "429 Too many requests" in caplog.text


@pytest.mark.parametrize(
    ("misbehave", "words"),
    [
        ("failing", "500 CUDA error"),
        ("slow", "no answer within 0.2 s"),
        ("dripping", "no answer within 0.2 s"),
        ("truncated", "not JSON"),
    ],
)
def test_a_server_that_keeps_failing_ends_the_run(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, misbehave: str, words: str
) -> None:
    with served(model, tokenizer, misbehave=misbehave) as server:
        teacher = teacher_of(server, timeout_seconds=0.2 if misbehave in ("slow", "dripping") else 10.0)
        with pytest.raises(ServerFailedError) as caught:
            teacher.annotate(NO_IDS, arrays_of(1))
        assert f"{server.url}/completions" in str(caught.value)
        assert len(server.bodies) == 3
    assert words in str(caught.value)
    assert caught.value.exit_code == ExitCode.CRASHED
    first, second = teacher.waits  # type: ignore[attr-defined]
    assert 1 <= first <= 1.25
    assert 2 <= second <= 2.5


def test_a_cut_connection_is_opened_again(model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open) -> None:
    with served(model, tokenizer, misbehave="cut") as server:
        found = teacher_of(server).annotate(NO_IDS, arrays_of(1))
        assert server.num_requests == 2
    assert (found[TEACHER_IDS][..., 0] >= 0).all()


@pytest.mark.parametrize(
    ("misbehave", "words"),
    [
        ("moved", "redirects"),
        ("short", "changed or cut"),
        ("shifted", "is not what the server read"),
        ("nan", "NaN"),
        ("logits", "add up to"),
    ],
)
def test_a_wrong_answer_ends_the_run_at_once(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, misbehave: str, words: str
) -> None:
    with served(model, tokenizer, misbehave=misbehave) as server:
        with pytest.raises(ServerRefusedError, match=words):
            teacher_of(server).annotate(NO_IDS, arrays_of(1))
        assert server.num_requests == 1


def test_after_an_error_no_more_is_asked(model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open) -> None:
    with served(model, tokenizer, misbehave="nan") as server:
        with pytest.raises(ServerRefusedError):
            teacher_of(server, requests=1).annotate(NO_IDS, arrays_of(100))
        assert server.num_requests < 50


def test_closing_gives_up_what_is_asked(model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open) -> None:
    with served(model, tokenizer, misbehave="slow") as server, ThreadPoolExecutor(1) as thread:
        teacher = teacher_of(server, timeout_seconds=1000.0, requests=1)
        asked = thread.submit(teacher.annotate, NO_IDS, arrays_of(5))
        assert server.asked.wait(60)
        teacher.close()
        with pytest.raises(ServerFailedError, match="the run is ending"):
            asked.result(60)
        assert len(server.bodies) == 1


def test_fewer_tokens_are_said_once(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with served(model, tokenizer, misbehave="fewer") as server:
        found = teacher_of(server).annotate(NO_IDS, arrays_of())
    # the prompt's own token came beside the four, but for the last position
    assert ((found[TEACHER_IDS] == -1) == (found[TEACHER_LOG_PROBABILITIES] == -np.inf)).all()
    assert [record.getMessage().split(" gives ")[1][:8] for record in caplog.records] == ["4 tokens"]


def test_the_key_is_sent_and_never_shown(
    model: LlamaForCausalLM, tokenizer: Tokenizer, teacher_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with served(model, tokenizer, key=KEY) as server:
        teacher_of(server, key_variable="TEACHER_KEY", environment={"TEACHER_KEY": f"{KEY}\n"}).check(LENGTH)
        without = refusal(teacher_of(server))
    with served(model, tokenizer, key="another") as server:
        given = teacher_of(server, key_variable="TEACHER_KEY", environment={"TEACHER_KEY": KEY})
        wrong = refusal(given)
        with pytest.raises(ServerRefusedError) as caught:
            given.annotate(NO_IDS, arrays_of(1))
    with pytest.raises(ConfigError, match="TEACHER_KEY is not set") as unset:
        teacher_of(server, key_variable="TEACHER_KEY")
    with pytest.raises(ConfigError, match="TEACHER_KEY holds characters") as odd:
        teacher_of(server, key_variable="TEACHER_KEY", environment={"TEACHER_KEY": f"{KEY}\nHost: x"})
    assert "401 Incorrect API key" in without[1]
    # the server repeats the key it was given
    assert "401 Incorrect API key provided: Bearer ***" in wrong[1]
    for text in (without[1], wrong[1], str(caught.value), str(unset.value), str(odd.value), caplog.text, repr(given)):
        assert KEY not in text


def test_when_to_come_back() -> None:
    assert _retry_after(None) == 0
    assert _retry_after("7") == 7
    assert _retry_after("soon") == 0
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("Wed, 21 Oct 2115 07:28:00 GMT") > 1e9


def test_the_server_as_a_program(
    model: LlamaForCausalLM, tokenizer_folder: Path, tmp_path: Path, teacher_of: Open
) -> None:
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    command = [sys.executable, str(SERVING), str(tmp_path / "model"), "--port-file", str(tmp_path / "port")]
    process = subprocess.Popen([*command, "--announce"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"port": int((tmp_path / "port").read_text())}
        url = f"http://127.0.0.1:{(tmp_path / 'port').read_text()}/v1"
        arrays = arrays_of(1)
        found = teacher_of(url).annotate(NO_IDS, arrays)
        assert found[TEACHER_IDS][0, :, 0].tolist() == truth(model, arrays["input_ids"][0]).argmax(-1).tolist()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        process.stdout.close()
