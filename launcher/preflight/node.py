"""What runs on each node, one process a node: it looks at the node and takes part in the meeting of all nodes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from launcher.preflight import looks
from launcher.preflight.report import (
    SHARE_OF_JOINING,
    SHARE_OF_MEETING,
    SHARE_OF_REPORT,
    Meeting,
    Report,
    write_report,
)
from launcher.slurm.exclusion import checked
from trainer.errors import LaunchError, RunDirectoryError, TrimtabError
from trainer.heartbeat import LAUNCHER_VARIABLE

NODE_VARIABLE = "SLURMD_NODENAME"
"""Environment variable in which Slurm tells a task the name of its node."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a node is asked to do."""

    folder: Path
    """On the disk where the run is written: for the report, and to measure it."""
    nodes: tuple[str, ...]
    """All, the first one first."""
    node: str
    """This one."""
    master: str
    """Address of the first node."""
    port: int
    """Of the meeting, on the first node."""
    token: str
    """Of the examination."""
    gpus: int
    """That ranks will use on each node."""
    seconds: float
    """By then the examination does not wait any more."""


def argv(order: Order) -> list[str]:
    """Arguments of the node process, for all nodes alike: each knows its own name."""
    options = {"nodes": ",".join(order.nodes), "master": order.master, "port": order.port, "token": order.token}
    options |= {"gpus": order.gpus, "seconds": order.seconds}
    return ["-m", "launcher.preflight", "check", str(order.folder), *(f"--{key}={options[key]}" for key in options)]


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Entry of the node process: writes its report, and nothing that anybody would have to read."""
    parser = argparse.ArgumentParser(prog="python -m launcher.preflight")
    parser.add_argument("verb", choices=["check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", required=True, type=lambda text: tuple(checked(node) for node in text.split(",")))
    parser.add_argument("--node", default=environment.get(NODE_VARIABLE), help=f"default: ${NODE_VARIABLE}")
    for name, kind in (("master", str), ("port", int), ("token", str), ("gpus", int), ("seconds", float)):
        parser.add_argument(f"--{name}", required=True, type=kind)
    given = vars(parser.parse_args(arguments))
    del given["verb"]
    order = Order(**given)
    try:
        if order.node not in order.nodes:
            raise LaunchError(f"this node is {order.node!r}, which is none of {', '.join(order.nodes)}")
        check(order, environment)
    except TrimtabError as error:
        print(f"preflight: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def check(order: Order, environment: Mapping[str, str]) -> None:
    """Look, meet, report.

    Raises:
        RunDirectoryError: the report cannot be written.
    """
    began = time.monotonic()
    # it imports torch while the node looks at itself
    process = _MeetingProcess(environment) if len(order.nodes) > 1 else None
    report = look(order)
    heard: tuple[Report, ...] = ()
    if process is not None:
        left = order.seconds * SHARE_OF_MEETING - (time.monotonic() - began)
        process.begin(order, report, max(1.0, left))
        meeting, heard = process.result(began + order.seconds * (SHARE_OF_MEETING + SHARE_OF_REPORT) / 2)
        report = report.model_copy(update={"meeting": meeting, "heard": heard})
    report = report.model_copy(update={"seconds": time.monotonic() - began})
    left = max(1.0, began + order.seconds * SHARE_OF_REPORT - time.monotonic())
    try:
        looks.answered(lambda: write_report(order.folder, report), left)
    except looks.NoAnswerError:
        raise RunDirectoryError(f"{order.folder} does not answer on {order.node}") from None


def look(order: Order) -> Report:
    """What this node is like by itself."""
    found: dict[str, Any] = {"versions": looks.versions()}
    if order.gpus:
        found["gpus"], found["gpu_trouble"], driver = looks.gpus()
        found["versions"]["the GPU driver"] = driver or "not known"
    # a disk that hangs must leave time for the meeting
    patience = order.seconds * SHARE_OF_JOINING / 2
    try:
        found["disk_bytes"] = looks.answered(lambda: shutil.disk_usage(order.folder).free, patience / 2)
        found["disk_bytes_per_second"] = looks.answered(lambda: looks.disk_speed(order.folder), patience / 2)
    except looks.NoAnswerError:
        found["disk_error"] = f"did not answer within {patience / 2:.3g} s"
    except OSError as error:
        found["disk_error"] = f"cannot be written: {error.strerror}"
    return Report(
        token=order.token,
        node=order.node,
        hostname=socket.gethostname(),
        boot=looks.boot_id(),
        memory_bytes=looks.memory_available(),
        shared_memory_bytes=looks.shared_memory(),
        **found,
    )


@dataclass(slots=True)
class _Heard:
    """What the meeting's process has said so far."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(json.loads(line))


class _MeetingProcess:
    """`trainer.meeting`: torch is imported there, and what hangs there is killed."""

    def __init__(self, environment: Mapping[str, str]):
        self._noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (until the end)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.meeting"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
            env={**environment, LAUNCHER_VARIABLE: str(os.getpid())},
        )
        assert self._process.stdout is not None
        self._heard = _Heard()
        self._listener = threading.Thread(target=self._heard.listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    def begin(self, order: Order, report: Report, seconds: float) -> None:
        """Everything else is looked at: what the GPUs compute from now on is the meeting's."""
        about = {
            "nodes": order.nodes,
            "index": order.nodes.index(order.node),
            "host": order.master,
            "port": order.port,
            "token": order.token,
            "gpus": order.gpus,
            "join_seconds": seconds * SHARE_OF_JOINING / SHARE_OF_MEETING,
            "seconds": seconds,
            "about": report.model_dump_json(),
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(about) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # it is dead: the result says so
            pass

    def result(self, deadline: float) -> tuple[Meeting, tuple[Report, ...]]:
        """(what came of it, what other nodes said of themselves to the first one)."""
        try:
            code: int | None = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            self._process.kill()
            self._process.wait()
        self._listener.join(1.0)
        found: dict[str, Any] = {}
        for line in list(self._heard.lines):
            found |= line
        heard = [_heard(text) for text in found.pop("heard", [])]
        if code is None:
            found["error"] = "it hung there"
        elif code:
            found["error"] = f"its process ended with {code}: {self._last_words()}"
        meeting = Meeting.model_validate_json(json.dumps(found))
        return meeting, tuple(report for report in heard if report is not None)

    def _last_words(self) -> str:
        self._noise.seek(0)
        lines = [line.strip() for line in self._noise if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


def _heard(text: str) -> Report | None:
    try:
        return Report.model_validate_json(text).model_copy(update={"complete": False})
    except ValidationError:
        return None
