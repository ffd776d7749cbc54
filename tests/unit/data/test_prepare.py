import fcntl
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from trainer.config.schema import CleanConfig, DataConfig, SourceConfig, TokenizerConfig, TrainTokenizerConfig
from trainer.data import build, parts
from trainer.data.changes import check_unchanged
from trainer.data.prepare import find, prepare
from trainer.data.prepared import Prepared
from trainer.data.report import table
from trainer.errors import DataError

WORDS = [
    "the",
    "of",
    "a",
    "river",
    "stone",
    "keeps",
    "falls",
    "under",
    "light",
    "and",
    "every",
    "house",
    "waits",
    "for",
    "rain",
]


def story(seed, length=60):
    generator = random.Random(seed)
    return f"Story {seed}. " + " ".join(generator.choice(WORDS) for _ in range(length)) + "\n"


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(story(number))
    rows = [{"text": story(1000 + number)} for number in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(tmp_path):
    def make(**options):
        return DataConfig(
            **{
                "sources": (
                    SourceConfig(files=("*.txt",)),
                    SourceConfig(files=("rows.jsonl",), name="rows", weight=0.5),
                ),
                "tokenizer": TokenizerConfig(train=TrainTokenizerConfig(vocabulary=300)),
                "held_out": 0.2,
                "prepared": str(tmp_path / "cache"),
            }
            | options
        )

    return make


def run(config, base, **options):
    return prepare(config, base=base, **{"tokenizer_fallback": None, "trust_remote_code": False} | options)


def contents(prepared):
    return {
        str(path.relative_to(prepared.path)): path.read_bytes()
        for path in sorted(prepared.path.rglob("*"))
        if path.is_file()
    }


def documents(prepared, split):
    """(source, name, text) of every document, read back from the tokens."""
    result = []
    for source in prepared.samples(split, 16, "join").sources:
        from trainer.data.tokenize import decoder

        for number, (begin, end) in enumerate(zip(source.offsets[:-1], source.offsets[1:], strict=True)):
            tokens = source.tokens[begin:end].tolist()
            assert tokens[-1] == prepared.eos_id
            assert prepared.eos_id not in tokens[:-1]
            text = decoder(prepared.tokenizer_path).decode(tokens[:-1], skip_special_tokens=False)
            result.append((source.name, source.document_name(number), text))
    return result


def test_every_document_is_in_one_split_unchanged(base, config):
    (base / "03.txt").write_text("It spells <|endoftext|> and <|mask|> in the middle of a sentence.\n")
    prepared = run(config(), base)
    train, held_out = documents(prepared, "train"), documents(prepared, "held_out")
    expected = [("*.txt", path.name, path.read_text()) for path in sorted(base.glob("*.txt"))]
    expected += [("rows", f"rows.jsonl:{n + 1}", story(1000 + n)) for n in range(30)]

    def is_held_out(text):
        return xxhash.xxh3_128_intdigest(text.encode()) < 0.2 * 2**128

    assert train == [document for document in expected if not is_held_out(document[2])]
    assert held_out == [document for document in expected if is_held_out(document[2])]
    assert 5 < len(held_out) < 30
    assert prepared.weights == (1.0, 0.5)


def test_the_manifest_counts_what_is_there(base, config):
    prepared = run(config(), base)
    tokens = {
        split: np.concatenate([s.tokens for s in prepared.samples(split, 16, "join").sources])
        for split in ("train", "held_out")
    }
    train, held_out = Counter(tokens["train"].tolist()), Counter(tokens["held_out"].tolist())
    total = sum(train.values()) + prepared.vocabulary
    entropy = -sum(n * math.log((train[t] + 1) / total) for t, n in held_out.items()) / sum(held_out.values())
    assert prepared.unigram_entropy == pytest.approx(entropy)
    texts = [text for _, _, text in documents(prepared, "held_out")]
    assert prepared.characters_per_token == sum(map(len, texts)) / len(tokens["held_out"])
    assert prepared.bytes_per_token == prepared.characters_per_token
    assert prepared.total("tokens", "train") == len(tokens["train"])
    assert tokens["train"].dtype == np.uint16
    assert (
        sum(entry["train"]["documents"] + entry["held_out"]["documents"] for entry in prepared.report["sources"]) == 90
    )


def test_workers_do_not_change_a_byte(base, config, tmp_path, monkeypatch):
    # small enough for several tasks and several processes
    monkeypatch.setattr(parts, "CHUNK_CHARACTERS", 1500)
    monkeypatch.setattr(build, "_BYTES_WORTH_A_WORKER", 1000)
    (base / "59.txt").write_text(story(7) + "and so on")
    one = run(config(prepared=str(tmp_path / "one"), workers=1), base)
    three = run(config(prepared=str(tmp_path / "three"), workers=3), base)
    assert contents(one) == contents(three)
    monkeypatch.undo()
    whole = run(config(prepared=str(tmp_path / "whole"), workers=1), base)
    assert contents(whole) == contents(one)


def test_preparing_again_changes_nothing_and_options_of_reading_are_not_prepared(base, config):
    first = run(config(), base)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    stages = []
    again = run(
        config(sequence_length=64, shuffle=False, boundaries="block"), base, progress=lambda *s: stages.append(s)
    )
    assert again.path == first.path
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    assert stages == []
    assert find(config(), base=base, tokenizer_fallback=None, trust_remote_code=False).path == first.path
    others = [
        config(held_out=0.3),
        config(clean=CleanConfig(min_characters=1)),
        config(tokenizer=TokenizerConfig(train=TrainTokenizerConfig(vocabulary=301))),
        config(sources=(SourceConfig(files=("*.txt",)),)),
    ]
    for other in others:
        assert find(other, base=base, tokenizer_fallback=None, trust_remote_code=False) is None


def test_removals_are_counted_by_rule_with_examples(base, config):
    (base / "60.txt").write_text("short")
    (base / "61.txt").write_text(story(5))
    (base / "62.txt").write_text(story(9, 400))
    (base / "63.txt").write_text(story(9, 400) + "One sentence more.")
    (base / "64.txt").write_bytes(b"caf\xe9 is what this document says, in the wrong encoding")
    prepared = run(config(), base)
    source = prepared.report["sources"][0]
    removed = {rule: (entry["documents"], entry["examples"]) for rule, entry in source["removed"].items()}
    assert removed == {
        "shorter than min_characters": (1, ["60.txt"]),
        "exact duplicate": (1, ["61.txt"]),
        "near duplicate": (1, ["63.txt"]),
    }
    assert source["repaired"] == {"undecodable bytes replaced": 1}
    assert source["documents"] == 65

    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table(prepared.report))
    shown = console.export_text()
    assert "near duplicate" in shown
    assert "unigram entropy" in shown


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"clean": CleanConfig(min_characters=10**6)},
            r"no text is left of 90 documents \(90 shorter than min_characters\)",
        ),
        ({"tokenizer": TokenizerConfig()}, "no tokenizer: set `data.tokenizer.path`"),
        ({"tokenizer": TokenizerConfig(path="rows.jsonl")}, "the tokenizer '.*rows.jsonl' cannot be loaded"),
        ({"tokenizer": TokenizerConfig(path=".")}, "holds no tokenizer"),
    ],
)
def test_what_cannot_be_prepared_is_one_sentence_and_leaves_nothing(base, config, options, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        run(config(**options), base)
    assert "\n" not in str(caught.value)
    assert [path for path in Path(config().prepared).iterdir() if path.is_dir()] == []


def test_a_split_without_samples_is_one_sentence(base, config):
    prepared = run(config(held_out=0.0), base)
    assert prepared.unigram_entropy is None
    assert prepared.bytes_per_token is None
    with pytest.raises(DataError, match=r"the held_out split has no samples \(0 documents\): add text, or raise"):
        prepared.samples("held_out", 16, "join")


def test_an_existing_tokenizer_gives_the_same_tokens(base, config, tmp_path):
    trained = run(config(), base)
    folder = tmp_path / "tokenizer"
    trained.tokenizer_path.rename(folder)
    for choice, fallback in [
        (TokenizerConfig(path=str(folder)), None),
        (TokenizerConfig(path=str(folder / "tokenizer.json")), None),
        (TokenizerConfig(), str(folder)),
    ]:
        other = run(config(tokenizer=choice), base, tokenizer_fallback=fallback)
        assert (other.eos_id, other.mask_id, other.vocabulary) == (trained.eos_id, trained.mask_id, trained.vocabulary)
        for split in ("train", "held_out"):
            for mine, its in zip(
                trained.samples(split, 16, "join").sources, other.samples(split, 16, "join").sources, strict=True
            ):
                assert np.array_equal(mine.tokens, its.tokens)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder))
    assert (loaded.eos_token, loaded.pad_token, loaded.mask_token) == ("<|endoftext|>", "<|endoftext|>", "<|mask|>")
    assert loaded.decode(loaded(story(1))["input_ids"]) == story(1)


def test_text_beyond_the_vocabulary_is_counted(base, config, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1} | {w: n for n, w in enumerate(WORDS, 2)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "words"
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    prepared = run(config(tokenizer=TokenizerConfig(path=str(folder))), base)
    # "Story" and the number of each document
    unknown = [
        source[split]["unknown_tokens"] for source in prepared.report["sources"] for split in ("train", "held_out")
    ]
    assert sum(unknown) == 90 * 2


def test_truncation_of_a_tokenizer_is_not_inherited(base, config, tmp_path):
    trained = run(config(), base)
    path = trained.tokenizer_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    other = run(config(tokenizer=TokenizerConfig(path=str(tmp_path / "tokenizer.json"))), base)
    assert other.total("tokens", "train") == trained.total("tokens", "train")


def test_long_documents_are_encoded_in_pieces_without_loss(base, config, monkeypatch):
    from trainer.data import tokenize

    monkeypatch.setattr(tokenize, "_MAX_CHARACTERS_AT_ONCE", 500)
    (base / "00.txt").write_text("".join(story(seed) for seed in range(2000, 2020)) + "y" * 1200)
    prepared = run(config(held_out=0.0, workers=1), base)
    assert documents(prepared, "train")[0][2] == (base / "00.txt").read_text()


SCRIPT = """
import os, signal, sys
from pathlib import Path
from trainer.config.schema import DataConfig
from trainer.data.prepare import prepare
def progress(stage, done, total):
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
config = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())
prepare(config, base=Path(sys.argv[2]), tokenizer_fallback=None, trust_remote_code=False, progress=progress)
"""


def start(config, base, tmp_path, stage, **options):
    (tmp_path / "data.json").write_text(config.model_dump_json())
    arguments = [sys.executable, "-c", SCRIPT, tmp_path / "data.json", base, stage]
    return subprocess.run(arguments, capture_output=True, text=True, **options)


@pytest.mark.parametrize("stage", ["cleaning", "tokenising"])
def test_killed_while_preparing(base, config, tmp_path, stage):
    assert start(config(), base, tmp_path, stage).returncode == -signal.SIGKILL
    cache = Path(config().prepared)
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".tmp"]
    assert find(config(), base=base, tokenizer_fallback=None, trust_remote_code=False) is None
    prepared = run(config(), base)
    assert [path for path in cache.iterdir() if path.is_dir()] == [prepared.path]
    other = run(config(prepared=str(tmp_path / "other")), base)
    assert contents(prepared) == contents(other)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(base, config, tmp_path):
    for number in range(200, 320):
        (base / f"{number}.txt").write_text(story(number))
    command = ["unshare", "-rm", "true"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs a mount namespace for a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "data.json").write_text(config(prepared=str(disk / "cache")).model_dump_json())
    (tmp_path / "script.py").write_text(SCRIPT)
    inside = (
        f"mount -t tmpfs -o size=96k none {disk} && "
        f"{sys.executable} {tmp_path}/script.py {tmp_path}/data.json {base} never; find {disk}/cache -type d"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert f"trainer.errors.DataError: the disk of {disk}/cache is full: free space there" in done.stderr
    assert done.stdout.split() == [f"{disk}/cache"]


def test_two_at_once_prepare_it_once(base, config, tmp_path):
    expected = run(config(prepared=str(tmp_path / "other")), base)
    cache = Path(config().prepared)
    cache.mkdir()
    waiting, stages, results = threading.Event(), [], []

    def progress(stage, done, total):
        stages.append(stage)
        if stage.startswith("waiting for another process"):
            waiting.set()

    with (cache / f".{expected.path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: results.append(run(config(), base, progress=progress)))
        thread.start()
        assert waiting.wait(60)
        # the other one finishes
        expected.path.rename(cache / expected.path.name)
    thread.join(60)
    assert len(stages) == 1
    assert results[0].fingerprint == expected.fingerprint


def test_changed_data_is_refused_by_name(base, config):
    first = run(config(), base)
    assert check_unchanged(run(config(), base), first.fingerprint, False) is None
    (base / "05.txt").write_text(story(5) + "Changed.")
    (base / "07.txt").unlink()
    for number in range(70, 75):
        (base / f"{number}.txt").write_text(story(number))
    changed = run(config(), base)
    assert changed.fingerprint != first.fingerprint
    with pytest.raises(DataError) as caught:
        check_unchanged(changed, first.fingerprint, False)
    assert str(caught.value) == (
        "the data is not what it was when this run began (source *.txt: changed 05.txt, added 70.txt, 71.txt, 72.txt "
        "and 2 more, removed 07.txt): restore it, start another run, or go on with data.accept_changed=true"
    )
    assert "going on because data.accept_changed is set" in check_unchanged(changed, first.fingerprint, True)
    other = run(config(held_out=0.3, clean=CleanConfig(min_letters=0.1)), base)
    with pytest.raises(DataError, match=r"\(data.clean changed; data.held_out changed\)"):
        check_unchanged(other, changed.fingerprint, False)
    with pytest.raises(DataError, match="what it was is no longer there to compare"):
        check_unchanged(other, "0" * 32, False)


def test_a_file_that_changes_meanwhile_is_refused(base, config):
    def progress(stage, done, total):
        if stage == "tokenizer":
            (base / "05.txt").write_text("Another text, written while the data was prepared.")

    with pytest.raises(DataError, match=r"source \*\.txt: 05\.txt changed while it was prepared: start again"):
        run(config(), base, progress=progress)
    assert [path for path in Path(config().prepared).iterdir() if path.is_dir()] == []


def test_damaged_data_is_refused(base, config):
    prepared = run(config(), base)
    tokens = prepared.path / "train" / "000.tokens"
    os.truncate(tokens, tokens.stat().st_size - 2)
    with pytest.raises(DataError, match=r"000\.tokens is missing or damaged: delete"):
        Prepared.open(prepared.path)
    with pytest.raises(DataError, match="holds no prepared data"):
        Prepared.open(prepared.path.parent)
