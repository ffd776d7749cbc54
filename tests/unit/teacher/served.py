"""What the tests of a teacher behind HTTP share: a small model, its tokenizer, a server of it, a teacher at it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Serving
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config.distill import ServerConfig
from trainer.knowledge import TEACHER_IDS, TEACHER_LOG_PROBABILITIES
from trainer.teacher.server import ServerTeacher

VOCABULARY, TOP, LENGTH = 300, 5, 24


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
