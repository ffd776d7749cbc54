"""One cluster for all tests that are marked `slurm`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, LabUnavailableError
from submitted import SMALL, Cluster
from workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def session_lab() -> Iterator[Lab]:
    made = Lab()
    try:
        made.up()
        yield made
    except LabUnavailableError as error:
        if os.environ.get("TRIMTAB_REQUIRE_SLURM") == "1":
            pytest.fail(f"no Slurm cluster, and TRIMTAB_REQUIRE_SLURM=1: {error}")
        pytest.skip(str(error))
    finally:
        made.close()


@pytest.fixture
def lab(session_lab: Lab) -> Iterator[Lab]:
    """A cluster on which nothing runs, all of whose nodes serve; and it is left like that."""
    session_lab.free_all()
    yield session_lab
    session_lab.free_all()


@pytest.fixture
def lab_with_machines(lab: Lab) -> Lab:
    """The same, where each node has a network and processes of its own."""
    if lab.mode != "namespaces":
        pytest.skip("nodes share this machine's network: namespaces are not allowed here")
    return lab


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace in which `small` ran to its end on two ranks of this machine; its data is there for all."""
    made = make_workspace(tmp_path_factory.mktemp("local") / "work")
    code, output = made.trimtab("run", "config.yaml", *SMALL)
    assert code == 0, output
    yield made
    made.close()


@pytest.fixture
def cluster(lab: Lab, local: Workspace, tmp_path: Path) -> Iterator[Cluster]:
    """A workspace whose runs go to the cluster; what they need is prepared."""
    made = make_workspace(tmp_path / "work")
    shutil.copytree(local.root / "data-cache", made.root / "data-cache")
    cluster = Cluster(lab, made)
    cluster.site()
    yield cluster
    made.close()
