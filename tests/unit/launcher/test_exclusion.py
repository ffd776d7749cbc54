import json
import multiprocessing
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.slurm.exclusion import FOLDER, Exclusion, checked, exclude, excluded, forgive
from trainer.errors import LaunchError, RunDirectoryError

NOW = 1_800_000_000.0


def test_a_node_is_left_out_until_its_time_is_over(tmp_path: Path) -> None:
    assert excluded(tmp_path, NOW) == {}
    exclude(tmp_path, "node3", 'node3: "only" 0.4 GiB\nare free', "a run", NOW, 2.0)
    expected = Exclusion(node="node3", why='node3: "only" 0.4 GiB\nare free', run="a run", since=NOW, until=NOW + 7200)
    assert excluded(tmp_path, NOW + 7199) == {"node3": expected}
    assert excluded(tmp_path, NOW + 7200) == {}
    # swept, with nothing left behind
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_what_is_known_later_stands_but_never_shortens(tmp_path: Path) -> None:
    exclude(tmp_path, "a", "first", "one", NOW, 24.0)
    exclude(tmp_path, "a", "second", "two", NOW + 60, 1.0)
    found = excluded(tmp_path, NOW + 61)["a"]
    assert (found.why, found.run, found.until) == ("second", "two", NOW + 24 * 3600)


def test_a_forgiven_node_is_used_again(tmp_path: Path) -> None:
    exclude(tmp_path, "a", "slow", "one", NOW, 24.0)
    exclude(tmp_path, "b", "slow", "one", NOW, 24.0)
    assert forgive(tmp_path, "a")
    assert not forgive(tmp_path, "a")
    assert set(excluded(tmp_path, NOW)) == {"b"}


OF_ANOTHER = json.dumps({"node": "b", "why": "", "run": "", "since": 0, "until": 9e9}).encode()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"node": "a"}', b"\xff\xfe", OF_ANOTHER])
def test_a_damaged_file_is_said_and_stops_nobody(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    exclude(tmp_path, "well", "slow", "one", NOW, 1.0)
    damaged = tmp_path / FOLDER / "a.json"
    damaged.write_bytes(content)
    assert set(excluded(tmp_path, NOW)) == {"well"}
    assert f"warning: {damaged} does not count" in capsys.readouterr().err
    # and it can be written over
    exclude(tmp_path, "a", "slow", "one", NOW, 1.0)
    assert set(excluded(tmp_path, NOW)) == {"a", "well"}


def test_where_nothing_can_be_written_the_sentence_says_where(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"\.excluded cannot be made: File exists"):
        exclude(tmp_path, "a", "slow", "one", NOW, 1.0)
    assert excluded(tmp_path, NOW) == {}


@pytest.mark.parametrize(
    "node", ["", ".", "..", "../x", "a/b", "-a", "a b", "a\n", "a,b", "node[1-2]", "$(touch x)", "ü", "a" * 254, ".a"]
)
def test_what_is_no_name_of_a_node_becomes_no_file(tmp_path: Path, node: str) -> None:
    with pytest.raises(LaunchError, match="is not the name of a node"):
        exclude(tmp_path, node, "slow", "one", NOW, 1.0)
    with pytest.raises(LaunchError):
        forgive(tmp_path, node)
    assert list(tmp_path.iterdir()) == []


@given(st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=40))
def test_a_name_that_passes_is_a_plain_file_and_one_word(node: str) -> None:
    try:
        checked(node)
    except LaunchError:
        assert node[0] in "-_." or node[-1] in "-_."
    else:
        assert Path(f"{node}.json").name == f"{node}.json"
        assert not node.startswith(("-", "."))


def _exclude_often(folder: Path, who: int) -> None:
    for number in range(50):
        exclude(folder, f"node{number % 5}", f"by {who}", str(who), NOW + number, 1.0)


def test_jobs_that_write_and_sweep_at_once_leave_only_whole_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_exclude_often, args=(tmp_path, who)) for who in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert set(excluded(tmp_path, NOW)) <= {f"node{number}" for number in range(5)}
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert set(excluded(tmp_path, NOW)) == {f"node{number}" for number in range(5)}
    assert "warning" not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [f"node{n}.json" for n in range(5)]


def test_sweeping_takes_nothing_away_that_was_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job excludes the node again between the look and the sweep."""
    exclude(tmp_path, "a", "old", "one", NOW, 1.0)
    rename = Path.rename

    def first_the_other_job(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        exclude(tmp_path, "a", "new", "two", NOW + 4000, 1.0)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", first_the_other_job)
    excluded(tmp_path, NOW + 4000)
    assert excluded(tmp_path, NOW + 4001)["a"].why == "new"
