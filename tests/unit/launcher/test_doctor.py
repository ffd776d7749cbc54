import os
from importlib import metadata
from pathlib import Path

from launcher.doctor import PACKAGES, examine


def test_what_this_machine_has_is_said(tmp_path: Path) -> None:
    findings = {finding.topic: finding for finding in examine(tmp_path / "runs" / "deeper", os.environ)}
    for name in PACKAGES:
        assert findings[name].text == metadata.version(name)
    assert findings["cores"].text.split()[0] == str(len(os.sched_getaffinity(0)))
    assert {"memory", "disk", "shared memory", "open files", "C++ compiler", "ninja", "backends"} <= set(findings)
    # the folder does not exist yet: its nearest parent does, and nothing is created
    assert str(tmp_path) in findings["disk"].text
    assert list(tmp_path.iterdir()) == []


def test_what_will_not_work_is_said_with_its_reason(tmp_path: Path) -> None:
    findings = {finding.topic: finding for finding in examine(tmp_path, {"CXX": "no-such-compiler"})}
    compiler = findings["C++ compiler"]
    assert compiler.level == "note"
    assert "no-such-compiler is not there" in compiler.text
    assert "zero.offload" in compiler.text
    # /proc takes no files from anybody, root included
    disk = {finding.topic: finding for finding in examine(Path("/proc/runs"), os.environ)}["disk"]
    assert disk.level == "wrong"


def test_two_processes_agree(tmp_path: Path) -> None:
    *_, last = examine(tmp_path, os.environ, deep=True)
    assert (last.topic, last.level) == ("all-reduce", "fine"), last.text


def test_two_processes_that_cannot_agree_are_reported(tmp_path: Path) -> None:
    # no such network interface for gloo to use
    *_, last = examine(tmp_path, {**os.environ, "GLOO_SOCKET_IFNAME": "none0"}, deep=True)
    assert (last.topic, last.level) == ("all-reduce", "wrong")
    assert "failed" in last.text
