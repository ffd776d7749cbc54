"""Loading a config: overrides, every problem at once, and the dump that loads equal."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.load import dump_config, load_config, read_run_config
from trainer.config.options import nearest, options
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, RunDirectoryError

MINIMAL = """\
name: small
data:
  sources: [{stdlib: true}]
  tokenizer: {train: {vocabulary: 512}}
model: {config: {model_type: llama}}
batch: {samples: 16, micro: 4}
optim: {lr: 1e-3}
schedule: {duration: 100}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def problems_of(path: Path, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert refused.value.source == str(path)
    return refused.value.problems


def with_text(minimal: Path, old: str, new: str) -> Path:
    text = minimal.read_text()
    assert old in text
    minimal.write_text(text.replace(old, new))
    return minimal


@pytest.mark.parametrize(
    ("old", "new", "path", "sentence"),
    [
        ("lr: 1e-3", "lr: -1", "optim.lr", "must be greater than 0, but is −1"),
        ("lr: 1e-3", "lr: abc", "optim.lr", "must be a number, but is the text 'abc'"),
        ("lr: 1e-3", "lr: .inf", "optim.lr", "must be finite, but is inf"),
        ("lr: 1e-3", "lr: true", "optim.lr", "must be a number, but is true"),
        ("{lr: 1e-3}", "{}", "optim.lr", "is missing, and has no default"),
        ("optim: {lr: 1e-3}", "optim:", "optim", "must be a group of options (`name: value`), but is empty (null)"),
        ("lr: 1e-3", "lr: 1, betas: [0.9, 1]", "optim.betas.1", "must be less than 1, but is 1"),
        ("lr: 1e-3", "lr: 1, betas: [0.9]", "optim.betas.1", "is missing, and has no default"),
        ("lr: 1e-3", "lr: 1, betas: 0.9", "optim.betas", "must be a list (`[a, b]`), but is 0.9"),
        ("lr: 1e-3", "lr: 1, rl: 2", "optim.rl", "is not an option; did you mean `optim.lr`?"),
        ("lr: 1e-3", "lr: 1, warmup: 2", "optim.warmup", "is not an option; did you mean `schedule.warmup`?"),
        ("optim:", "lr: 2\noptim:", "lr", "is not an option; did you mean `optim.lr`?"),
        ("optim:", "optimizer: 2\noptim:", "optimizer", "is not an option; did you mean `optim`?"),
        ("micro: 4", "micro: 2.5", "batch.micro", "must be a whole number, but is 2.5"),
        ("micro: 4", "micro: 4.0", "batch.micro", "must be a whole number, but is written as 4.0; write 4"),
        (
            "duration: 100",
            "duration: 1e9",
            "schedule.duration",
            "must be a whole number, but is written as 1000000000.0; write 1_000_000_000",
        ),
        ("micro: 4", "micro: '4'", "batch.micro", "must be a whole number, but is the text '4'"),
        (
            "duration: 100",
            "duration: 1, kind: cos",
            "schedule.kind",
            "must be one of 'cosine', 'linear', 'wsd' or 'constant', but is the text 'cos'",
        ),
        (
            "name: small",
            "name: small\nstage: x",
            "stage",
            "must be one of 'pretrain', 'finetune' or 'distill', but is the text 'x'",
        ),
        ("name: small", "name: 3", "name", "must be text, but is 3"),
        ("name: small", "name: ''", "name", "must have at least 1 character, but has none"),
        ("name: small", f"name: {'x' * 101}", "name", "must have at most 100 characters, but has 101"),
        ("[{stdlib: true}]", "[]", "data.sources", "must have at least 1 element, but has none"),
        ("stdlib: true", "stdlib: yes", "data.sources.0.stdlib", "must be true or false, but is the text 'yes'"),
        (
            "stdlib: true",
            "stdlib: true, wieght: 2",
            "data.sources.0.wieght",
            "is not an option; did you mean `data.sources.0.weight`?",
        ),
        (
            "model_type: llama",
            "a: 1}, overrides: {1: 2}, pretrained: {",
            "model.pretrained",
            "must be text, but is a group of options",
        ),
        (
            "stdlib: true",
            "stdlib: true}]\n  held_out: 1\n  more: [{a: 1",
            "data.held_out",
            "must be less than 1, but is 1",
        ),
    ],
)
def test_each_problem_is_one_sentence_at_its_path(minimal, old, new, path, sentence):
    assert (path, sentence) in problems_of(with_text(minimal, old, new))


def test_all_problems_of_file_and_overrides_come_at_once(minimal):
    with_text(minimal, "samples: 16", "samples: -16")
    with_text(minimal, "lr: 1e-3", "rate: 1")
    found = problems_of(minimal, "sed=3", "data.held_out=2", "seed", "name=a: b: c")
    assert [path for path, _ in found] == [
        "sed", "", "name", "data.held_out", "batch.samples", "optim.lr", "optim.rate",
    ]  # fmt: skip
    assert found[0][1] == "is not an option; did you mean `seed`?"
    assert found[1][1] == "the override 'seed' must have the form option=value, as in optim.lr=1e-3"
    assert found[2][1].startswith("the value 'a: b: c' is not YAML (line 1, column 5: ")


def test_the_error_reads_as_a_list_of_paths(minimal):
    with_text(minimal, "micro: 4", "micro: 0")
    with pytest.raises(ConfigError) as refused:
        load_config(minimal)
    assert str(refused.value) == f"{minimal} has 1 problem:\n  batch.micro: must be greater than 0, but is 0"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file; did you mean "),
        (b"- a\n", "it must be a mapping of options (`name: value`), but is a list"),
        (b"", "it must be a mapping of options (`name: value`), but is empty (null)"),
        (b"a: 1\na: 2\n", "`a` is given twice, on lines 1 and 2"),
        (b"a: \xff", "it is not text in UTF-8 (byte 3)"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, sentence):
    path = tmp_path / "run.yaml"
    if content is None:
        (tmp_path / "runs.yaml").write_text("")
    else:
        path.write_bytes(content)
    [(where, text)] = problems_of(path)
    assert where == ""
    assert text == sentence or (content is None and text == f"{sentence}{tmp_path / 'runs.yaml'}?")


def test_a_folder_is_refused(tmp_path):
    assert problems_of(tmp_path) == [("", "it is a directory; name the YAML file in it")]


def test_overrides(minimal):
    config = load_config(
        minimal,
        [
            "optim.lr=3e-4",
            "optim.lr=2e-4",
            "data.sources.0.weight=2",
            "data.sources.1.stdlib=true",
            "optim.betas.1=0.99",
            "model.config.rope_parameters.rope_theta=1e4",
            "model.config.layer_types=[a, b]",
            "model.config.layer_types.1=c",
            "data.tokenizer.train=",
            "data.tokenizer.path=org/name",
            "name=a=b",
            "zero.stage=3",
        ],
    )
    assert config.optim.lr == 2e-4
    assert [source.weight for source in config.data.sources] == [2, 1]
    assert config.optim.betas == (0.9, 0.99)
    assert config.model.config == {
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 1e4},
        "layer_types": ["a", "c"],
    }
    assert config.data.tokenizer.train is None
    assert (config.data.tokenizer.path, config.name, config.zero.stage) == ("org/name", "a=b", 3)


@pytest.mark.parametrize(
    ("override", "path", "sentence"),
    [
        ("data.sources.2.weight=1", "data.sources.2", "is not an element; `data.sources` takes an index from 0 to 1"),
        ("data.sources.x=1", "data.sources.x", "is not an element; `data.sources` takes an index from 0 to 1"),
        ("batch.samples.x=1", "batch.samples.x", "is not an option; `batch.samples` is a single value"),
        ("optim.rl=1", "optim.rl", "is not an option; did you mean `optim.lr`?"),
        ("=1", "", "the override '=1' must have the form option=value, as in optim.lr=1e-3"),
        ("optim.lr=", "optim.lr", "must be a number, but is empty (null)"),
        ("name.=1", "name.", "is not an option; `name` is a single value"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(minimal, override, path, sentence):
    assert problems_of(minimal, override) == [(path, sentence)]


def test_an_override_below_a_value_of_the_wrong_kind_is_refused(minimal):
    with_text(minimal, "{samples: 16, micro: 4}", "16")
    assert ("batch", "is 16, so `batch.micro` cannot be set in it") in problems_of(minimal, "batch.micro=2")


def test_paths_are_relative_to_the_file_or_the_working_directory(minimal, monkeypatch, tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "weights").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/home/somebody")
    path = folder / "small.yaml"
    path.write_text(
        MINIMAL.replace("{stdlib: true}", "{files: ['../text/**/*.txt', /a/b.md, ~/c.md]}, {hub: org/data}")
    )
    config = load_config(
        path, ["data.sources.2.files=[d.txt]", "model.config=", "model.pretrained=weights", "data.tokenizer.path=./t"]
    )
    assert config.data.sources[0].files == (f"{tmp_path}/text/**/*.txt", "/a/b.md", "/home/somebody/c.md")
    assert config.data.sources[1].hub == "org/data"
    assert config.data.sources[2].files == (f"{elsewhere}/d.txt",)
    assert config.model.pretrained == "weights"  # nothing of that name beside the working directory: a hub id
    assert config.data.tokenizer.path == f"{elsewhere}/t"
    assert (config.runs, config.data.prepared) == (f"{elsewhere}/runs", f"{elsewhere}/data-cache")

    path.write_text(path.read_text().replace("{config: {model_type: llama}}", "{pretrained: weights}"))
    assert load_config(path).model.pretrained == f"{folder}/weights"


def test_the_resolved_config_of_a_run_loads_equal_from_anywhere(minimal, monkeypatch, tmp_path):
    config = load_config(minimal, ["data.sources.0={files: [x.txt]}", "model.config.layers=[1, {a: 1e-3}]"])
    run = tmp_path / "run"
    (run / "deeper").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    monkeypatch.chdir(run / "deeper")
    assert read_run_config(run) == config
    assert load_config(run / "config.yaml") == config


def test_the_dump_says_every_option_in_the_order_of_the_schema(minimal):
    lines = dump_config(load_config(minimal)).splitlines()
    top = [line.partition(":")[0] for line in lines if line and not line.startswith(" ")]
    assert top == list(RunConfig.model_fields)
    assert "  betas: [0.9, 0.95]" in lines
    assert "  path: null" in [line[2:] for line in lines]


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory: it holds no config"):
        read_run_config(tmp_path)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
NUMBER = st.floats(1e-12, 1e6)


@given(
    lr=NUMBER,
    eps=NUMBER,
    template=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    name=TEXT,
    model=st.dictionaries(
        TEXT, st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | NUMBER | TEXT, st.lists)
    ),
    ranges=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=3),
    stage=st.sampled_from([0, 1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_any_config_survives_its_dump(tmp_path_factory, lr, eps, template, name, model, ranges, stage):
    config = RunConfig.model_validate(
        {
            "name": name,
            "data": {"sources": ({"hub": name, "template": template},), "exclude_batches": tuple(ranges)},
            "model": {"config": model},
            "batch": {"samples": 1, "micro": 1},
            "optim": {"lr": lr, "eps": eps},
            "schedule": {"duration": 1},
            "zero": {"stage": stage},
        }
    )
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert read_run_config(run) == config


@given(lr=NUMBER, samples=st.integers(1, 10**12), name=TEXT, shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_override_is_what_the_file_would_say(tmp_path_factory, lr, samples, name, shuffle):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(MINIMAL)
    quoted = "'" + name.replace("'", "''") + "'"
    config = load_config(
        path, [f"optim.lr={lr!r}", f"batch.samples={samples}", f"name={quoted}", f"data.shuffle={str(shuffle).lower()}"]
    )
    assert (config.optim.lr, config.batch.samples, config.name, config.data.shuffle) == (lr, samples, name, shuffle)


@given(st.sampled_from([option.path for option in options() if len(option.name) > 3]), st.data())
def test_one_letter_left_out_is_answered_with_the_option(path, data):
    parent, _, name = path.rpartition(".")
    gone = data.draw(st.integers(1, len(name) - 1))
    typo = f"{parent}.{name[:gone]}{name[gone + 1 :]}".lstrip(".")
    if typo not in [option.path for option in options()]:
        assert nearest(typo) == path


def test_loading_is_free_of_torch_and_transformers():
    code = "import sys, trainer.config.load, trainer.config.check; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
