"""What a job reads of its allocation."""

from __future__ import annotations

import pytest

from launcher.slurm.allocation import Allocation, read_allocation, usable
from trainer.errors import LaunchError

NODES = {"n[1-2]": ["n1", "n2"]}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}


def allocated(**more: str) -> Allocation:
    return read_allocation(JOB | more, NODES.__getitem__, lambda: 1000.0)


def test_the_first_start_has_no_restart_count() -> None:
    assert allocated() == Allocation("7", 0, ("n1", "n2"), 1000.0)
    assert allocated(SLURM_RESTART_COUNT="3").restart == 3


def test_an_array_task_is_named_by_array_and_index() -> None:
    assert allocated(SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="2").job == "6_2"


def test_newer_schedulers_say_when_it_began() -> None:
    assert allocated(SLURM_JOB_START_TIME="900").began == 900.0


def test_other_places_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"components of different kinds \(SLURM_HET_SIZE\)"):
        allocated(SLURM_HET_SIZE="2")
    with pytest.raises(LaunchError, match="SLURM_JOB_NODELIST is not set: this runs in a batch script"):
        read_allocation({}, NODES.__getitem__)


@pytest.mark.parametrize(
    ("nodes", "fewest", "expected"), [(4, 2, 4), (3, 2, 2), (3, 1, 2), (3, 3, None), (1, 2, None), (0, 1, None)]
)
def test_as_many_nodes_as_divide_the_batch(nodes: int, fewest: int, expected: int | None) -> None:
    assert usable(nodes, fewest, lambda number: 8 % number == 0) == expected
