"""Tokenizers: found, trained, saved; and text to tokens in worker processes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.config.schema import TokenizerConfig, TrainTokenizerConfig
from trainer.data.chat import Chat
from trainer.data.hashes import ContentHashes
from trainer.errors import DataError
from trainer.records import IntArray

END_OF_TEXT, MASK = "<|endoftext|>", "<|mask|>"
_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_KNOWN_MASKS = (MASK, "<mask>", "[MASK]")
_MAX_CHARACTERS_AT_ONCE = 4_000_000
"""Longer documents are encoded in pieces that end at a newline: a token takes about 100 bytes while it is encoded."""


@dataclass(frozen=True)
class Frame:
    """What the tokenizer puts around one text of its own ([CLS] … [SEP]), and behind it to make it longer."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class PairFrame:
    """What the tokenizer puts before, between and behind two texts."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    types: tuple[int, int, int, int, int] | None
    """Kind of segment (`token_type_ids`) of the prefix, the first text, the middle, the second text and the suffix;
    None: the model is not told."""


@dataclass(frozen=True)
class Vocabulary:
    """What the rest needs to know of a tokenizer."""

    size: int
    """Largest token id + 1."""
    eos_id: int
    mask_id: int | None
    special_ids: tuple[int, ...]
    unknown_id: int | None = None
    """Stands for text that the vocabulary cannot express; None where it can express all."""
    frame: Frame | None = None
    """Of labelled texts."""
    pair: PairFrame | None = None
    """Of labelled texts that come in pairs."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds a token."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    @property
    def ordinary_ids(self) -> IntArray:
        """Ids of all tokens that are not special, [n]."""
        return np.setdiff1d(np.arange(self.size), self.special_ids)


@dataclass(frozen=True)
class Choice:
    """Which tokenizer a config asks for, before anything is written."""

    train: TrainTokenizerConfig | None
    location: str | Path | None
    """Folder, file or hub id of one that exists."""
    trust_remote_code: bool
    identity: dict[str, Any]
    """What tells it from another one: goes into the key of prepared data."""


def choose(
    config: TokenizerConfig, fallback: str | None, base: Path, trust_remote_code: bool, hashes: ContentHashes
) -> Choice:
    """The tokenizer of the config, else that of the pretrained model `fallback`.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    if config.train is not None:
        return Choice(config.train, None, trust_remote_code, {"train": config.train.model_dump()})
    name = config.path or fallback
    if name is None:
        raise DataError("no tokenizer: set `data.tokenizer.path`, `data.tokenizer.train` or `model.pretrained`")
    place = next((path for path in (base / Path(name).expanduser(), Path(name).expanduser()) if path.exists()), None)
    if place is None:
        backend = _load(name, trust_remote_code).backend_tokenizer.to_str()
        return Choice(None, name, trust_remote_code, {"hub": xxhash.xxh3_128_hexdigest(backend.encode())})
    if place.is_file():
        files = [place]
    else:
        files = sorted({path for pattern in _FILES for path in place.glob(pattern) if path.is_file()})
        if not files:
            raise DataError(f"{place} holds no tokenizer: neither tokenizer.json nor a vocabulary")
    return Choice(None, place, trust_remote_code, {"files": [[path.name, hashes.of(path)] for path in files]})


def _load(location: str | Path, trust_remote_code: bool) -> Any:
    """A transformers tokenizer with a Rust backend."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if isinstance(location, Path) and location.is_file() and location.suffix != ".gguf":
            tokenizer = _with_special_tokens(location)
        elif isinstance(location, Path) and location.is_file():
            tokenizer = AutoTokenizer.from_pretrained(str(location.parent), gguf_file=location.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(location), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"the tokenizer {str(location)!r} cannot be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"the tokenizer {str(location)!r} has no fast version (tokenizer.json), which is needed")
    return tokenizer


def _with_special_tokens(file: Path) -> Any:
    """A bare tokenizer.json says nothing about the roles of its tokens: they are known by their names."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer.from_file(str(file)).get_vocab()
    roles = {
        role: next((name for name in names if name in vocabulary), None)
        for role, names in (("eos_token", _KNOWN_ENDS), ("mask_token", _KNOWN_MASKS))
    }
    given = {role: name for role, name in roles.items() if name}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **given)  # type: ignore[no-untyped-call]


def save(
    choice: Choice,
    folder: Path,
    texts: Iterator[str],
    num_characters: int,
    *,
    labelled: bool = False,
    pair: bool = False,
) -> Vocabulary:
    """Write the tokenizer so that `AutoTokenizer.from_pretrained(folder)` loads it, after training it where asked.

    Args:
        texts: the training documents, for a tokenizer that is trained here.
        num_characters: of all texts.
        labelled: each text is a sample of its own. Where the tokenizer has no padding, end-of-text stands for it.
        pair: texts come in pairs.
    """
    if choice.train is None:
        assert choice.location is not None
        tokenizer = _load(choice.location, choice.trust_remote_code)
    else:
        tokenizer = _train(choice.train, texts, num_characters)
    end = _end(tokenizer)
    if end is None:
        raise _no_end(choice)
    if labelled:
        # as the samples are made: what is exported does the same
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        # the Rust side raises a plain Exception for what the system said
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    return _vocabulary(tokenizer, end, folder, labelled, pair)


def saved_vocabulary(choice: Choice, folder: Path, *, labelled: bool, pair: bool = False) -> Vocabulary:
    """That of the tokenizer in `folder`, which began as what :func:`save` wrote."""
    tokenizer = _load(folder, choice.trust_remote_code)
    end = _end(tokenizer)
    assert end is not None
    return _vocabulary(tokenizer, end, folder, labelled, pair)


def chat(choice: Choice) -> Chat:
    """Renders conversations as the tokenizer of the choice asks for.

    Raises:
        DataError: it cannot be loaded, or has no end-of-text.
    """
    if choice.location is None:
        return Chat(None, END_OF_TEXT)
    tokenizer = _load(choice.location, choice.trust_remote_code)
    end = _end(tokenizer)
    if end is None:
        raise _no_end(choice)
    return Chat(tokenizer, str(tokenizer.convert_ids_to_tokens(end)))


def _no_end(choice: Choice) -> DataError:
    return DataError(f"the tokenizer {str(choice.location)!r} has no end-of-text token (eos_token), which is needed")


def _end(tokenizer: Any) -> int | None:
    end: int | None = tokenizer.eos_token_id
    return end if end is not None else tokenizer.sep_token_id


def _vocabulary(tokenizer: Any, end: int, folder: Path, labelled: bool, pair: bool) -> Vocabulary:
    size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    special = tuple(sorted(set(tokenizer.all_special_ids)))
    unknown = tokenizer.unk_token_id
    frame = _frame(folder / "tokenizer.json", tokenizer.pad_token_id) if labelled else None
    told = "token_type_ids" in tokenizer.model_input_names
    two = _pair_frame(folder / "tokenizer.json", end, told) if labelled and pair else None
    return Vocabulary(size, end, tokenizer.mask_token_id, special, None if unknown == end else unknown, frame, two)


def _known_text(tokenizer: Tokenizer) -> str:
    """A text that the vocabulary has words for."""
    return next(text for text in chain("a", tokenizer.get_vocab()) if 0 in tokenizer.encode(text).special_tokens_mask)


def _frame(path: Path, pad_id: int) -> Frame:
    tokenizer = load(path)
    encoding = tokenizer.encode(_known_text(tokenizer))
    ids, added = encoding.ids, encoding.special_tokens_mask
    first, last = added.index(0), len(added) - added[::-1].index(0)
    return Frame(tuple(ids[:first]), tuple(ids[last:]), pad_id)


def _pair_frame(path: Path, end: int, told: bool) -> PairFrame:
    tokenizer = load(path)
    text = _known_text(tokenizer)
    encoding = tokenizer.encode(text, text)
    ids, types = encoding.ids, encoding.type_ids
    one, two = ([at for at, text in enumerate(encoding.sequence_ids) if text == number] for number in (0, 1))
    # two texts that nothing keeps apart would be read as one
    middle = tuple(ids[one[-1] + 1 : two[0]]) or (end,)
    places = (0, one[0], min(one[-1] + 1, two[0] - 1), two[0], len(ids) - 1)
    of = tuple(types[place] for place in places)
    return PairFrame(tuple(ids[: one[0]]), middle, tuple(ids[two[-1] + 1 :]), of if told else None)  # type: ignore[arg-type]


def _train(config: TrainTokenizerConfig, texts: Iterator[str], num_characters: int) -> Any:
    """Byte-level BPE (Radford et al. 2019): no text is out of vocabulary."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[END_OF_TEXT, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_evenly(texts, min(1.0, config.max_characters / max(1, num_characters))), trainer)
    names = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "mask_token": MASK}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]


def _evenly(texts: Iterator[str], fraction: float) -> Iterator[str]:
    for index, text in enumerate(texts):
        if int((index + 1) * fraction) > int(index * fraction):
            yield text


@dataclass(frozen=True)
class EncodeTask:
    """Some documents that follow each other in a file of text."""

    tokenizer: Path
    """tokenizer.json"""
    text: Path
    starts: IntArray
    """[documents + 1]: byte offsets in the file."""
    vocabulary: Vocabulary
    end: bool = True
    """Put end-of-text behind each document."""


def encode(task: EncodeTask) -> tuple[NDArray[Any], IntArray]:
    """Tokens of all documents, one after the other, and the number of each, [documents]; end-of-text included."""
    tokenizer = load(task.tokenizer)
    with task.text.open("rb") as file:
        file.seek(int(task.starts[0]))
        data = file.read(int(task.starts[-1] - task.starts[0]))
    starts = (task.starts - task.starts[0]).tolist()
    texts = [data[begin:end].decode() for begin, end in pairwise(starts)]
    if len(data) <= _MAX_CHARACTERS_AT_ONCE:
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encoded = [
            [
                token
                for piece in _pieces(text)
                for token in tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            ]
            for text in texts
        ]
    lengths = np.array([len(ids) + task.end for ids in encoded], dtype=np.int64)
    tokens = np.full(int(lengths.sum()), task.vocabulary.eos_id, dtype=task.vocabulary.dtype)
    begin = 0
    for ids in encoded:
        tokens[begin : begin + len(ids)] = ids
        begin += len(ids) + task.end
    return tokens, lengths


def _pieces(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > _MAX_CHARACTERS_AT_ONCE:
        newline = text.rfind("\n", begin, begin + _MAX_CHARACTERS_AT_ONCE)
        end = newline + 1 if newline >= begin else begin + _MAX_CHARACTERS_AT_ONCE
        yield text[begin:end]
        begin = end
    yield text[begin:]


@lru_cache(maxsize=2)
def load(path: Path, *, special: bool = False) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Args:
        special: a text that spells a special token means it, as in a rendered conversation.
    """
    tokenizer = Tokenizer.from_file(str(path))
    # a text that spells a special token is text, and documents keep their length
    tokenizer.encode_special_tokens = not special
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def decoder(folder: Path) -> Tokenizer:
    """The tokenizer of prepared data, for turning tokens back into text."""
    return load(folder / "tokenizer.json")
