"""A teacher whose tokens mean something else is refused."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.config.distill import DistillConfig
from trainer.errors import ConfigError
from trainer.teacher.vocabulary import check_tokenizer

WORDS = {"[UNK]": 0, "<s>": 1, "a": 2, "b": 3, "c": 4}


def tokenizer(folder: Path, words: dict[str, int]) -> Path:
    """A directory with a tokenizer of these words."""
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="<s>").save_pretrained(folder)
    return folder


def options(teacher: Path | None, **fields: Any) -> DistillConfig:
    place = {"place": "replica", "pretrained": str(teacher)} if teacher else {"place": "server"}
    return DistillConfig.model_validate({"teacher": place, **fields})


def test_the_same_tokenizer_passes_as_a_directory_and_as_a_file(tmp_path: Path) -> None:
    teacher, run = tokenizer(tmp_path / "teacher", WORDS), tokenizer(tmp_path / "run", WORDS)
    check_tokenizer(options(teacher), run)
    check_tokenizer(options(teacher), run / "tokenizer.json")


def test_further_tokens_of_the_teacher_do_no_harm(tmp_path: Path) -> None:
    teacher = tokenizer(tmp_path / "teacher", {**WORDS, "d": 5})
    run = tokenizer(tmp_path / "run", WORDS)
    check_tokenizer(options(teacher), run)
    with pytest.raises(
        ConfigError, match=r"1 of the run's 6 tokens differ \(token 5, 'd', is unknown to the teacher\)"
    ):
        check_tokenizer(options(run), teacher)


def test_another_tokenizer_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    teacher = tokenizer(tmp_path / "teacher", {**WORDS, "a": 3, "b": 2})
    run = tokenizer(tmp_path / "run", WORDS)
    with pytest.raises(ConfigError, match=r"2 of the run's 5 tokens differ \(token 2, 'a', is 'b' to the teacher\)"):
        check_tokenizer(options(teacher), run)
    check_tokenizer(options(teacher, vocabulary="uld"), run)


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    run = tokenizer(tmp_path / "run", WORDS)
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigError, match=r"no tokenizer of the teacher .* can be loaded"):
        check_tokenizer(options(tmp_path / "teacher"), run)


def test_of_a_server_nothing_can_be_compared(tmp_path: Path) -> None:
    check_tokenizer(options(None), tokenizer(tmp_path / "run", WORDS))
