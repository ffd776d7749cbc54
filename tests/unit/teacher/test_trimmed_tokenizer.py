"""The tokenizer of a run may have some of the teacher's tokens, under other numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trainer.config.distill import DistillConfig
from trainer.errors import ConfigError
from trainer.teacher.vocabulary import check_tokenizer


def save(folder: Path, *words: str) -> Path:
    backend = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_tokens_are_compared_where_the_teacher_has_them(tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", "a", "b", "[UNK]", "c", "d")
    ours = save(tmp_path / "ours", "b", "[UNK]", "d")
    options = DistillConfig.model_validate({"teacher": {"place": "replica", "pretrained": str(teacher)}})
    check_tokenizer(options, ours, np.array([1, 2, 4]))
    with pytest.raises(ConfigError, match="3 of the run's 3 tokens differ"):
        check_tokenizer(options, ours)
    with pytest.raises(ConfigError, match=r"1 of the run's 3 tokens differ \(token 3, 'd', is 'c' to the teacher\)"):
        check_tokenizer(options, ours, np.array([1, 2, 3]))
    with pytest.raises(ConfigError, match=r"1 of the run's 3 tokens differ \(token 5, 'd', is unknown to the teacher"):
        check_tokenizer(options, ours, np.array([1, 2, 5]))
