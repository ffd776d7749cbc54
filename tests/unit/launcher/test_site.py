"""The site file: every problem at once, each in a sentence; the page and the example that go with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.slurm.document import document
from launcher.slurm.site import ContainerConfig, SiteConfig, load_site, site_path
from launcher.slurm.texts import ELSEWHERE, seconds_of
from trainer.config.options import walk
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "slurm" / "site.example.yaml"


def problems_of(path: Path, text: str) -> list[tuple[str, str]]:
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_site(path)
    assert refused.value.source == str(path)
    return refused.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "site.yaml"


def test_a_site_is_read_as_it_is_written(file: Path) -> None:
    file.write_text(
        "partition: gpu\ntime: 24:00:00\nexclusive: false\nmodules: [cuda/12]\n"
        'directives: {constraint: "a&b", switches: 1, contiguous: true}\nenvironment: {HF_HUB_OFFLINE: "1"}\n'
        'container: {image: x.sqsh, mounts: ["/a", "/b:/b:ro"]}\n'
    )
    site = load_site(file)
    assert site.directives == {"constraint": "a&b", "switches": 1, "contiguous": True}
    assert (site.partition, site.time, site.exclusive, site.modules) == ("gpu", "24:00:00", False, ("cuda/12",))
    assert site.container == ContainerConfig(image="x.sqsh", mounts=("/a", "/b:/b:ro"))


@pytest.mark.parametrize(
    ("text", "path", "sentence"),
    [
        ("partitoin: x", "partitoin", "is not an option; did you mean `partition`?"),
        ("preflight: {disk: 1}", "preflight.disk", "is not an option; did you mean `preflight.disk_gib`?"),
        ("time: 60s", "time", "must be a time as sbatch knows it: `24:00:00`, `2-00:00:00`, or minutes"),
        ("cpus_per_task: 0", "cpus_per_task", "must be greater than 0, but is 0"),
        ("signal_seconds: 65536", "signal_seconds", "must be at most 65535, but is 65536"),
        ("directives: {x: 1.5}", "directives.x", "must be text, a whole number, or true or false, but is 1.5"),
        ('directives: {comment: "a\\nb"}', "directives.comment", "must be one line of text, but is the text 'a\\nb'"),
        ("directives: {--nice: 3}", "directives.--nice", "is not the name of an option of sbatch, without dashes"),
        ("environment: {A B: x}", "environment.A B", "is not the name of a variable of the environment"),
        ("environment: {A: 1}", "environment.A", "must be text, but is 1"),
        ('setup: ["a\\nb"]', "setup.0", "must be one line of text, but is the text 'a\\nb'"),
        (
            'container: {image: x, mounts: ["/a:/b,/c"]}',
            "container.mounts.0",
            "must be `/from:/to` or `/from:/to:ro`, and no path may have a comma",
        ),
        ("container: {}", "container.image", "is missing, and has no default"),
        ("- a", "", "it must be a mapping of options (`name: value`), but is a list"),
        ("a: [", "", "line 1, column 5: expected the node content, but found '<stream end>'"),
    ],
)
def test_what_is_wrong_is_said(file: Path, text: str, path: str, sentence: str) -> None:
    assert problems_of(file, text) == [(path, sentence)]


def test_all_problems_at_once(file: Path) -> None:
    found = problems_of(file, "time: soon\nmax_jobs: 0\ndirectives: {nodes: 2, signal: USR1, nice: 1.5}\nfoo: 1\n")
    directives = ["directives.nodes", "directives.signal", "directives.nice"]
    assert [path for path, _ in found] == ["time", *directives, "max_jobs", "foo"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_set_elsewhere_is_no_directive(file: Path, name: str) -> None:
    assert problems_of(file, f"directives: {{{name}: x}}") == [
        (f"directives.{name}", f"is not for `directives`: {ELSEWHERE[name]}")
    ]


def test_options_that_the_refusals_name_exist() -> None:
    known = {option.path for option in walk(SiteConfig)}
    for where in ELSEWHERE.values():
        for name in re.findall(r"set `(\w+)`(?! of the run)|and `(\w+)`;", where):
            assert (name[0] or name[1]) in known, where


def test_an_empty_file_leaves_everything_to_the_scheduler(file: Path) -> None:
    file.write_text("# nothing\n")
    assert load_site(file) == SiteConfig()


def test_a_file_that_is_named_must_exist(file: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_site(file)


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here, named = tmp_path / "home", tmp_path / "here", tmp_path / "named.yaml"
    of_home = home / ".config" / "trimtab" / "site.yaml"
    of_home.parent.mkdir(parents=True)
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TRIMTAB_SITE", raising=False)
    monkeypatch.chdir(here)
    assert site_path(None) is None
    assert load_site(None) == SiteConfig()
    of_home.write_text("qos: home")
    assert load_site(None).qos == "home"
    Path("site.yaml").write_text("qos: here")
    assert load_site(None).qos == "here"
    named.write_text("qos: named")
    monkeypatch.setenv("TRIMTAB_SITE", str(named))
    assert load_site(None).qos == "named"
    assert load_site(Path("site.yaml")).qos == "here"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-0:30", 88200), ("1-1:1:1", 90061)],
)
def test_times_are_those_of_sbatch(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@given(st.text(max_size=12))
def test_no_text_is_too_strange_for_a_time(text: str) -> None:
    assert (seconds_of(text) or 0) >= 0


def test_the_page_is_current() -> None:
    page = ROOT / "docs" / "site.md"
    assert page.read_text(encoding="utf-8") == document(), "run: python -m launcher.slurm.document > docs/site.md"


def test_every_option_is_documented() -> None:
    assert [option.path for option in walk(SiteConfig) if not option.field.description] == []


def test_the_example_loads_with_nothing_and_with_everything_taken_in(file: Path) -> None:
    assert load_site(EXAMPLE) == SiteConfig()
    file.write_text(re.sub(r"^#(?! \S)", "", EXAMPLE.read_text(), flags=re.MULTILINE))
    site = load_site(file)
    left_out = {option.name for option in walk(SiteConfig) if not option.parent} - site.model_fields_set
    assert left_out == set()
    assert site.setup == ("source /opt/site/env.sh", "ulimit -l unlimited")
