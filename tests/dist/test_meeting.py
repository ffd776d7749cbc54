"""Nodes that meet: processes of this machine, each of which is told that it is a node of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.preflight.examine import examine
from launcher.preflight.judging import Findings
from launcher.preflight.report import Report
from launcher.slurm.site import PreflightConfig

WANTED = PreflightConfig(memory_gib=0.01, disk_gib=0.01, disk_megabytes_per_second=0, timeout_seconds=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machine:
    """Starts what srun would start, but here."""

    def __init__(self, **differences: Mapping[str, str] | None):
        self.differences = differences
        """Node → variables of its environment; None: nothing starts there."""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.seconds = 0.0

    def run(self, nodes: Sequence[str], argv: Sequence[str], env: Mapping[str, str], timeout: float) -> int:
        began = time.monotonic()
        for node in nodes:
            own = self.differences.get(node, {})
            if own is not None:
                self.processes[node] = subprocess.Popen([*argv, "--node", node], env={**os.environ, **env, **own})
        codes = [process.wait(began + timeout - time.monotonic()) for process in self.processes.values()]
        self.seconds = time.monotonic() - began
        return max(codes, default=1)

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@contextmanager
def a_machine(**differences: Mapping[str, str] | None) -> Iterator[Machine]:
    machine = Machine(**differences)
    try:
        yield machine
    finally:
        machine.kill()


def examined(machine: Machine, folder: Path, nodes: str, port: int = 0, **wanted: float) -> Findings:
    return examine(
        nodes.split(), machine.run, folder, WANTED.model_copy(update=wanted), 0, sys.executable, "127.0.0.1",
        port or free_port(),
    )  # fmt: skip


def report_of(folder: Path, node: str) -> Report:
    return Report.model_validate_json((folder / f"{node}.json").read_bytes())


def test_nodes_that_are_well_find_each_other(tmp_path: Path) -> None:
    with a_machine() as machine:
        findings = examined(machine, tmp_path / "new" / "folder", "a b c")
    assert findings.well, findings.sentences
    assert 0 < findings.figures["link Gbit/s, slowest"] <= findings.figures["link Gbit/s, fastest"]
    assert findings.figures["clocks apart s, most"] < 0.1
    reports = {node: report_of(tmp_path / "new" / "folder", node) for node in "abc"}
    meetings = {node: report.meeting for node, report in reports.items()}
    for node, following in (("a", "b"), ("b", "c"), ("c", "a")):
        meeting = meetings[node]
        assert meeting is not None
        assert (meeting.stage, meeting.error, meeting.to, meeting.wrong) == ("done", "", following, ())
    # what the others are like, the first one heard from them
    assert [(report.node, report.memory_bytes) for report in reports["a"].heard] == [
        (node, reports[node].memory_bytes) for node in "bc"
    ]


@pytest.fixture
def site(tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """A folder of modules that Python finds first: `site(file, text)` gives the environment that has it."""

    def make(name: str, text: str) -> dict[str, str]:
        path = tmp_path / f"site-{name.replace('/', '-')}" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return {"PYTHONPATH": str(tmp_path / f"site-{name.replace('/', '-')}")}

    return make


@pytest.mark.slow
def test_each_node_that_is_unfit_is_named_with_the_reason(
    tmp_path: Path, site: Callable[[str, str], dict[str, str]]
) -> None:
    """One does not come; one has another clock, one another package, one no torch that could be imported."""
    clock = site("sitecustomize.py", "import time\nreal = time.time\ntime.time = lambda: real() + 60\n")
    version = site("accelerate-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: accelerate\nVersion: 0.1\n")
    broken = site("torch.py", "raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    with a_machine(b=clock, c=version, d=broken, e=None) as machine:
        findings = examined(machine, tmp_path, "a b c d e", timeout_seconds=60)
    assert findings.trouble == ()
    assert set(findings.bad) == {"b", "c", "d", "e"}
    (text,) = findings.bad["b"]
    assert text.startswith("b: its clock is 60.0 s ahead of the others', 5 s apart are allowed")
    (text,) = findings.bad["c"]
    assert text.startswith("c: accelerate is 0.1, on 3 other nodes it is ")
    (text,) = findings.bad["d"]
    assert text.startswith(
        "d: it could not take part in the meeting of the nodes: its process ended with 1: ImportError"
    )
    assert findings.bad["e"] == ("e: it did not answer within 60 s",)
    # those that came went on without those that did not
    first = report_of(tmp_path, "a").meeting
    assert first is not None
    assert first.missing == ("d", "e")
    assert (first.stage, first.to) == ("done", "b")


@pytest.mark.slow
def test_a_port_that_is_taken_is_nobodys_fault_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    with socket.socket() as taken, a_machine() as machine:
        taken.bind(("", 0))
        # listens, and never answers
        taken.listen()
        port = taken.getsockname()[1]
        findings = examined(machine, tmp_path, "a b", port, timeout_seconds=24)
        assert machine.seconds < 24
    assert findings.bad == {}
    (text,) = findings.trouble
    assert text.startswith(f"a: the nodes could not meet there: port {port} cannot be opened: ")


def test_where_nothing_starts_that_is_said(tmp_path: Path) -> None:
    with a_machine(a=None, b=None) as machine:
        findings = examined(machine, tmp_path, "a b")
    assert findings.bad == {}
    assert findings.trouble == ("no node was examined: what starts processes on them ended with 1; see the log above",)
