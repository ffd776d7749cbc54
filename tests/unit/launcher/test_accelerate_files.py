import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.accelerate import Command, Layout, Variable, accelerate_argv, accelerate_yaml, environment, ways_to_start

HERE = Layout(nodes=1, ranks_per_node=2, device="cpu", threads_per_rank=3)
CLUSTER = Layout(nodes=2, ranks_per_node=8, device="cuda", threads_per_rank=4)


@pytest.mark.parametrize("layout", [HERE, CLUSTER, Layout(1, 1, "cpu", 2), Layout(1, 1, "cuda", 2)])
def test_accelerate_reads_the_file_as_meant(layout: Layout, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = tmp_path / "accelerate.yaml"
    path.write_text(accelerate_yaml(layout))
    config = load_config_from_file(str(path))
    assert config.num_processes == layout.ranks
    assert config.num_machines == layout.nodes
    assert config.use_cpu == (layout.device == "cpu")
    assert config.distributed_type == "MULTI_GPU"
    assert config.mixed_precision == "no"
    # one machine: a free port at each start; several must agree on one
    assert (config.main_process_port == 0) == (layout.nodes == 1)


def test_only_a_cpu_run_is_forced_to_the_cpu() -> None:
    assert environment(HERE) == {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu"}
    assert environment(CLUSTER) == {"OMP_NUM_THREADS": "4"}


def test_the_commands_on_one_machine() -> None:
    agent = "OMP_NUM_THREADS=3 DS_ACCELERATOR=cpu PET_SHUTDOWN_TIMEOUT=300"
    settings = "OMP_NUM_THREADS=3 DS_ACCELERATOR=cpu"
    assert {command.title: command.shell() for command in ways_to_start(HERE, Path("/r/x"), port=4000)} == {
        "accelerate": f"{agent} accelerate launch --config_file /r/x/accelerate.yaml -m trainer /r/x",
        "torchrun": f"{agent} torchrun --nproc-per-node 2 --standalone -m trainer /r/x",
        "deepspeed": f"{settings} deepspeed --num_gpus 2 --master_port 4000 --no_local_rank --module trainer /r/x",
        "srun": f"{settings} srun --nodes 1 --ntasks-per-node 2 --kill-on-bad-exit=1 python -m trainer /r/x",
    }


def test_the_commands_on_several_machines_expand_on_each() -> None:
    commands = {command.title: command.shell() for command in ways_to_start(CLUSTER, Path("/r/x"))}
    place = '--machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" -m trainer /r/x'
    assert commands["accelerate"].endswith(f"accelerate launch --config_file /r/x/accelerate.yaml {place}")
    assert (
        '--nnodes 2 --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port 29500' in commands["torchrun"]
    )
    assert '--hostfile "$HOSTFILE" --num_nodes 2 --no_ssh --node_rank "$NODE_RANK"' in commands["deepspeed"]
    assert "srun --nodes 2 --ntasks-per-node 8" in commands["srun"]


def test_the_command_that_is_run_uses_this_python() -> None:
    argv = accelerate_argv(Path("/r/x y"))
    assert argv[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert argv[-3:] == ["-m", "trainer", "/r/x y"]


@given(words=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20), max_size=4))
def test_a_shell_reads_back_the_words(words: list[str]) -> None:
    assert shlex.split(Command("x", tuple(words)).shell()) == words


def test_hostile_names_do_nothing_in_a_shell(tmp_path: Path) -> None:
    hostile = "$(touch x); `touch x` \"'$HOME\n*"
    command = Command("x", ("printf", "%s|", hostile, Variable("NODE")), {"NODE": hostile}).shell()
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    # a variable is expanded by the shell that starts the command, once and not again
    assert done.stdout == f"{hostile}||"
    assert list(tmp_path.iterdir()) == []
