"""All tests, in two lanes at once: `python tests/lanes.py`.

Whole runs and clusters mostly wait for one another, which leaves room for the tests of single parts beside them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHOLE = ("tests/e2e", "tests/slurm")


def pytest(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, **options)  # type: ignore[call-overload,no-any-return]


def main() -> int:
    """Exit code 0 where every lane passed; else the first one's that did not."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        lanes = pytest(*WHOLE, stdout=log, stderr=subprocess.STDOUT), pytest(*(f"--ignore={each}" for each in WHOLE))
        try:
            codes = [lane.wait() for lane in reversed(lanes)]
        except KeyboardInterrupt:
            # both got it from the terminal, and stop what they have started
            codes = [lane.wait() for lane in lanes]
        log.seek(0)
        sys.stdout.buffer.write(log.read())
    print(f"both lanes took {time.monotonic() - began:.0f} s")
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
