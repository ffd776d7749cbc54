"""Facts of a teacher, and the vocabulary of a student that has its tokenizer from it."""

import json
from pathlib import Path
from typing import Any

import pytest
from model_configs import TINY, run_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from trainer.config.distill import DistillConfig
from trainer.config.facts import facts_from_json
from trainer.config.load import dump_config
from trainer.config.schema import RunConfig, TokenizerConfig
from trainer.errors import ConfigError
from trainer.model.describe import describe, describe_teacher, expected_vocabulary, main

ROWS, TOKENS = 320, 300


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A pretrained directory: configuration and tokenizer; nothing here looks at weights."""
    fields = {**TINY["llama"], "num_hidden_layers": 3, "vocab_size": ROWS}
    LlamaConfig(**{name: value for name, value in fields.items() if name != "model_type"}).save_pretrained(
        tmp_path / "large"
    )
    words = {f"w{index}": index for index in range(TOKENS)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words))).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def taught(teacher: Path, tokenizer: TokenizerConfig | None = None, **options: Any) -> RunConfig:
    config = run_config("llama")
    distill = DistillConfig.model_validate({"teacher": {"pretrained": str(teacher), **options}})
    data = config.data.model_copy(update={"tokenizer": tokenizer or TokenizerConfig()})
    return config.model_copy(update={"stage": "distill", "distill": distill, "data": data})


def test_facts_of_the_teacher_are_its_own(teacher: Path) -> None:
    facts = describe_teacher(taught(teacher))
    assert (facts.model_type, facts.num_layers, facts.vocabulary) == ("llama", 3, ROWS)
    # whatever the student is
    assert describe(taught(teacher)).num_layers == 2
    assert describe_teacher(taught(teacher, overrides={"num_hidden_layers": 2})).num_layers == 2


def test_a_student_from_scratch_has_the_tokenizer_of_its_teacher(teacher: Path) -> None:
    assert expected_vocabulary(taught(teacher)) == TOKENS
    assert describe(taught(teacher)).vocabulary == TOKENS
    (teacher / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError) as caught:
        expected_vocabulary(taught(teacher))
    [(option, text)] = caught.value.problems
    assert option == "distill.teacher.pretrained"
    assert text.startswith(f"{teacher} is no tokenizer that can be read: ")


def test_what_is_wrong_with_the_teacher_is_said_of_the_teacher(tmp_path: Path, teacher: Path) -> None:
    for config, option in (
        (taught(tmp_path / "gone"), "distill.teacher.pretrained"),
        (taught(teacher, overrides={"hiden_size": 8}), "distill.teacher.overrides.hiden_size"),
        (taught(teacher, place="cache"), "distill.teacher"),
        (run_config("llama"), "distill.teacher"),
    ):
        with pytest.raises(ConfigError) as caught:
            describe_teacher(config)
        assert [path for path, _ in caught.value.problems] == [option]


def test_the_command_prints_them(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(taught(teacher)))
    assert main(["--teacher", str(tmp_path)]) == 0
    assert facts_from_json(capsys.readouterr().out).num_layers == 3
    assert main([str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["num_layers"] == 2
    assert main(["--teacher"]) == 2
