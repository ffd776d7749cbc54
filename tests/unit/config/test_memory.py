"""Host memory: what snapshots take, what is free within a container's limit, and whether it is enough."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.config.memory import host_memory_available, host_memory_total, shortage, snapshot_bytes
from trainer.config.schema import RunConfig

GIB = 2**30


def config_with(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "data": {"sources": ({"stdlib": True},)},
            "model": {"config": {"model_type": "llama"}},
            "batch": {"samples": 8, "micro": 8},
            "optim": {"lr": 1e-3},
            "schedule": {"duration": 1},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, (3 + 1) * (12 * 1000 + 40)),
        ({"snapshots": {"keep": 5}}, (5 + 1) * (12 * 1000 + 40)),
        ({"snapshots": {"every": None}}, 12 * 1000 + 40),
        ({"guard": {"mode": "off"}}, 12 * 1000 + 40),
        ({"checkpoint": {"background": False}}, 3 * (12 * 1000 + 40)),
        ({"checkpoint": {"memory_every": 5}}, (3 + 2) * (12 * 1000 + 40)),
        ({"guard": {"mode": "off"}, "checkpoint": {"every": None}}, 0),
    ],
)
def test_what_the_snapshots_of_a_rank_take(sections, expected):
    assert snapshot_bytes(config_with(**sections), 1000, buffer_bytes=40) == expected


def test_what_a_host_has_no_room_for_is_a_shortage():
    assert shortage(1 * GIB, 8, available=10 * GIB) is None
    assert shortage(2 * GIB, 8, available=10 * GIB) == ("16.0 GiB are needed on this host, and 9.0 GiB are free for it")
    assert shortage(0, 1) is None
    assert shortage(host_memory_total(), 1) is not None


def test_a_container_has_what_its_limit_leaves(tmp_path: Path):
    total = psutil.virtual_memory().total
    # no control group, or one without a limit
    assert host_memory_total(tmp_path) == total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{total}\n")
    assert host_memory_total(tmp_path) == total
    assert 0 < host_memory_available(tmp_path) < total

    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    assert host_memory_total(tmp_path) == 3_000_000
    assert host_memory_available(tmp_path) == 500_000
    # the kernel can drop cached files that nothing uses
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400000\nactive_file 7\n")
    assert host_memory_available(tmp_path) == 900_000
