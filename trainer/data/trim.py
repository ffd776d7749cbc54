"""A WordPiece tokenizer with the tokens that some text uses: for models whose embeddings are most of what they are.

What stays is spelled as before: of each word WordPiece takes the longest piece that fits (Wu et al. 2016,
https://arxiv.org/abs/1609.08144), and the pieces of the text all stay. Other words fall apart into shorter pieces, at
worst into single characters, which stay too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trainer.errors import ConfigError, DataError
from trainer.records import IntArray


def require_word_pieces(folder: Path) -> None:
    """
    Raises:
        ConfigError: the tokenizer in `folder` is of another kind.
    """
    kind = _read(folder / "tokenizer.json")["model"]["type"]
    if kind != "WordPiece":
        text = f"`used` is for WordPiece tokenizers, and this one is of the kind {kind}; use `all`"
        raise ConfigError([("data.tokenizer.keep", text)])


def trim(whole: Path, folder: Path, counts: IntArray, special_ids: Sequence[int]) -> IntArray:
    """Write a smaller tokenizer, whose tokens stand in the order that they had.

    Args:
        whole: folder of a WordPiece tokenizer, as transformers writes it.
        folder: that of the smaller one; made here.
        counts: how often each token occurs in the text, [n].
        special_ids: tokens that stay, used or not.

    Returns:
        The old id of each token, ascending, [kept].

    Raises:
        DataError: the tokenizer does not load with other numbers as what it was.
    """
    content = _read(whole / "tokenizer.json")
    kept = _kept(content, counts, special_ids)
    numbers = {int(old): new for new, old in enumerate(kept)}
    # what else holds the vocabulary would hold the whole of it
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("vocab*", "added_tokens.json"))
    _renumber(content, numbers)
    _write(folder / "tokenizer.json", content)
    options = _read(folder / "tokenizer_config.json")
    if known := options.get("added_tokens_decoder"):
        options["added_tokens_decoder"] = {str(numbers[int(old)]): token for old, token in known.items()}
        _write(folder / "tokenizer_config.json", options)
    before = Tokenizer.from_file(str(whole / "tokenizer.json"))
    after = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if after.get_vocab() != {before.id_to_token(old): new for old, new in numbers.items()}:
        raise DataError("the tokenizer cannot be cut to the tokens of the data: set data.tokenizer.keep: all")
    return kept


def _kept(content: dict[str, Any], counts: IntArray, special_ids: Iterable[int]) -> IntArray:
    vocabulary, prefix = content["model"]["vocab"], content["model"]["continuing_subword_prefix"]
    stay = {*special_ids, *(token["id"] for token in content["added_tokens"])}
    stay |= {number for token, number in vocabulary.items() if len(token.removeprefix(prefix)) == 1}
    if (unknown := content["model"]["unk_token"]) in vocabulary:
        stay.add(vocabulary[unknown])
    return np.union1d(np.flatnonzero(counts), np.array(sorted(stay), dtype=np.int64)).astype(np.int64)


def _renumber(content: dict[str, Any], numbers: dict[int, int]) -> None:
    model = content["model"]
    model["vocab"] = {token: numbers[old] for token, old in model["vocab"].items() if old in numbers}
    for token in content["added_tokens"]:
        token["id"] = numbers[token["id"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = numbers[content["padding"]["pad_id"]]
    if content.get("post_processor"):
        _renumber_processor(content["post_processor"], numbers)


def _renumber_processor(processor: dict[str, Any], numbers: dict[int, int]) -> None:
    for each in processor.get("processors", ()):
        _renumber_processor(each, numbers)
    # TemplateProcessing, and BertProcessing: [token, id]
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [numbers[old] for old in token["ids"]]
    for role in ("cls", "sep"):
        if role in processor:
            token, old = processor[role]
            processor[role] = [token, numbers[old]]


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
