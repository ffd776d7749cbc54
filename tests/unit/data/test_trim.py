"""A WordPiece tokenizer cut to the tokens of the training data: what stays is spelled as before, the rest in smaller
pieces."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.config.schema import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from trainer.data.prepare import find, prepare
from trainer.data.prepared import Prepared
from trainer.data.report import table
from trainer.errors import ConfigError, DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROLES = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
SPECIAL = list(ROLES.values())
PROCESSORS = {
    "template": lambda cls, sep: processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    ),
    "bert": lambda cls, sep: processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls)),
    "sequence": lambda cls, sep: processors.Sequence([processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))]),
}


def pieces(processor: str = "template") -> Tokenizer:
    """Special tokens in the middle, unused ones before, and an added one behind."""
    words = ["film", "fil", "##m", "house", "hou", "##se", "river", "##ver", "##s", "rivers", "quiet", "##et"]
    names = [f"[unused{n}]" for n in range(9)] + SPECIAL + words
    names += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    places = {name: number for number, name in enumerate(dict.fromkeys(names))}
    result = Tokenizer(models.WordPiece(places, unk_token="[UNK]"))
    result.normalizer = normalizers.Lowercase()
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.post_processor = PROCESSORS[processor](places["[CLS]"], places["[SEP]"])
    result.add_tokens([AddedToken("<br>", normalized=False)])
    result.enable_padding(length=5, pad_token="[PAD]", pad_id=places["[PAD]"])
    return result


def save(folder: Path, backend: Tokenizer) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES).save_pretrained(folder)
    return folder


TRAIN = ("film river river", "river film film", "fil film")
HELD_OUT = ("house film", "quiet rivers", "film river")


@pytest.fixture
def prepared_with(tmp_path: Path) -> Any:
    for name, texts in (("train", TRAIN), ("held_out", HELD_OUT)):
        records = [{"text": text, "label": "yn"[n % 2]} for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def run(tokenizer: Path, look: Any = prepare, **options: Any) -> Prepared:
        config = DataConfig(
            sources=tuple(
                SourceConfig(files=(f"{use}.jsonl",), label="label", use=use)  # type: ignore[arg-type]
                for use in ("train", "held_out")
            ),
            clean=CleanConfig(min_characters=1, min_letters=0, near_duplicates=None, exact_duplicates=False),
            tokenizer=TokenizerConfig(path=str(tokenizer), **options),
            prepared=str(tmp_path / "cache"),
        )
        return look(config, base=tmp_path, tokenizer_fallback=None, trust_remote_code=False)  # type: ignore[no-any-return]

    return run


def ids(prepared: Prepared, split: Any) -> list[list[int]]:
    samples = prepared.samples(split, 16, "positions")
    arrays = samples.fetch(np.arange(len(samples)))
    return [row[mask == 1].tolist() for row, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_only_the_tokens_of_the_training_data_stay(prepared_with: Any, tmp_path: Path, processor: str) -> None:
    whole = pieces(processor)
    folder = save(tmp_path / "tokenizer", whole)
    prepared = prepared_with(folder, keep="used")
    kept = prepared.kept
    assert kept.dtype == np.int64
    names = [whole.id_to_token(int(number)) for number in kept]
    singles = [f"{prefix}{letter}" for letter in LETTERS for prefix in ("", "##")]
    assert set(names) == {*SPECIAL, *singles, "<br>", "film", "fil", "river"}
    assert (np.diff(kept) > 0).all()
    assert prepared.vocabulary == len(kept)
    # numbers are those of the places
    ours = Tokenizer.from_file(str(prepared.tokenizer_path / "tokenizer.json"))
    assert ours.get_vocab() == {name: number for number, name in enumerate(names)}
    assert ours.padding["pad_id"] == ours.token_to_id("[PAD]")
    # what exports load
    theirs, loaded = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    assert kept[loaded.pad_token_id] == theirs.pad_token_id
    assert prepared.classes is not None
    assert prepared.classes.pad_id == loaded.pad_token_id
    assert loaded.all_special_tokens == theirs.all_special_tokens
    for text in TRAIN:
        expected = theirs(text)["input_ids"]
        assert kept[loaded(text)["input_ids"]].tolist() == expected
        assert loaded.convert_ids_to_tokens(loaded(text)["input_ids"])[0] == "[CLS]"
    # the samples of the training data are those of the whole tokenizer; other text is spelled in other pieces
    everything = prepared_with(folder)
    assert [kept[row].tolist() for row in ids(prepared, "train")] == ids(everything, "train")
    assert everything.kept is None
    held_out = [loaded.convert_ids_to_tokens(row)[1:-1] for row in ids(prepared, "held_out")]
    assert held_out == [
        ["h", "##o", "##u", "##s", "##e", "film"],
        ["q", "##u", "##i", "##e", "##t", "river", "##s"],
        ["film", "river"],
    ]


def test_the_manifest_and_the_report_say_how_many(prepared_with: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "tokenizer", pieces())
    prepared, everything = prepared_with(folder, keep="used"), prepared_with(folder)
    assert prepared.manifest["kept"]["of"] == everything.vocabulary
    assert prepared.manifest["vocabulary"]["size"] == len(prepared.kept) < everything.vocabulary
    shown = io.StringIO()
    Console(file=shown, width=150).print(table(prepared.report_at(16)))
    assert f"vocabulary {len(prepared.kept)} of {everything.vocabulary} ·" in shown.getvalue()
    assert "kept" not in everything.manifest
    assert not list(prepared.path.glob("whole*"))


def test_the_option_belongs_to_the_key_and_the_fingerprint(prepared_with: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "tokenizer", pieces())
    everything, stated = prepared_with(folder), prepared_with(folder, keep="all")
    assert stated.path == everything.path
    assert prepared_with(folder, find, keep="used") is None
    used = prepared_with(folder, keep="used")
    assert used.path != everything.path
    assert used.fingerprint != everything.fingerprint
    # of a tokenizer in another order the same is left: other rows of the embeddings
    other = json.loads((folder / "tokenizer.json").read_text())
    first, second = "[unused0]", "house"
    words = other["model"]["vocab"]
    words[first], words[second] = words[second], words[first]
    (tmp_path / "other").mkdir()
    for file in folder.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(other))
    same = prepared_with(tmp_path / "other", keep="used")
    assert same.kept.tolist() == used.kept.tolist()
    assert same.fingerprint == used.fingerprint
    words["##se"], words["river"] = words["river"], words["##se"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(other))
    moved = prepared_with(tmp_path / "other", keep="used")
    assert moved.kept.tolist() != used.kept.tolist()
    files = [(each.tokenizer_path / "tokenizer.json").read_bytes() for each in (moved, used)]
    assert files[0] == files[1]
    assert moved.fingerprint != used.fingerprint


def test_other_tokenizers_are_refused_before_anything_is_read(prepared_with: Any, tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate([*SPECIAL, *LETTERS])}, [], unk_token="[UNK]"))
    folder = save(tmp_path / "tokenizer", backend)
    (tmp_path / "train.jsonl").write_text("not a record\n")
    with pytest.raises(ConfigError) as caught:
        prepared_with(folder, keep="used")
    ((path, text),) = caught.value.problems
    assert path == "data.tokenizer.keep"
    assert text == "`used` is for WordPiece tokenizers, and this one is of the kind BPE; use `all`"


def test_the_table_belongs_to_the_prepared_data(prepared_with: Any, tmp_path: Path) -> None:
    prepared = prepared_with(save(tmp_path / "tokenizer", pieces()), keep="used")
    (prepared.path / "kept.npy").unlink()
    with pytest.raises(DataError, match=r"kept\.npy is missing or damaged"):
        Prepared.open(prepared.path)
