"""The examination of all nodes of an allocation, as the job's first node carries it out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.preflight.judging import Findings, judge
from launcher.preflight.node import Order, argv
from launcher.preflight.report import Report, path_of, read_report
from launcher.slurm.exclusion import checked
from launcher.slurm.site import PreflightConfig
from trainer.errors import RunDirectoryError

RunSrun = Callable[[Sequence[str], Mapping[str, str], float], int]
"""(what to run on every node, one process each; variables to add to its environment; seconds after which to end it) →
exit code. One that fails must not end the others."""

LOOK_SECONDS = 2.0
"""How long a report may take to show on this machine after its node has written it."""


def examine(
    nodes: Sequence[str],
    run_srun: RunSrun,
    folder: Path,
    wanted: PreflightConfig,
    gpus: int,
    python: str,
    master: str,
    port: int,
) -> Findings:
    """Have every node look at itself, all of them meet, and judge what they say.

    Args:
        nodes: names as the scheduler has them; the first is this one.
        folder: for their reports, on the disk where the run is written, seen by all nodes; it is made.
        gpus: that ranks will use on each node; 0: none.
        python: with trimtab installed, on every node.
        master: address of the first node, for the others.
        port: a free one there.

    Raises:
        LaunchError: a name is none of a node.
        RunDirectoryError: the folder cannot be written.
    """
    names = tuple(checked(node) for node in nodes)
    token = secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for node in names:
            path_of(folder, node).unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{folder} cannot be written: {error.strerror}") from error
    order = Order(folder.absolute(), names, names[0], master, port, token, gpus, wanted.timeout_seconds)
    code = run_srun([python, *argv(order)], {"OMP_NUM_THREADS": "1"}, wanted.timeout_seconds)
    reports = collect(folder, names, token, LOOK_SECONDS)
    findings = judge(reports, wanted, gpus)
    if not any(reports.values()):
        # not one process ran: what starts them is at fault, or this node
        trouble = f"no node was examined: what starts the processes (srun) ended with {code}"
        return Findings(trouble=(trouble,))
    return findings


def collect(folder: Path, nodes: Sequence[str], token: str, seconds: float) -> dict[str, Report | None]:
    """The reports of an examination, in the order of the nodes; in the place of one that does not show within
    `seconds` what its node told the first one, else None."""
    deadline = time.monotonic() + seconds
    reports: dict[str, Report | None] = {}
    for node in nodes:
        while (report := read_report(folder, node, token)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        reports[node] = report
    first = reports[nodes[0]]
    heard = {report.node: report for report in first.heard} if first is not None else {}
    return {node: report or heard.get(node) for node, report in reports.items()}
