"""What a node says of itself before ranks are started on it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from launcher.run_directory import write_atomically
from trainer.config.section import NonNegativeFloat, NonNegativeInt, Section

SHARE_OF_JOINING = 0.5
"""Of the time for all: by then a node must have come to the meeting, and sooner where the others were quicker."""
SHARE_OF_MEETING = 0.8
"""By then the meeting is over, whatever came of it."""
SHARE_OF_REPORT = 0.9
"""By then a node has written what it knows: the rest is for the launcher to end in."""


class Meeting(Section):
    """How the nodes found each other, as one of them saw it."""

    reached: bool = False
    """It reached the first node; of the first: it could be reached."""
    missing: tuple[str, ...] = ()
    """Nodes that had not come in time, or were gone at the end. Only the first node says it."""
    clock_offset: float | None = None
    """Seconds that its clock is ahead of the first node's; None: not measured."""
    clock_error: NonNegativeFloat = 0.0
    """Seconds by which that may be wrong: half the shortest round trip."""
    device_error: str = ""
    """Why a device does not compute; empty: all do."""
    wrong: tuple[str, ...] = ()
    """Nodes whose part of the sum over all nodes came out wrong."""
    to: str = ""
    """The next node, which bandwidth was measured to."""
    gbit_per_second: NonNegativeFloat | None = None
    """To that node, at the same time as other pairs of nodes; None: not measured."""
    stage: str = "starting"
    """The last thing that was begun: starting · joining · clock · devices · group · sum · bandwidth · ending · done."""
    error: str = ""
    """Why it ended there; empty: it did not."""
    seconds_import: NonNegativeFloat = 0.0
    """Until torch was imported, from the beginning of the process."""
    seconds: NonNegativeFloat = 0.0
    """From there, once the node's other checks were done, to the end."""


class Report(Section):
    """Everything that one node found out."""

    token: str
    """Of the examination that asked."""
    node: str
    """As the scheduler calls it."""
    hostname: str
    """As it calls itself."""
    boot: str
    """Id of its boot: another after every reboot."""
    gpus: NonNegativeInt = 0
    """That the installed torch can use."""
    gpu_trouble: tuple[str, ...] = ()
    """Clauses: GPUs in use by others, or not usable."""
    memory_bytes: NonNegativeInt
    """Of host memory that are available, limits of the job included."""
    shared_memory_bytes: NonNegativeInt | None = None
    """Free in /dev/shm; None: there is none."""
    disk_bytes: NonNegativeInt | None = None
    """Free where the run is written; None: not known."""
    disk_bytes_per_second: NonNegativeFloat | None = None
    """At which a synced file was written there; None: not known."""
    disk_error: str = ""
    """Why not: a clause."""
    versions: dict[str, str] = Field(default={})
    """Of Python, packages and the GPU driver, by name."""
    seconds: NonNegativeFloat = 0.0
    """From the beginning of the process to the report."""
    meeting: Meeting | None = None
    """None: there was none (a single node), or it was not reached."""
    heard: tuple[Report, ...] = ()
    """What other nodes told the first one when they came, in case their disks swallow it: without a meeting."""
    complete: bool = True
    """False: heard of, never written."""


def path_of(folder: Path, node: str) -> Path:
    """Where a node writes its report."""
    return folder / f"{node}.json"


def write_report(folder: Path, report: Report) -> None:
    """Put it where the examination looks for it; it appears whole.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    write_atomically(path_of(folder, report.node), report.model_dump_json() + "\n")


def read_report(folder: Path, node: str, token: str) -> Report | None:
    """A node's report; None: it is not there, damaged, or of another examination."""
    try:
        report = Report.model_validate_json(path_of(folder, node).read_bytes())
    except (OSError, ValidationError):
        return None
    return report if report.token == token and report.node == node else None
