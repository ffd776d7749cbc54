"""`trimtab teach` up to where ranks would be started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import teach
from launcher.start import Request
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, LaunchError

SAY: list[str] = []


@pytest.fixture
def make_request(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Request]:
    def make(**changes: object) -> Request:
        distill = {"teacher": {"place": "cache", "pretrained": "x"}, "cache": {"folder": str(tmp_path / "cache")}}
        config = make_config(**{"stage": "distill", "distill": distill, **changes})
        return Request(config, tmp_path / "runs" / "small", ())

    return make


def refused(request: Request, *splits: str) -> str:
    with pytest.raises((ConfigError, LaunchError)) as error:
        teach.teach(request, splits or ("train",), False, SAY.append)
    assert not (request.root.parent.parent / "cache").exists(), "nothing was begun"
    return str(error.value)


def test_what_is_refused_before_anything_is_prepared(make_request: Callable[..., Request]) -> None:
    assert "--split takes train or held_out, not 'test'" in refused(make_request(), "train", "test")
    said = refused(make_request(cluster={"nodes": 2}))
    assert "starts this one only" in said
    assert "cluster.nodes=1" in said
    assert "need a GPU each" in refused(make_request(cluster={"device": "cuda"}))
    assert "no cache" in refused(make_request(objective={"kind": "masked"}))
    assert "distill: is not given" in refused(make_request(distill=None))


def test_ranks_are_started_from_a_folder_beside_the_caches(
    make_request: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each end of the ranks, with what is said and the exit code that follows."""
    request = make_request()
    folder = tmp_path / "cache" / ".teach" / "small"
    monkeypatch.setattr(teach.start, "prepare", lambda root, lock, say: (root / "model.json").write_text("{}"))
    monkeypatch.setattr(teach, "_write_launcher_files", lambda files, config: None)
    ended = teach.local.Ended(0, None, killed=False)
    outcomes = {
        "completed": ({"reason": "completed", "exit_code": 0, "message": "m"}, ended, None, 0, None),
        "stopped": ({"reason": "stopped", "exit_code": 75, "message": "m"}, ended, None, 75, "m"),
        "refused": ({"reason": "refused", "exit_code": 2, "message": "m"}, ended, None, 2, None),
        "crashed": ({"reason": "crashed", "exit_code": 1, "message": "rank 0: x"}, ended, None, 1, "rank 0: x; "),
        "killed": ({"reason": "crashed", "exit_code": 1, "message": "rank 0: x"}, ended, "rank 1 died", 1, "rank 1 d"),
        "silent": (None, teach.local.Ended(3, None, killed=False), None, 1, "the ranks ended with exit code 3; "),
        "early": (None, teach.local.Ended(1, teach.local.signal.SIGTERM, killed=False), None, 75, teach.STOPPED),
    }
    for outcome, how, killed, code, said in outcomes.values():

        def launch(root: Path, *_: object, outcome=outcome, how=how, killed=killed) -> object:
            assert root == folder
            assert not (root / "outcome.json").exists(), "of the start before"
            assert json.loads((root / "teach.json").read_text()) == {"splits": ["held_out", "train"], "sharded": True}
            assert (root / "config.yaml").exists()
            if outcome:
                (root / "outcome.json").write_text(json.dumps(outcome))
            return how, killed

        monkeypatch.setattr(teach, "_launch", launch)
        heard: list[str] = []
        assert teach.teach(request, ["held_out", "train", "held_out"], True, heard.append) == code
        assert heard == [] if said is None else heard[-1].startswith(said)
    assert not request.root.exists(), "the run itself is left alone"
