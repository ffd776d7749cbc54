import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.run_directory import (
    HARMLESS,
    Difference,
    create,
    differences,
    has_trained,
    locked,
    move_aside,
    read_outcome,
    run_path,
    write_atomically,
)
from trainer.config.options import options
from trainer.config.resolve import fingerprint
from trainer.config.schema import RunConfig
from trainer.errors import RunDirectoryError

MakeConfig = Callable[..., RunConfig]


def test_equal_configs_do_not_differ(make_config: MakeConfig) -> None:
    assert differences(make_config(), make_config()) == []


def test_differences_are_named_by_dotted_path_and_sorted_into_harmless_and_not(make_config: MakeConfig) -> None:
    new = make_config(
        seed=7,
        optim={"lr": 2e-3},
        telemetry={"norms_every": 5},
        checkpoint={"every": None},
        cluster={"threads_per_rank": 1},
        model={"config": {"model_type": "llama", "hidden_size": 48, "rope_theta": 1e5}},
    )
    found = differences(make_config(), new)
    assert [(str(item), item.harmless) for item in found] == [
        ("seed: 0 → 7", False),
        ("model.config.hidden_size: 32 → 48", False),
        ("model.config.num_hidden_layers: 2 → (absent)", False),
        ("model.config.rope_theta: (absent) → 100000.0", False),
        ("optim.lr: 0.001 → 0.002", False),
        ("checkpoint.every: 500 → null", True),
        ("telemetry.norms_every: 1 → 5", True),
        ("cluster.threads_per_rank: null → 1", True),
    ]


def test_elements_of_lists_are_compared_one_by_one(make_config: MakeConfig) -> None:
    data = make_config().data.model_dump(mode="json")
    one, two = {"files": ["/a.txt"]}, {"files": ["/b.txt"]}
    old = make_config(data=data | {"sources": [one]})
    new = make_config(data=data | {"sources": [two, one]})
    first, second = differences(old, new)
    assert str(first) == 'data.sources.0.files.0: "/a.txt" → "/b.txt"'
    assert (second.path, second.harmless) == ("data.sources.1", False)


def test_harmless_names_are_options_and_no_option_is_harmless_by_a_common_beginning() -> None:
    paths = {option.path for option in options()}
    assert set(HARMLESS) <= paths
    assert not Difference("cluster.threads_per_rank_and_more", 1, 2).harmless
    assert not Difference("schedule.duration", 1, 2).harmless


def test_what_may_change_does_not_change_what_a_checkpoint_is_of(make_config: MakeConfig) -> None:
    """The trainer refuses a checkpoint of another fingerprint: what is accepted here must not enter it."""
    old = make_config()
    data = old.data.model_dump(mode="json")
    new = make_config(
        runs="/elsewhere",
        telemetry={"norms_every": 5, "weights_every": None, "tensorboard": False, "console": "quiet"},
        evaluation={"every": 3, "max_samples": 2},
        checkpoint={"every": 3, "keep": 1},
        guard={"max_consecutive_skips": 3},
        snapshots={"every": 3, "keep": 5},
        supervision={"restarts": 7},
        zero={"stage": 3, "offload": "all", "overlap": False, "bucket_elements": 7},
        batch={"samples": 8, "micro": 4},
        cluster={"threads_per_rank": 3, "nodes": 2, "ranks_per_node": 4},
        data=data | {"workers": 1, "prefetch": 0, "prepared": "/elsewhere", "accept_changed": True},
    )
    found = differences(old, new)
    assert all(difference.harmless for difference in found)
    assert {name for name in HARMLESS if any(item.path.startswith(name) for item in found)} == set(HARMLESS)
    assert fingerprint(old) == fingerprint(new)
    for change in ({"batch": {"samples": 16, "micro": 2}}, {"precision": "bf16"}, {"optim": {"lr": 2e-3}}, {"seed": 1}):
        assert fingerprint(make_config(**change)) != fingerprint(old), change
        assert not all(difference.harmless for difference in differences(old, make_config(**change))), change


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", "/etc", "."])
def test_a_name_that_leads_out_of_the_folder_of_runs(make_config: MakeConfig, name: str) -> None:
    with pytest.raises(RunDirectoryError, match="without slashes"):
        run_path(make_config(name=name))


@given(text=st.text(max_size=200))
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    path = tmp_path_factory.mktemp("files") / "file"
    write_atomically(path, "before")
    write_atomically(path, text)
    assert path.read_bytes() == text.encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_content_and_no_remains(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "no \udcff text")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "file", "x")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "x"
    create(root)
    create(root)
    (root / "thesis.tex").write_text("precious")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        create(root)
    with pytest.raises(RunDirectoryError, match="is a file"):
        create(root / "thesis.tex")
    (root / "config.yaml").write_text("")
    create(root)


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    # /proc takes no files from anybody, root included
    with pytest.raises(
        RunDirectoryError, match=r"^the run directory /proc/runs/x is not writable \(.+\); change"
    ) as error:
        create(Path("/proc/runs/x"))
    assert "\n" not in str(error.value)


def test_moving_aside_keeps_everything_and_takes_the_first_free_number(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "ledger.jsonl").write_text(content)
        move_aside(tmp_path / "x")
    assert (tmp_path / "x.old-1" / "ledger.jsonl").read_text() == "first"
    assert (tmp_path / "x.old-2" / "ledger.jsonl").read_text() == "second"
    assert not (tmp_path / "x").exists()


def test_a_second_start_is_refused_with_the_process_that_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher.run_directory import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunDirectoryError, match=f"process {holder.pid} on this machine"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):  # the death of the holder frees it
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_lasts_as_long_as_a_process_that_inherited_it(tmp_path: Path) -> None:
    """A launcher that was killed does not free the run while its ranks still write."""
    with locked(tmp_path) as descriptor:
        assert descriptor is not None
        heir = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(descriptor,)
        )
    with heir, pytest.raises(RunDirectoryError, match="being run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_what_counts_as_trained(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert not has_trained(tmp_path)
    (tmp_path / "ledger.jsonl").write_text("")
    assert has_trained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"reason": 3}', "\xff"])
def test_a_damaged_outcome_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "outcome.json").write_bytes(text.encode("latin-1"))
    assert read_outcome(tmp_path) is None
