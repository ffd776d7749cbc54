"""Judging of nodes from their reports, and what a node finds out about itself."""

import math
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.preflight import looks
from launcher.preflight.examine import collect
from launcher.preflight.judging import Findings, judge
from launcher.preflight.node import Order, argv, main
from launcher.preflight.report import Meeting, Report, path_of, read_report, write_report
from launcher.slurm.site import PreflightConfig
from trainer.errors import ExitCode

GIB = 2**30
WANTED = PreflightConfig(
    memory_gib=8, disk_gib=10, disk_megabytes_per_second=50, shared_memory_gib=4, gbit_per_second=5
)
VERSIONS = {"Python": "3.11.7", "torch": "2.13.0"}


def a_report(node: str, **changes: Any) -> Report:
    """Of a node that is well."""
    known: dict[str, Any] = {
        "token": "t", "node": node, "hostname": node, "boot": "b", "memory_bytes": 64 * GIB, "disk_bytes": 99 * GIB,
        "shared_memory_bytes": 8 * GIB, "disk_bytes_per_second": 2e8, "versions": VERSIONS, "seconds": 3.0,
    }  # fmt: skip
    return Report(**known | changes)


def well(number: int = 3, **changes: Any) -> dict[str, Report | None]:
    """Nodes that met; `node2=…`: changes of its report or, by names of its fields, of its meeting."""
    names = [f"node{index + 1}" for index in range(number)]
    reports: dict[str, Report | None] = {}
    for index, name in enumerate(names):
        own = dict(changes.get(name, {}))
        met: dict[str, Any] = {"reached": True, "stage": "done", "to": names[(index + 1) % number]}
        met |= {"gbit_per_second": 9.0} | ({"clock_offset": 0.001, "clock_error": 0.0001} if index else {})
        met |= {key: own.pop(key) for key in list(own) if key in Meeting.model_fields and key != "seconds"}
        reports[name] = a_report(name, **{"meeting": Meeting(**met)} | own)
    return reports


def judged(reports: dict[str, Report | None], gpus: int = 0, **wanted: Any) -> Findings:
    return judge(reports, WANTED.model_copy(update=wanted), gpus)


def test_well_nodes_are_well_and_their_figures_are_told() -> None:
    findings = judged(well(3, node2={"disk_bytes_per_second": 1e8, "gbit_per_second": 7.0, "clock_offset": -0.5}))
    assert findings.well
    assert findings.sentences == []
    assert findings.figures == {
        "memory GiB, least": 64,
        "disk MB/s, slowest": 100,
        "disk GiB free, least": 99,
        "link Gbit/s, slowest": 7,
        "link Gbit/s, fastest": 9,
        "clocks apart s, most": 0.5,
        "seconds on a node, longest": 3,
    }


@pytest.mark.parametrize(
    ("changes", "gpus", "clause"),
    [
        ({"memory_bytes": int(0.4 * GIB)}, 0, "only 0.4 GiB of host memory are available, 8 are required"),
        ({"shared_memory_bytes": 2**26}, 0, "only 0.062 GiB are free in /dev/shm, 4 are required"),
        ({"shared_memory_bytes": None}, 0, "there is no /dev/shm, 4 GiB in it are required"),
        ({"disk_bytes": 3 * GIB}, 0, "only 3 GiB are free where the run is written, 10 are required"),
        ({"disk_bytes_per_second": 4e6}, 0, "the disk where the run is written takes 4 MB/s, 50 are required"),
        ({"disk_error": "did not answer"}, 0, "the disk where the run is written did not answer"),
        ({"gpus": 3}, 4, "3 GPUs can be used, 4 are required"),
        (
            {"gpus": 4, "gpu_trouble": ("GPU 1 is in use (3000 MiB: process 7 (python))",)},
            4,
            "GPU 1 is in use (3000 MiB: process 7 (python))",
        ),
        ({"device_error": "GPU 0 does not compute: CUDA error"}, 0, "GPU 0 does not compute: CUDA error"),
        ({"versions": VERSIONS | {"torch": "2.12.1"}}, 0, "torch is 2.12.1, on 2 other nodes it is 2.13.0"),
        ({"versions": {"Python": "3.11.7"}}, 0, "torch is not known, on 2 other nodes it is 2.13.0"),
        ({"clock_offset": 9.0}, 0, "its clock is 9.0 s ahead of the others', 5 s apart are allowed"),
        ({"clock_offset": -9.0}, 0, "its clock is 9.0 s behind the others', 5 s apart are allowed"),
        (
            {"reached": False, "stage": "joining", "error": "node1 port 7: Connection refused"},
            0,
            "it does not reach node1: node1 port 7: Connection refused",
        ),
        (
            {"reached": False, "stage": "starting", "error": "its process ended with 1: no torch"},
            0,
            "it could not take part in the meeting of the nodes: its process ended with 1: no torch",
        ),
        ({"complete": False, "meeting": None}, 0, "its check did not end within 180 s"),
        ({"stage": "sum", "error": "it hung there"}, 0, "it hung there, at stage 'sum'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_node_is_said_of_it_alone(changes: dict[str, Any], gpus: int, clause: str) -> None:
    reports = well(3, node1={"gpus": 4}, node2={"gpus": 4}, node3={"gpus": 4} | changes)
    findings = judged(reports, gpus)
    assert findings.bad == {"node3": (f"node3: {clause}",)}
    assert findings.trouble == ()
    assert not findings.well


def test_all_that_is_wrong_with_a_node_is_said() -> None:
    findings = judged(well(2, node2={"memory_bytes": 0, "disk_bytes_per_second": 0.0}))
    assert findings.sentences == [
        "node2: only 0 GiB of host memory are available, 8 are required",
        "node2: the disk where the run is written takes 0 MB/s, 50 are required",
    ]


def test_what_all_nodes_have_in_common_is_no_nodes_fault() -> None:
    slow = {"disk_bytes_per_second": 4e6}
    findings = judged(well(3, node1=slow, node2=slow, node3=slow))
    assert findings.bad == {}
    assert findings.trouble == (
        "on all 3 nodes, so it is not their fault: node1: the disk where the run is written takes 4 MB/s, "
        "50 are required",
    )
    # of those that answered
    silent = judged(well(3, node1=slow, node2=slow) | {"node3": None})
    assert silent.bad == {"node3": ("node3: it did not answer within 180 s",)}
    assert len(silent.trouble) == 1


def test_a_single_node_answers_for_itself_but_not_for_the_shared_disk() -> None:
    findings = judge({"a": a_report("a", memory_bytes=0, disk_bytes=0)}, WANTED, 0)
    assert findings.bad == {"a": ("a: only 0 GiB of host memory are available, 8 are required",)}
    assert findings.trouble == ("a: only 0 GiB are free where the run is written, 10 are required",)


def test_of_two_versions_that_of_the_first_node_holds() -> None:
    findings = judged(well(2, node1={"versions": VERSIONS | {"torch": "1"}}))
    assert findings.sentences == ["node2: torch is 2.13.0, on node1 it is 1"]


def test_the_first_node_can_be_the_odd_one_out() -> None:
    findings = judged(well(4, node1={"versions": VERSIONS | {"torch": "1"}}))
    assert findings.sentences == ["node1: torch is 1, on 3 other nodes it is 2.13.0"]
    # its clock too: all others are as far from it
    others = {f"node{number}": {"clock_offset": 60.0 + number / 1000} for number in (2, 3, 4)}
    assert judged(well(4, **others)).sentences == [
        "node1: its clock is 60.0 s behind the others', 5 s apart are allowed"
    ]


def test_a_clock_is_judged_within_what_was_measured() -> None:
    assert judged(well(3, node2={"clock_offset": 5.5, "clock_error": 0.6})).well
    assert not judged(well(3, node2={"clock_offset": 5.5, "clock_error": 0.4})).well


def test_a_silent_node_is_named_and_those_that_waited_for_it_are_not() -> None:
    lost = {"stage": "group", "error": "RuntimeError: Connection closed by peer"}
    findings = judged(well(4, node1=lost, node2=lost, node3=lost) | {"node4": None})
    assert findings.bad == {"node4": ("node4: it did not answer within 180 s",)}
    assert findings.trouble == ()
    # it wrote its report, but was cut off from the meeting
    gone = {"missing": ("node3",), **lost}
    findings = judged(well(3, node1=gone, node2=lost, node3=lost))
    assert findings.sentences == [
        "node3: it was not at the meeting of the nodes to the end: RuntimeError: Connection closed by peer, at stage "
        "'group'"
    ]


def test_where_nobody_knows_who_is_to_blame_nobody_is() -> None:
    lost = {"stage": "group", "error": "RuntimeError: timed out"}
    findings = judged(well(3, node1=lost, node2=lost, node3=lost))
    assert findings.bad == {}
    assert findings.trouble == (
        "the nodes do not work together: node1: RuntimeError: timed out, at stage 'group'; node2: RuntimeError: timed "
        "out, at stage 'group'; node3: RuntimeError: timed out, at stage 'group'",
    )


def test_the_first_node_is_to_blame_where_most_do_not_reach_it() -> None:
    away = {"reached": False, "stage": "joining", "error": "node1 port 7: timed out"}
    findings = judged(well(4, node2=away, node3=away))
    assert findings.sentences == ["node1: 2 of 3 other nodes do not reach it (node1 port 7: timed out)"]
    # of two nodes it is the other one: the job runs on the first
    assert set(judged(well(2, node2=away)).bad) == {"node2"}
    # a port that is taken is no node's fault
    taken = {"reached": False, "stage": "joining", "error": "port 7 cannot be opened: address already in use"}
    findings = judged(well(3, node1=taken, node2=away, node3=away))
    assert findings.bad == {}
    assert findings.trouble == (
        "node1: the nodes could not meet there: port 7 cannot be opened: address already in use, at stage 'joining'",
    )


def test_a_slow_link_has_two_ends() -> None:
    link = "the link node2 → node3 carries 0.5 Gbit/s, 5 are required"
    findings = judged(well(4, node2={"gbit_per_second": 0.5}))
    assert findings.bad == {"node2": (f"node2: {link}",), "node3": (f"node3: {link}",)}
    # but a node both of whose links are slow is to blame alone
    findings = judged(well(4, node2={"gbit_per_second": 0.5}, node3={"gbit_per_second": 0.4}))
    assert set(findings.bad) == {"node3"}
    assert len(findings.bad["node3"]) == 2
    # of two nodes nobody knows which
    slow = {"gbit_per_second": 0.5}
    assert set(judged(well(2, node1=slow, node2=slow)).bad) == {"node1", "node2"}
    # and where all are slow, it is the network
    findings = judged(well(3, node1=slow, node2=slow, node3=slow))
    assert (findings.bad, len(findings.trouble)) == ({}, 1)


def test_a_wrong_sum_is_told_with_whose_part_it_was() -> None:
    findings = judged(well(3, node1={"wrong": ("node2",)}, node3={"wrong": ("node2",)}))
    assert findings.sentences == ["node2: what it adds to a sum over all nodes comes out wrong"]
    findings = judged(well(3, node1={"wrong": ("node2",)}, node3={"wrong": ("node1",)}))
    assert (findings.bad, len(findings.trouble)) == ({}, 1)


MEETINGS = st.builds(
    Meeting,
    reached=st.booleans(),
    missing=st.lists(st.sampled_from(["n0", "n1", "n2", "n3"]), max_size=2).map(tuple),
    clock_offset=st.none() | st.floats(-100, 100),
    clock_error=st.floats(0, 10),
    device_error=st.sampled_from(["", "broken"]),
    wrong=st.lists(st.sampled_from(["n0", "n1", "n2", "n3"]), max_size=2).map(tuple),
    to=st.sampled_from(["n0", "n1", "n2", "n3"]),
    gbit_per_second=st.none() | st.floats(0, 10),
    stage=st.sampled_from(["starting", "joining", "group", "done"]),
    error=st.sampled_from(["", "gone"]),
)
REPORTS = st.none() | st.builds(
    a_report,
    st.just("n"),
    memory_bytes=st.sampled_from([0, 64 * GIB]),
    disk_bytes=st.none() | st.sampled_from([0, 64 * GIB]),
    disk_error=st.sampled_from(["", "did not answer"]),
    versions=st.sampled_from([VERSIONS, {}, {"torch": "1"}]),
    complete=st.booleans(),
    meeting=st.none() | MEETINGS,
)


@given(st.lists(REPORTS, min_size=4, max_size=4), st.integers(1, 4))
def test_whatever_nodes_say_is_judged(reports: list[Report | None], number: int) -> None:
    named = {
        f"n{index}": report and report.model_copy(update={"node": f"n{index}"})
        for index, report in enumerate(reports[:number])
    }
    findings = judge(named, WANTED, 0)
    # a node that did not say all it should is never taken for well
    silent = {node for node, report in named.items() if report is None or not report.complete}
    assert silent <= set(findings.bad) or findings.trouble
    for node, sentences in findings.bad.items():
        assert node in named
        assert all(sentence.startswith(f"{node}: ") for sentence in sentences)
    assert all(math.isfinite(value) for value in findings.figures.values())


def test_reports_of_another_examination_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    report = a_report("a", meeting=Meeting(to="b"), heard=(a_report("b", complete=False),))
    write_report(tmp_path, report)
    assert read_report(tmp_path, "a", "t") == report
    assert read_report(tmp_path, "a", "another") is None
    # of b only what it told a is known, of c nothing
    path_of(tmp_path, "c").write_text("{")
    assert collect(tmp_path, ("a", "b", "c"), "t", 0.0) == {"a": report, "b": report.heard[0], "c": None}


def test_the_node_process_is_told_everything_in_plain_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a b$(touch x)"
    folder.mkdir()
    order = Order(folder, ("a", "b"), "a", "10.0.0.1", 7, "t0", 0, 30.0)
    interpreter, module, verb, *rest = argv(order)
    assert (interpreter, module, verb) == ("-m", "launcher.preflight", "check")
    # a node that is none of them
    assert main([verb, *rest], {"SLURMD_NODENAME": "c"}) == ExitCode.USAGE
    assert capsys.readouterr().err == "preflight: this node is 'c', which is none of a, b\n"
    # a single node meets nobody
    alone = Order(folder, ("a",), "a", "10.0.0.1", 7, "t0", 0, 30.0)
    assert main(argv(alone)[2:], {"SLURMD_NODENAME": "a"}) == 0
    report = read_report(folder, "a", "t0")
    assert report is not None
    assert report.meeting is None
    assert report.versions["torch"] == metadata.version("torch")
    assert report.memory_bytes > 0
    assert report.disk_bytes_per_second is not None
    assert report.disk_bytes_per_second > 0
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    assert judge({"a": report}, PreflightConfig(memory_gib=0, disk_gib=0), 0).well


def test_a_disk_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    from launcher.preflight.node import look

    report = look(Order(tmp_path / "missing", ("a",), "a", "h", 7, "t", 0, 30.0))
    assert report.disk_error == "cannot be written: No such file or directory"


def test_what_does_not_answer_is_left_behind() -> None:
    never = threading.Event()
    with pytest.raises(looks.NoAnswerError):
        looks.answered(never.wait, 0.05)
    never.set()
    assert looks.answered(lambda: 7, 10.0) == 7
    with pytest.raises(KeyError):
        looks.answered(lambda: {}["x"], 10.0)


def test_memory_is_within_the_limits_of_all_groups_above(tmp_path: Path) -> None:
    job = tmp_path / "fs" / "slurm" / "job_7"
    step = job / "step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step / "memory.current").write_text("5\n")
    (job / "memory.max").write_text("1000000\n")
    (job / "memory.current").write_text("400000\n")
    (job / "memory.stat").write_text("inactive_file 1000\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7/step_0\n")
    assert looks.memory_available(tmp_path / "fs", own) == 601_000
    # outside of the job, and where there are no such groups, only the machine counts
    own.write_text("0::/\n")
    assert looks.memory_available(tmp_path / "fs", own) > 2**20
    assert looks.memory_available(tmp_path / "fs", tmp_path / "missing") > 2**20


def test_gpus_in_use_are_told_with_who_uses_them() -> None:
    cards = "GPU-aa, 3, 580.1\nGPU-bb, 4096, 580.1\nGPU-cc, 4, 580.1\nGPU-dd, 1025, 580.1\n"
    processes = "GPU-bb, 77, /usr/bin/python\nGPU-bb, 78, a, b\nGPU-cc, 9, x\n"
    in_use = [
        "GPU 1 is in use (4096 MiB: process 77 (/usr/bin/python), process 78 (a, b))",
        "GPU 2 is in use (4 MiB: process 9 (x))",
        "GPU 3 is in use (1025 MiB)",
    ]
    assert looks.parse_in_use(cards, processes, None) == (tuple(in_use), "580.1")
    assert looks.parse_in_use(cards, processes, "0,2")[0] == (in_use[1],)
    assert looks.parse_in_use(cards, processes, "GPU-d")[0] == (in_use[2],)
    assert looks.parse_in_use(cards, processes, "")[0] == ()
    assert looks.parse_in_use("No devices were found\n", "", None) == ((), "")
