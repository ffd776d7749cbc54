"""Which rank a process is, from its environment."""

from __future__ import annotations

import pytest

from trainer.engine.ranks import first_slurm_host, read_ranks
from trainer.errors import LaunchError


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("gpu[003-010,12],login1", "gpu003"),
        ("a1,b2", "a1"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_slurm_host(nodelist) == host


def test_no_host_is_refused() -> None:
    with pytest.raises(LaunchError, match="names no host"):
        first_slurm_host("")


def test_torch_variables_need_nothing_more() -> None:
    ranks, missing = read_ranks({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "9"})
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)
    assert missing == {}


def test_srun_variables_are_completed_alike_on_all_ranks() -> None:
    def environment(rank: int) -> dict[str, str]:
        return {
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_ID": "123456",
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": str(rank % 2),
            "SLURM_STEP_NODELIST": "node[1-2]",
        }

    completed = [read_ranks(environment(rank)) for rank in range(4)]
    assert [ranks.rank for ranks, _ in completed] == [0, 1, 2, 3]
    assert {missing["MASTER_ADDR"] for _, missing in completed} == {"node1"}
    assert len({missing["MASTER_PORT"] for _, missing in completed}) == 1


def test_a_batch_script_without_srun_is_one_process() -> None:
    """sbatch sets SLURM_PROCID=0 for the script itself, but no step: it must not wait for other tasks."""
    ranks, missing = read_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "5"})
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert missing["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK is 'x', not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "does not lie in a world of 2"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        read_ranks(environment)
