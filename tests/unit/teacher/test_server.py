"""The teacher behind HTTP, against a real server that serves a small model: what it says."""

# ruff: noqa: F811 - fixtures of another module
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from served import (  # noqa: F401
    LENGTH,
    NO_IDS,
    TOP,
    Open,
    arrays_of,
    assert_top,
    model,
    served,
    teacher_of,
    tokenizer,
    tokenizer_folder,
    truth,
)
from serving import Serving
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.knowledge import TEACHER_IDS, TEACHER_LOG_PROBABILITIES, SparseTargets
from trainer.teacher.prompts import IGNORED, Prompt, prompts_of

SERVING = Path(__file__).parents[2] / "serving.py"
DIALECTS = ("vllm", "openai", "openai-text")


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
