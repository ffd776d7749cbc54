import subprocess
import sys

import pytest

from trainer.data.pool import Pool
from trainer.errors import WorkerDiedError

IMPORTED = (
    "(__import__('trainer.data.clean'), __import__('trainer.data.tokenize'), 'torch' in __import__('sys').modules)[2]"
)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    with Pool(workers) as pool:
        assert list(pool.map(eval, [f"{n} * {n}" for n in range(50)])) == [n * n for n in range(50)]
        assert list(pool.map(eval, [])) == []
        with pytest.raises(ZeroDivisionError):
            list(pool.map(eval, ["1", "1 / 0"]))


def test_workers_need_no_torch_and_a_killed_one_is_said():
    with Pool(2) as pool:
        assert list(pool.map(eval, [IMPORTED])) == [False]
        with pytest.raises(WorkerDiedError, match="a process that prepares data was killed"):
            list(pool.map(eval, ["__import__('os').kill(__import__('os').getpid(), 9)"]))


def test_the_main_module_is_not_run_again(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "print('main', flush=True)\n"
        "from trainer.data.pool import Pool\n"
        "with Pool(2) as pool:\n"
        "    assert list(pool.map(abs, range(-9, 0))) == list(range(9, 0, -1))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env={"PYTHONPATH": "."})
    assert done.stdout == "main\n"


def test_workers_end_with_their_parent(tmp_path):
    script = (
        "import os, signal; from trainer.data.pool import Pool\n"
        "with Pool(2) as pool:\n"
        "    print(next(pool.map(eval, ['__import__(\"os\").getpid()'])), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # the workers hold the pipe as long as they live: communicate() returns when the last one is gone
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -9
    assert int(output) > 0
