"""The folder of the ranks' signs of life, and deaths that nobody saw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import lookout
from launcher.lookout import beats_folder
from trainer.heartbeat import FOLDER_VARIABLE, read_beats

ROOT = Path(__file__).parents[3]


def test_a_death_before_the_first_look_is_noticed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say any more what it died of, but the others do not wait for it for ever."""
    monkeypatch.setattr(lookout, "DEATH_GRACE_SECONDS", 0.0)
    code = "from trainer.heartbeat import open_heartbeat; open_heartbeat(1).beat({!r})"
    for phase, seen in (("computing", "rank 1 died"), ("ending", None)):
        with beats_folder(2) as beats:
            look = lookout.Lookout(beats, None, tmp_path)
            assert look(os.getpid()) is None
            variables = {"PYTHONPATH": str(ROOT), FOLDER_VARIABLE: str(beats)}
            subprocess.run([sys.executable, "-c", code.format(phase)], env=os.environ | variables, check=True)
            look(os.getpid())
            assert look(os.getpid()) == seen


def test_the_folder_of_the_beats_is_in_memory_and_goes_with_the_launcher() -> None:
    with beats_folder(3) as folder:
        assert [beat.rank for beat in read_beats(folder)] == [0, 1, 2]
    assert not folder.exists()


def test_what_a_killed_launcher_left_is_swept_and_what_a_living_one_holds_is_not() -> None:
    code = (
        "import os, sys\nfrom launcher.lookout import beats_folder\n"
        "with beats_folder(1) as folder:\n    print(folder, flush=True)\n    sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    os.utime(folder, (1, 1))
    with beats_folder(1):
        assert folder.is_dir()
    process.kill()
    process.communicate()
    assert folder.is_dir()
    with beats_folder(1):
        assert not folder.exists()
