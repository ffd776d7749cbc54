"""The examination of all nodes of an allocation, as the job's first node carries it out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from launcher.preflight.judging import Findings, judge
from launcher.preflight.node import Order, argv
from launcher.preflight.report import Report, path_of, read_report
from launcher.slurm.exclusion import checked
from launcher.slurm.site import PreflightConfig
from trainer.errors import RunDirectoryError

RunSrun = Callable[[Sequence[str], Sequence[str], Mapping[str, str], float], int]
"""(nodes, what to run on each of them, one process each; variables to add to its environment; seconds after which to
end it) → exit code. One process that fails must not end the others. May be called from several threads at once."""

LOOK_SECONDS = 2.0
"""How long a report may take to show on this machine after its node has written it."""
PROBE_SECONDS = 30.0
"""How long a node may take to start a process that does nothing."""
NUM_PROBES = 16
"""At once."""


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for node in names:
            path_of(folder, node).unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{folder} cannot be written: {error.strerror}") from error

    def look(asked: tuple[str, ...]) -> tuple[Findings | None, int]:
        token = secrets.token_hex(8)
        order = Order(folder.absolute(), asked, asked[0], master, port, token, gpus, wanted.timeout_seconds)
        code = run_srun(asked, [python, *argv(order)], {"OMP_NUM_THREADS": "1"}, wanted.timeout_seconds)
        reports = collect(folder, asked, token, LOOK_SECONDS)
        return (judge(reports, wanted, gpus) if any(reports.values()) else None), code

    findings, code = look(names)
    if findings is not None:
        return findings
    # srun gives all up when it cannot start a process on one: which one?
    dead = _dead(names, run_srun, python)
    rest = tuple(node for node in names if node not in dead)
    if dead and names[0] in rest:
        findings, code = look(rest)
    if findings is None:
        trouble = f"no node was examined: what starts processes on them ended with {code}; see the log above"
        return Findings(dead if rest else {}, (trouble,))
    bad = {**findings.bad, **dead}
    return replace(findings, bad={node: bad[node] for node in names if node in bad})


def _dead(nodes: Sequence[str], run_srun: RunSrun, python: str) -> dict[str, tuple[str, ...]]:
    """The nodes on which no process can be started, each with a sentence."""

    def probe(node: str) -> int:
        return run_srun((node,), [python, "-c", "pass"], {}, PROBE_SECONDS)

    with ThreadPoolExecutor(NUM_PROBES) as pool:
        codes = dict(zip(nodes, pool.map(probe, nodes), strict=True))
    return {
        node: (f"{node}: no process can be started on it (exit code {code})",) for node, code in codes.items() if code
    }


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
