"""From the reports of all nodes: which are not fit, and why. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from launcher.preflight.report import Meeting, Report
from launcher.slurm.site import PreflightConfig

GIB = 2**30
MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Findings:
    """What an examination of the nodes came to."""

    bad: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Node → sentences: what is wrong with it. Such a node is better left out for a while."""
    trouble: tuple[str, ...] = ()
    """Sentences: what is wrong, and no single node's fault (all nodes have it, or nobody knows whose it is)."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by name with its unit; what was not is not there."""

    @property
    def well(self) -> bool:
        """Nothing is wrong."""
        return not self.bad and not self.trouble

    @property
    def sentences(self) -> list[str]:
        """All that is wrong, in the order of the nodes."""
        return [*(text for texts in self.bad.values() for text in texts), *self.trouble]


class _Faults:
    """Collects what is wrong. What all nodes have in common is no node's fault: a limit that no node of the cluster can
    keep, or a disk that is slow for all, must not have the whole cluster left out, node by node."""

    def __init__(self, nodes: Iterable[str]):
        self.of: dict[str, list[str]] = {node: [] for node in nodes}
        self.trouble: list[str] = []

    def blame(self, node: str, clause: str) -> None:
        """A node of which nothing was asked cannot be left out: that is trouble."""
        self.of.get(node, self.trouble).append(f"{node}: {clause}")

    def add(self, faults: Mapping[str, str], among: Collection[str], *, shared: bool = False) -> None:
        """Faults of one kind, node → clause.

        Args:
            among: the nodes that were asked.
            shared: it is the same thing for all, so that even a single node is not to blame.
        """
        if faults and len(faults) == len(among) and (shared or len(faults) > 1):
            node, clause = next(iter(faults.items()))
            everywhere = f"on all {len(faults)} nodes, so it is not their fault: " if len(faults) > 1 else ""
            self.trouble.append(f"{everywhere}{node}: {clause}")
            return
        for node, clause in faults.items():
            self.blame(node, clause)


def judge(reports: Mapping[str, Report | None], wanted: PreflightConfig, gpus: int) -> Findings:
    """Which nodes are not fit, and why.

    Args:
        reports: of every node that was asked, in the order of the allocation, so that the first is the one that the
            others came to; None: it did not answer.
        wanted: what a node must be able to do.
        gpus: that ranks will use on each node; 0: none.
    """
    there = {node: report for node, report in reports.items() if report is not None}
    faults = _Faults(reports)
    within = f"within {wanted.timeout_seconds:g} s"
    faults.add({node: f"it did not answer {within}" for node in reports if node not in there}, reports)
    for shared, check in (
        (False, _gpus_of(gpus)),
        (False, _memory_of(wanted)),
        (False, _shared_memory_of(wanted)),
        (True, _disk_space_of(wanted)),
        (False, _disk_speed_of(wanted)),
    ):
        found = {node: clause for node, report in there.items() if (clause := check(report)) is not None}
        faults.add(found, there, shared=shared)
    _judge_versions(there, faults)
    _judge_meeting(reports, wanted, faults)
    for node, report in there.items():
        if not report.complete and not faults.of[node]:
            faults.blame(node, f"its check did not end {within}")
    return Findings(
        bad={node: tuple(sentences) for node, sentences in faults.of.items() if sentences},
        trouble=tuple(faults.trouble),
        figures=_figures(there.values()),
    )


Check = Callable[[Report], str | None]
"""What is wrong with a node in a clause; None: nothing."""


def _gpus_of(gpus: int) -> Check:
    def check(report: Report) -> str | None:
        if not gpus:
            return None
        clauses = list(report.gpu_trouble)
        if report.gpus < gpus:
            clauses.insert(0, f"{report.gpus} GPUs can be used, {gpus} are required")
        return "; ".join(clauses) or None

    return check


def _memory_of(wanted: PreflightConfig) -> Check:
    def check(report: Report) -> str | None:
        if report.memory_bytes >= wanted.memory_gib * GIB:
            return None
        available = report.memory_bytes / GIB
        return f"only {_figure(available)} GiB of host memory are available, {wanted.memory_gib:g} are required"

    return check


def _shared_memory_of(wanted: PreflightConfig) -> Check:
    def check(report: Report) -> str | None:
        if not wanted.shared_memory_gib:
            return None
        if report.shared_memory_bytes is None:
            return f"there is no /dev/shm, {wanted.shared_memory_gib:g} GiB in it are required"
        if report.shared_memory_bytes >= wanted.shared_memory_gib * GIB:
            return None
        free = report.shared_memory_bytes / GIB
        return f"only {_figure(free)} GiB are free in /dev/shm, {wanted.shared_memory_gib:g} are required"

    return check


def _disk_space_of(wanted: PreflightConfig) -> Check:
    def check(report: Report) -> str | None:
        if report.disk_bytes is None or report.disk_bytes >= wanted.disk_gib * GIB:
            return None
        free = report.disk_bytes / GIB
        return f"only {_figure(free)} GiB are free where the run is written, {wanted.disk_gib:g} are required"

    return check


def _disk_speed_of(wanted: PreflightConfig) -> Check:
    def check(report: Report) -> str | None:
        if report.disk_error:
            return f"the disk where the run is written {report.disk_error}"
        speed = report.disk_bytes_per_second
        if speed is None or speed >= wanted.disk_megabytes_per_second * MEGABYTE:
            return None
        return (
            f"the disk where the run is written takes {_figure(speed / MEGABYTE)} MB/s, "
            f"{wanted.disk_megabytes_per_second:g} are required"
        )

    return check


def _judge_versions(there: Mapping[str, Report], faults: _Faults) -> None:
    """The odd ones out; where there is no majority, those that differ from the first."""
    for name in dict.fromkeys(name for report in there.values() for name in report.versions):
        versions = {node: report.versions.get(name, "not known") for node, report in there.items()}
        counts = Counter(versions.values())
        (usual, most), *_ = counts.most_common()
        first = next(iter(versions.values()))
        if counts[first] == most:
            usual = first
        whose = next(node for node, version in versions.items() if version == usual)
        common = f"on {whose}" if len(there) == 2 else f"on {counts[usual]} other nodes"
        for node, own in versions.items():
            if own != usual:
                faults.blame(node, f"{name} is {own}, {common} it is {usual}")


def _judge_meeting(reports: Mapping[str, Report | None], wanted: PreflightConfig, faults: _Faults) -> None:
    meetings = {
        node: report.meeting for node, report in reports.items() if report is not None and report.meeting is not None
    }
    if len(reports) < 2 or not meetings:
        return
    _judge_clocks(meetings, wanted, faults)
    devices = {node: meeting.device_error for node, meeting in meetings.items() if meeting.device_error}
    faults.add(devices, meetings)
    _judge_presence(reports, meetings, faults)
    _judge_links(meetings, wanted, faults)
    wrong = {node for meeting in meetings.values() for node in meeting.wrong}
    if len(wrong) == 1:
        faults.blame(wrong.pop(), "what it adds to a sum over all nodes comes out wrong")
    elif wrong:
        faults.trouble.append(f"a sum over all nodes came out wrong in what {', '.join(sorted(wrong))} added to it")


def _judge_clocks(meetings: Mapping[str, Meeting], wanted: PreflightConfig, faults: _Faults) -> None:
    """Against the median; of two nodes, against the first."""
    first = next(iter(meetings))
    offsets = {node: meeting.clock_offset for node, meeting in meetings.items() if meeting.clock_offset is not None}
    if not offsets:
        return
    middle = statistics.median([0.0, *offsets.values()]) if len(offsets) > 1 else 0.0
    for node, offset in {first: 0.0, **offsets}.items():
        apart = offset - middle
        if abs(apart) - meetings[node].clock_error > wanted.clock_seconds:
            side = "ahead of" if apart > 0 else "behind"
            text = f"its clock is {abs(apart):.1f} s {side} the others', {wanted.clock_seconds:g} s apart are allowed"
            faults.blame(node, text)


def _judge_presence(reports: Mapping[str, Report | None], meetings: Mapping[str, Meeting], faults: _Faults) -> None:
    """Who did not come, who was lost, and what nobody is known to be to blame for."""
    first, *others = reports
    opened = meetings.get(first)
    for node, meeting in meetings.items():
        if meeting.stage == "starting":
            faults.blame(node, f"it could not take part in the meeting of the nodes: {meeting.error or 'no answer'}")
    if opened is not None and not opened.reached:
        if not faults.of[first]:
            faults.trouble.append(f"{first}: the nodes could not meet there: {_why(opened)}")
        return
    came = [node for node in others if node in meetings and meetings[node].stage != "starting"]
    away = {node: meetings[node].error or "no answer" for node in came if not meetings[node].reached}
    if len(away) > 1 and 2 * len(away) > len(came):
        faults.blame(first, f"{len(away)} of {len(came)} other nodes do not reach it ({next(iter(away.values()))})")
        return
    for node, why in away.items():
        faults.blame(node, f"it does not reach {first}: {why}")
    for node in came:
        if opened is not None and node in opened.missing and node not in away:
            faults.blame(node, f"it was not at the meeting of the nodes to the end: {_why(meetings[node])}")
    # a node that is gone makes the others fail: what they say then is not their fault
    failed = {node: _why(meeting) for node, meeting in meetings.items() if meeting.error and node not in away}
    if not failed or any(reports[node] is None or faults.of[node] for node in reports):
        return
    if len(failed) == 1 and len(meetings) > 2:
        faults.add(failed, meetings)
    else:
        told = "; ".join(f"{node}: {why}" for node, why in failed.items())
        faults.trouble.append(f"the nodes do not work together: {told}")


def _why(meeting: Meeting) -> str:
    return f"{meeting.error or 'no answer'}, at stage {meeting.stage!r}"


def _judge_links(meetings: Mapping[str, Meeting], wanted: PreflightConfig, faults: _Faults) -> None:
    """A slow link has two ends: a node both of whose links are slow is to blame for them, else both ends may be."""
    speeds = {
        (node, meeting.to): meeting.gbit_per_second
        for node, meeting in meetings.items()
        if meeting.gbit_per_second is not None
    }
    slow = {link: speed for link, speed in speeds.items() if speed < wanted.gbit_per_second}
    told = {
        link: f"the link {link[0]} → {link[1]} carries {_figure(speed)} Gbit/s, {wanted.gbit_per_second:g} are required"
        for link, speed in slow.items()
    }
    if len(slow) == len(speeds) > 2:
        worst = min(slow, key=lambda link: slow[link])
        faults.trouble.append(f"all {len(slow)} links between nodes are slow, so no node is to blame: {told[worst]}")
        return
    ends = Counter(node for link in slow for node in link)
    both = {node for node, count in ends.items() if count == 2} if len(speeds) > 2 else set()
    for link, clause in told.items():
        for node in [node for node in link if node in both] or link:
            faults.blame(node, clause)


def _figures(reports: Iterable[Report]) -> dict[str, float]:
    found = list(reports)
    meetings = [report.meeting for report in found if report.meeting is not None]
    speeds = [meeting.gbit_per_second for meeting in meetings if meeting.gbit_per_second is not None]
    series: dict[str, tuple[Callable[[list[float]], float], list[float]]] = {
        "memory GiB, least": (min, [report.memory_bytes / GIB for report in found]),
        "disk MB/s, slowest": (
            min,
            [r.disk_bytes_per_second / MEGABYTE for r in found if r.disk_bytes_per_second is not None],
        ),
        "disk GiB free, least": (min, [r.disk_bytes / GIB for r in found if r.disk_bytes is not None]),
        "link Gbit/s, slowest": (min, speeds),
        "link Gbit/s, fastest": (max, speeds),
        "clocks apart s, most": (max, [abs(m.clock_offset) for m in meetings if m.clock_offset is not None]),
        "seconds on a node, longest": (max, [report.seconds for report in found]),
    }
    return {name: value for name, (pick, values) in series.items() if values and math.isfinite(value := pick(values))}


def _figure(value: float) -> str:
    """0.043, 1.3, 27"""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
