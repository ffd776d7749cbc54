"""The best checkpoint: marked before or after its commit, kept, given up in a rollback, exported."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from small_checkpoints import make_manifest, make_state, make_store, save_steps

from trainer.checkpoint.manifest import BEST, best_score, name_of
from trainer.checkpoint.retain import Kept, doomed
from trainer.checkpoint.store import Saved
from trainer.config.files import RunFiles
from trainer.stages.export import choose
from trainer.starts import begin


def there(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("step-????????"))


def marked(folder: Path) -> list[int]:
    return [step for step in there(folder) if best_score(folder / name_of(step)) is not None]


@given(st.lists(st.tuples(st.booleans(), st.booleans())), st.integers(1, 4))
def test_the_newest_best_and_the_newest_healthy_best_stay(flags: list[tuple[bool, bool]], keep: int) -> None:
    kept = [Kept(step, healthy, best) for step, (healthy, best) in enumerate(flags)]
    gone = set(doomed(kept, keep))
    best = [one.step for one in kept if one.best]
    proven = [one.step for one in kept if one.best and one.healthy]
    assert not gone & {*best[-1:], *proven[-1:]}
    # without them it would be as it was, but for these two
    before = set(doomed([Kept(one.step, one.healthy) for one in kept], keep))
    assert before - gone <= {*best[-1:], *proven[-1:]}
    assert gone <= before


def test_the_best_one_stays(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=1)
    save_steps(store, 1)
    store.mark_healthy(1)
    save_steps(store, 2)
    store.mark_best(2, "accuracy", 0.75)
    assert json.loads((tmp_path / name_of(2) / BEST).read_text()) == {"score": "accuracy", "value": 0.75}
    store.mark_healthy(2)
    save_steps(store, 3)
    store.mark_healthy(3)
    save_steps(store, 4, 5)
    assert there(tmp_path) == [2, 3, 4, 5]
    store.mark_best(5, "accuracy", 0.8)
    store.mark_healthy(5)
    save_steps(store, 6)
    assert there(tmp_path) == [5, 6]
    store.forget_best()
    store.mark_healthy(6)
    save_steps(store, 7)
    assert there(tmp_path) == [6, 7]


def test_it_is_marked_before_the_commit_too(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=1)
    hold = threading.Event()

    def state() -> object:
        hold.wait()
        return make_state(2)

    store.begin(state, make_manifest(2))  # type: ignore[arg-type]
    store.mark_best(2, "loss", 1.5)
    hold.set()
    assert isinstance(store.drain(), Saved)
    assert marked(tmp_path) == [2]


def test_a_rollback_gives_it_up(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=5)
    for step in (1, 2, 3):
        save_steps(store, step)
        store.mark_best(step, "loss", 3.0 - step)
    store.abandon_after(1)
    assert marked(tmp_path) == [1]
    # the same step again is another state
    save_steps(store, 2)
    assert marked(tmp_path) == [1]


def test_the_best_of_the_history_is_exported(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    fence = begin(files)
    fence.resumed(0, 0)
    store = make_store(files.checkpoints, fence=fence, keep=9)
    save_steps(store, 1, 2, 3, 4)
    assert choose(files, None, None, best="loss") == (name_of(4),)
    store.mark_best(1, "loss", 2.0)
    store.mark_best(3, "loss", 1.0)
    assert choose(files, None, None, best="loss") == (name_of(3),)
    assert choose(files, None, None) == (name_of(4),)
    assert choose(files, name_of(2), None, best="loss") == (name_of(2),)
    # marked by another score
    assert choose(files, None, None, best="accuracy") == (name_of(4),)
    # what a start that was cut off called best
    begin(files).resumed(1, 2)
    assert choose(files, None, None, best="loss") == (name_of(1),)
    (files.checkpoints / name_of(1) / BEST).write_text("{")
    assert choose(files, None, None, best="loss") == (name_of(2),)
