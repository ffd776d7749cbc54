"""Whether a teacher and a run mean the same by a token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from trainer.config.distill import DistillConfig
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError
from trainer.model.configuration import first_line, pretrained_reference
from trainer.records import IntArray

_PATH = "distill.teacher.pretrained"


def check_tokenizer(options: DistillConfig, tokenizer_path: Path, kept: IntArray | None = None) -> None:
    """Refuse a teacher whose tokenizer has another token for an id of the run's; further tokens do no harm.

    Nothing is compared with `distill.vocabulary: uld`, which is for other tokenizers, nor with a teacher behind a
    server, whose tokenizer is not here.

    Args:
        tokenizer_path: of the run's tokenizer: a `tokenizer.json`, or a directory with one.
        kept: the teacher's id for each id of the run's, [vocabulary]; None: the same.

    Raises:
        ConfigError: the tokenizers differ, or the teacher comes without one.
    """
    teacher = options.teacher
    if options.vocabulary == "uld" or teacher.pretrained is None:
        return
    reference = ModelConfig(pretrained=teacher.pretrained, trust_remote_code=teacher.trust_remote_code)
    name, arguments = pretrained_reference(reference)
    try:
        theirs: dict[str, int] = AutoTokenizer.from_pretrained(name, **arguments).get_vocab()
    except Exception as error:
        text = f"no tokenizer of the teacher {teacher.pretrained} can be loaded: {first_line(error)}"
        raise ConfigError([(_PATH, f"{text}; put the one that it was trained with beside its weights")]) from error
    file = tokenizer_path / "tokenizer.json" if tokenizer_path.is_dir() else tokenizer_path
    ours: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    if kept is not None:
        ours = {token: int(kept[number]) for token, number in ours.items()}
    by_id = {number: token for token, number in theirs.items()}
    different = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if not different:
        return
    number, token = different[0]
    other = f"is {by_id[number]!r} to the teacher" if number in by_id else "is unknown to the teacher"
    raise ConfigError(
        [
            (
                _PATH,
                f"the teacher has another tokenizer: {len(different)} of the run's {len(ours)} tokens differ "
                f"(token {number}, {token!r}, {other}); set `data.tokenizer.path: {teacher.pretrained}`, or "
                "`distill.vocabulary: uld` to learn across tokenizers",
            )
        ]
    )
