import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.config.schema import SourceConfig
from trainer.data.corpus import resolve, standard_library
from trainer.data.tasks import maker
from trainer.errors import DataError


def documents(folder, **options):
    (source,) = resolve([SourceConfig(**options)], folder)
    return [document[:2] for document in source.documents()]


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_globs_are_sorted_and_files_come_once(tmp_path):
    write(tmp_path, b_txt="B", a_txt="A", sub__c_txt="C", d_md="D", sub__deep__e_txt="E")
    found = documents(tmp_path, files=("b.txt", "**/*.txt", "*.md"))
    assert found == [("b.txt", "B"), ("a.txt", "A"), ("sub/c.txt", "C"), ("sub/deep/e.txt", "E"), ("d.md", "D")]


def test_tables_of_orange_have_two_rows_under_their_header(tmp_path):
    write(tmp_path, a_tab="label\ttext\nd\tstring\nclass\t\nx\tone\ny\ttwo\n", b_tab="text\tn\nthree\t3\nfour\t4\n")
    (source,) = resolve([SourceConfig(files=("a.tab",), label="label")], tmp_path)
    found = [(each.name, each.text, each.label) for each in source.documents(maker(source, None))]
    assert found == [("a.tab:1", "one", "x"), ("a.tab:2", "two", "y")]
    assert documents(tmp_path, files=("b.tab",)) == [("b.tab:1", "three"), ("b.tab:2", "four")]


def test_a_name_with_glob_characters_is_a_name(tmp_path):
    (tmp_path / "a[1].txt").write_text("bracket")
    assert documents(tmp_path, files=("a[1].txt",)) == [("a[1].txt", "bracket")]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_compressed_files(tmp_path, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress("Grüße".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    (tmp_path / f"c.csv{suffix}").write_bytes(compress(b"text,n\nthree,3\n"))
    found = documents(tmp_path, files=("a*", "b*", "c*"))
    assert [text for _, text in found] == ["Grüße", "one", "two", "three"]
    broken = tmp_path / f"d.txt{suffix}"
    broken.write_bytes(compress(b"x" * 9999)[:-9])
    with pytest.raises(DataError, match=rf"d\.txt{suffix} cannot be read"):
        documents(tmp_path, files=("d*",))


def test_records_of_every_format_are_the_same(tmp_path):
    rows = [{"title": "A", "body": 'one, "two"\nthree'}, {"title": "B", "body": "naïve — 你好"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.csv").write_text('title,body\nA,"one, ""two""\nthree"\nB,naïve — 你好\n')
    (tmp_path / "d.tsv").write_text('title\tbody\nA\t"one, ""two""\nthree"\nB\tnaïve — 你好\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.tsv", "e.parquet"):
        found = documents(tmp_path, files=(name,), column="body")
        assert found == [(f"{name}:1", rows[0]["body"]), (f"{name}:2", rows[1]["body"])]
        made = documents(tmp_path, files=(name,), template="# {{ title }}\n{{ body | upper }}")
        assert made[0] == (f"{name}:1", '# A\nONE, "TWO"\nTHREE')
    (tmp_path / "one.json").write_text('{\n  "text": "whole"\n}')
    assert documents(tmp_path, files=("one.json",)) == [("one.json:1", "whole")]


def test_a_directory_in_hub_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"words": "a"}, {"words": "b"}]), folder / "train-0.parquet")
    assert documents(tmp_path, hub="hub", column="words") == [("hub:1", "a"), ("hub:2", "b")]
    with pytest.raises(DataError, match=r"'hub' has no column 'word': did you mean 'words'\?"):
        documents(tmp_path, hub="hub", column="word")
    with pytest.raises(DataError, match="hub dataset 'hub' cannot be loaded: Unknown split"):
        documents(tmp_path, hub="hub", split="validation")


def test_a_hub_dataset_out_of_reach(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hub dataset 'nobody/nothing-there' cannot be loaded: "):
        documents(tmp_path, hub="nobody/nothing-there")


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ({"a_txt": "x"}, {"files": ("*.md",)}, r"no file matches '\*\.md' \(looked in "),
        ({"sub__a_txt": "x"}, {"files": ("sub",)}, r"no file matches 'sub' .* is a folder; write sub/\*\*/\*\.txt"),
        ({"a_txt": b"\x7fELF\x00\x01"}, {"files": ("a.txt",)}, r"a\.txt is binary or not in UTF-8: convert"),
        ({"a_txt": bytes(range(128, 256)) * 9}, {"files": ("a.txt",)}, r"a\.txt is binary"),
        (
            {"a_jsonl": '{"body": "x", "boody": 1}'},
            {"files": ("a.jsonl",), "column": "bodi"},
            r"a\.jsonl:1 has no column 'bodi': did you mean 'body'",
        ),
        ({"a_csv": "title,n\nx,1\n"}, {"files": ("a.csv",)}, r"a\.csv:1 has no column 'text': it has 'title', 'n'"),
        ({"a_jsonl": '{"text": 3}'}, {"files": ("a.jsonl",)}, r"a\.jsonl:1: column 'text' holds int, not text"),
        ({"a_jsonl": '{"text": "x"}\n{"text": '}, {"files": ("a.jsonl",)}, r"a\.jsonl: record 2 is not JSON"),
        ({"a_jsonl": "[1]\n"}, {"files": ("a.jsonl",)}, r"a\.jsonl: record 1 is a int, not an object"),
        ({"a_csv": "text\nx,y\n"}, {"files": ("a.csv",)}, r"a\.csv: the row that ends in line 2 has more fields"),
        ({"a_csv": 'text\n"x'}, {"files": ("a.csv",)}, r"a\.csv: after line 1 it is not CSV: unexpected end of data"),
        ({"a_parquet": b"text"}, {"files": ("a.parquet",)}, r"a\.parquet cannot be read: not Parquet"),
        ({"a_txt": "x"}, {"files": ("a.txt",), "column": "body"}, r"a\.txt is plain text without columns"),
        (
            {"a_jsonl": '{"title": 1}'},
            {"files": ("a.jsonl",), "template": "{{ titel }}"},
            r"a\.jsonl:1: .*'titel' is undefined; it has 'title'",
        ),
        ({"a_jsonl": '{"t": 1}'}, {"files": ("a.jsonl",), "template": "{{ t"}, r"the template is wrong in line 1"),
        (
            {"a_jsonl": '{"t": "x"}'},
            {"files": ("a.jsonl",), "template": "{{ t.__class__.__mro__ }}"},
            r"a\.jsonl:1: .*unsafe",
        ),
    ],
)  # fmt: skip
def test_bad_sources_are_one_sentence(tmp_path, content, options, sentence):
    write(tmp_path, **content)
    with pytest.raises(DataError, match=sentence) as caught:
        documents(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_undecodable_bytes_arrive_for_repair(tmp_path):
    write(tmp_path, a_txt=b"caf\xe9 is nice", b_txt="\ufeffbom", c_txt="wide".encode("utf-16"))
    found = documents(tmp_path, files=("*.txt",))
    assert found == [("a.txt", "caf\udce9 is nice"), ("b.txt", "bom"), ("c.txt", "wide")]


def test_sources_of_one_name_are_told_apart(tmp_path):
    write(tmp_path, a_txt="A")
    sources = resolve([SourceConfig(files=("a.txt",)), SourceConfig(files=("a.txt",))], tmp_path)
    assert [source.name for source in sources] == ["a.txt", "a.txt #2"]


def test_the_standard_library_is_a_corpus():
    names = [name for name, _ in standard_library()]
    assert len(names) > 400
    assert {"asyncio/base_events.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or name.startswith("test/")]
    assert names == sorted(names)
