"""Every damage to a checkpoint that the tests know, what is said, what is loaded: `python benchmarks/damage.py`.

Three checkpoints are written and the newest is damaged; then a start looks for what it can go on from.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/checkpoint")]

from small_checkpoints import Said, make_state, make_store, same, save_steps  # noqa: E402
from test_damage import CASES  # noqa: E402

from trainer.checkpoint import store  # noqa: E402


def row(case: str) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        save_steps(make_store(folder), 1, 2, 3)
        CASES[case][0](folder / "step-00000003")
        said: Said = []
        loaded = make_store(folder, said).load_newest()
        assert loaded is not None, case
        directory, manifest, state = loaded
        assert same(state, make_state(manifest.step)), case
        assert not (Path(name) / "ran").exists(), "a pickle was executed"
        text = " ".join(text for _, text in said).replace(f"{folder}/", "")
    text = re.sub(r"\b([0-9a-f]{6})[0-9a-f]{26}\b", r"\1…", text).replace(name, "").replace("|", "\\|")
    return f"| {case} | {text} | {directory.name} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/damage.md")
    options = parser.parse_args()
    # a file that is not there may still come from another node; here it does not
    store._PATIENCE_SECONDS = 0.0
    lines = ["| damage to step-00000003 | what is said | loaded |", "| --- | --- | --- |", *map(row, CASES)]
    table = "\n".join(lines)
    print(table)
    if options.write:
        head = f"# Damaged checkpoints ({datetime.date.today()})"
        text = f"{head}\n\n`python benchmarks/damage.py --write`. Hashes are cut.\n\n{table}\n"
        (ROOT / "benchmarks/results/damage.md").write_text(text)


if __name__ == "__main__":
    main()
