"""One cluster for all tests that are marked `slurm`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab import Lab, LabUnavailableError


@pytest.fixture(scope="session")
def session_lab() -> Iterator[Lab]:
    made = Lab()
    try:
        made.up()
    except LabUnavailableError as error:
        made.close()
        if os.environ.get("TRIMTAB_REQUIRE_SLURM") == "1":
            pytest.fail(f"no Slurm cluster, and TRIMTAB_REQUIRE_SLURM=1: {error}")
        pytest.skip(str(error))
    yield made
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
