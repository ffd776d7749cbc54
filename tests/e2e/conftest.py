"""Workspaces: one that a test may change, one that ran to its end, one whose data is there already."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from workspace import Workspace, make_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = make_workspace(tmp_path / "work")
    yield made
    made.close()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace in which `small` ran to its end; read only."""
    made = make_workspace(tmp_path_factory.mktemp("e2e") / "work")
    code, output = made.trimtab("run", "config.yaml")
    assert code == 0, output
    (made.root / "output.txt").write_text(output)
    yield made
    made.close()


@pytest.fixture
def prepared(workspace: Workspace, uninterrupted: Workspace) -> Workspace:
    """A workspace whose data is there already, so that a start is quick."""
    shutil.copytree(uninterrupted.root / "data-cache", workspace.root / "data-cache")
    return workspace


@pytest.fixture
def unused_port() -> int:
    """A port that was free a moment ago, for launchers that cannot find one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
