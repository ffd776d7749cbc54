"""The teacher behind HTTP: which servers are fit for a run, and what becomes of a run when its server fails it."""

# ruff: noqa: F811 - fixtures of another module
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from served import LENGTH, NO_IDS, Open, arrays_of, model, served, teacher_of, tokenizer, tokenizer_folder  # noqa: F401
from serving import Serving
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from trainer.errors import ConfigError, ExitCode
from trainer.knowledge import TEACHER_IDS, TEACHER_LOG_PROBABILITIES
from trainer.teacher.http import ServerFailedError, ServerRefusedError, _retry_after
from trainer.teacher.server import ServerTeacher

KEY = "sk-a-key-that-nobody-may-see"
DIALECTS = ("vllm", "openai", "openai-text")


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
